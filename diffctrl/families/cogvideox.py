"""CogVideoX 1.0 and 1.5: joint attention over [text, video] with one projection for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor, nn

from diffctrl.families.base import (
    Call,
    Family,
    ForwardInfo,
    Inputs,
    Place,
    Route,
    Span,
    output_layer,
    split_name,
    to_heads,
)
from diffctrl.families.parallel import video_plan
from diffctrl.families.plain import kernel_mask
from diffctrl.families.rotary import normed, normed_and_rotated


def _assemble(attn: nn.Module, inputs: Inputs, qkv: tuple[Tensor, ...], mask_length: int) -> Call:
    query, key, value = (to_heads(attn, part) for part in qkv)
    query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
    text = inputs.encoder_hidden_states.shape[1]
    if inputs.image_rotary_emb is not None:
        cos, sin = (part[None, :, None, :].to(query.device) for part in inputs.image_rotary_emb)
        query, key = (normed_and_rotated(None, part, cos, sin, first=text) for part in (query, key))
    return Call(
        query,
        key,
        value,
        kernel_mask(attn, inputs.attention_mask, mask_length, query.shape[0]),
        image=Span(text, query.shape[1]),
        text=Span(0, text),
    )


def _joint(inputs: Inputs) -> Tensor:
    return torch.cat([inputs.encoder_hidden_states, inputs.hidden_states], dim=1)


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states = _joint(inputs)
    qkv = attn.to_q(states), attn.to_k(states), attn.to_v(states)
    return _assemble(attn, inputs, qkv, states.shape[1])


def _project_fused(attn: nn.Module, inputs: Inputs) -> Call:
    # The stock fused processor prepares masks for the text length; pipelines pass none.
    qkv = attn.to_qkv(_joint(inputs)).chunk(3, dim=-1)
    return _assemble(attn, inputs, qkv, inputs.encoder_hidden_states.shape[1])


def _finish(attn: nn.Module, call: Call, output: Tensor) -> tuple[Tensor, Tensor]:
    states = output_layer(attn, output.flatten(2, 3))
    return states[:, call.image.start :], states[:, : call.image.start]


class CogVideoXFamily(Family):
    """CogVideoX."""

    name = "cogvideox"
    title = "CogVideoX"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "timestep_cond",
        "attention_kwargs",
    )
    cfg = "batched"
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)
    block_streams = ("hidden_states", "encoder_hidden_states")
    scale_known = False  # use_dynamic_cfg sets it between the forward and its use
    text_side = "first"

    def model_class(self) -> type[nn.Module]:
        return CogVideoXTransformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, CogVideoXAttnProcessor2_0): Route(_project, _finish),
            (Attention, FusedCogVideoXAttnProcessor2_0): Route(_project_fused, _finish),
        }

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, _ = split_name(name)
        return Place("joint", stack, layer)

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        from diffusers.models._modeling_parallel import ContextParallelInput

        plan = video_plan("transformer_blocks.0", rotary=None)
        if model.config.use_rotary_positional_embeddings:  # an argument of the model, (cos, sin)
            turn = ContextParallelInput(split_dim=0, expected_dims=2, split_output=False)
            plan[""] = {"image_rotary_emb": [turn, turn]}
        return plan

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, config = call["hidden_states"], model.config
        batch, frames, _, rows, columns = latents.shape
        return ForwardInfo(
            batch=batch,
            # Version 1.0 has no temporal patches.
            grid=(
                frames // (config.patch_size_t or 1),
                rows // config.patch_size,
                columns // config.patch_size,
            ),
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=None,
            timestep=call["timestep"],
            device=latents.device,
        )
