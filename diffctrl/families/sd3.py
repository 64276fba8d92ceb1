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

from diffctrl.families.base import Call, Family, ForwardInfo, Inputs, Route, SiteKind, Span, split_name


def _heads(attn: nn.Module, states: Tensor) -> Tensor:
    return states.view(states.shape[0], -1, attn.heads, states.shape[-1] // attn.heads)


def _normed(norm: nn.Module | None, heads: Tensor) -> Tensor:
    return heads if norm is None else norm(heads)


def _assemble(attn: nn.Module, inputs: Inputs, image_qkv: tuple, text_qkv: tuple | None) -> Call:
    query, key, value = (_heads(attn, states) for states in image_qkv)
    query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
    image, text = Span(0, inputs.hidden_states.shape[1]), None
    if text_qkv is not None:
        text_query, text_key, text_value = (_heads(attn, states) for states in text_qkv)
        text_query = _normed(attn.norm_added_q, text_query)
        text_key = _normed(attn.norm_added_k, text_key)
        query = torch.cat([query, text_query], dim=1)
        key = torch.cat([key, text_key], dim=1)
        value = torch.cat([value, text_value], dim=1)
        text = Span(image.stop, query.shape[1])
    # The stock processor drops `attention_mask` too: SD3 passes none.
    return Call(query, key, value, None, image, text)


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, text = inputs.hidden_states, inputs.encoder_hidden_states
    image_qkv = attn.to_q(states), attn.to_k(states), attn.to_v(states)
    text_qkv = None
    if text is not None:
        text_qkv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return _assemble(attn, inputs, image_qkv, text_qkv)


def _project_fused(attn: nn.Module, inputs: Inputs) -> Call:
    image_qkv = attn.to_qkv(inputs.hidden_states).chunk(3, dim=-1)
    text_qkv = None
    if inputs.encoder_hidden_states is not None:
        text_qkv = attn.to_added_qkv(inputs.encoder_hidden_states).chunk(3, dim=-1)
    return _assemble(attn, inputs, image_qkv, text_qkv)


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Any:
    states = output.flatten(2, 3).to(call.query.dtype)
    text = None
    if call.text is not None:
        states, text = states[:, : call.image.stop], states[:, call.image.stop :]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
    states = attn.to_out[1](attn.to_out[0](states))
    return states if text is None else (states, text)


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

    def model_class(self) -> type[nn.Module]:
        return SD3Transformer2DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, JointAttnProcessor2_0): Route(_project, _finish),
            (Attention, FusedJointAttnProcessor2_0): Route(_project_fused, _finish),
        }

    def place(self, name: str, module: nn.Module) -> tuple[SiteKind, str, int, int]:
        stack, layer, rest = split_name(name)
        return ("self", "attn2", layer, 0) if rest == "attn2" else ("joint", stack, layer, 0)

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
