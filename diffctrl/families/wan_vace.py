"""Wan VACE: Wan's blocks, and blocks of its own that turn control videos into what is added between them."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import nn

from diffctrl.families.base import Place, split_name
from diffctrl.families.parallel import video_plan
from diffctrl.families.wan import WanFamily


class WanVACEFamily(WanFamily):
    """Wan VACE. Layers count the main blocks; those of the control branch are the stack `vace_blocks`."""

    name = "wan_vace"
    title = "Wan VACE"
    batched = (*WanFamily.batched, "control_hidden_states")
    chains = ()  # the main blocks also get what the control branch computed before them

    def model_class(self) -> type[nn.Module]:
        return WanVACETransformer3DModel

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        plan = WanTransformer3DModel._cp_plan
        control = video_plan("vace_blocks.0", rotary=None, names=("hidden_states", "control_hidden_states"))
        return {**control, **{name: plan[name] for name in ("rope", "blocks.0", "proj_out")}}

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, rest = split_name(name)
        cross = "cross" if stack == "blocks" else "vace_cross"
        return Place("self", stack, layer) if rest == "attn1" else Place("cross", cross, layer)
