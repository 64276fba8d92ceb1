"""SD3 and SD3.5: joint attention, image first; SD3.5 adds an image-only second attention (`attn2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
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
    projections,
    split_name,
    text_projections,
    to_heads,
)


def _assemble(image_qkv: tuple[Tensor, ...], text_qkv: tuple[Tensor, ...] | None) -> Call:
    query, key, value = image_qkv
    image, text = Span(0, query.shape[1]), None
    if text_qkv is not None:
        query, key, value = (torch.cat(streams, dim=1) for streams in zip(image_qkv, text_qkv, strict=True))
        text = Span(image.stop, query.shape[1])
    # The stock processor drops `attention_mask` too: SD3 passes none.
    return Call(query, key, value, None, image, text)


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, text = inputs.hidden_states, inputs.encoder_hidden_states
    return _assemble(projections(attn, states), None if text is None else text_projections(attn, text))


def _project_fused(attn: nn.Module, inputs: Inputs) -> Call:
    # The stock fused processor applies no QK norm, also where the model has one (SD3.5): neutral is stock.
    image_qkv = tuple(to_heads(attn, part) for part in attn.to_qkv(inputs.hidden_states).chunk(3, dim=-1))
    if inputs.encoder_hidden_states is None:
        return _assemble(image_qkv, None)
    fused = attn.to_added_qkv(inputs.encoder_hidden_states)
    return _assemble(image_qkv, tuple(to_heads(attn, part) for part in fused.chunk(3, dim=-1)))


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Any:
    states = output.flatten(2, 3).to(call.query.dtype)
    if call.text is None:
        return output_layer(attn, states)
    states, text = states[:, : call.image.stop], states[:, call.image.stop :]
    return output_layer(attn, states), text if attn.context_pre_only else attn.to_add_out(text)


class SD3Family(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    title = "Stable Diffusion 3 / 3.5"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
    )
    cfg = "batched"
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)
    text_side = "last"

    def model_class(self) -> type[nn.Module]:
        return SD3Transformer2DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, JointAttnProcessor2_0): Route(_project, _finish),
            (Attention, FusedJointAttnProcessor2_0): Route(_project_fused, _finish),
        }

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, rest = split_name(name)
        return Place("self", "attn2", layer) if rest == "attn2" else Place("joint", stack, layer)

    def auxiliary(self, call: Mapping[str, Any]) -> bool:
        # The pipeline's skip-layer guidance runs the positive prompt once more.
        return call.get("skip_layers") is not None

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, text = call["hidden_states"], call["encoder_hidden_states"]
        patch = model.config.patch_size
        return ForwardInfo(
            batch=latents.shape[0],
            grid=(1, latents.shape[-2] // patch, latents.shape[-1] // patch),
            text_length=None if text is None else text.shape[1],
            text_valid=None,
            timestep=call.get("timestep"),
            device=latents.device,
        )
