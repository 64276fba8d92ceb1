"""The general `Attention` of diffusers with its plain processors: UNets, text encoders in video models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffctrl.families.base import Call, Inputs, Route, Span, output_layer, to_heads
from diffctrl.families.rotary import normed


def kernel_mask(attn: nn.Module, mask: Tensor | None, length: int, batch: int) -> Tensor | None:
    """The mask as the stock processors prepare it: additive, (B, H, 1 or Sq, Sk)."""
    if mask is None:
        return None
    prepared = attn.prepare_attention_mask(mask, length, batch)
    return prepared.view(batch, attn.heads, -1, prepared.shape[-1])


def _prepared(attn: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """States (B, S, C) and context (B, T, C), through the norms before the projections."""
    states, context = inputs.hidden_states, inputs.encoder_hidden_states
    if attn.spatial_norm is not None:
        states = attn.spatial_norm(states, inputs.temb)
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
    if context is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    return states, context


def _call(attn: nn.Module, inputs: Inputs, qkv: tuple[Tensor, Tensor, Tensor], mask_length: int) -> Call:
    query, key, value = (to_heads(attn, part) for part in qkv)
    return Call(
        normed(attn.norm_q, query),
        normed(attn.norm_k, key),
        value,
        kernel_mask(attn, inputs.attention_mask, mask_length, query.shape[0]),
        image=Span(0, query.shape[1]),
        text=None,
        saved={"residual": inputs.hidden_states},
    )


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, context = _prepared(attn, inputs)
    context = states if context is None else context
    return _call(attn, inputs, (attn.to_q(states), attn.to_k(context), attn.to_v(context)), context.shape[1])


def _project_fused(attn: nn.Module, inputs: Inputs) -> Call:
    states, context = _prepared(attn, inputs)
    if context is None:
        query, key, value = attn.to_qkv(states).chunk(3, dim=-1)
    else:
        query = attn.to_q(states)
        key, value = attn.to_kv(context).chunk(2, dim=-1)
    return _call(attn, inputs, (query, key, value), key.shape[1])


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Tensor:
    residual = call.saved["residual"]
    states = output_layer(attn, output.flatten(2, 3).to(call.query.dtype))
    if residual.ndim == 4:
        states = states.transpose(-1, -2).reshape(residual.shape)
    if attn.residual_connection:
        states = states + residual
    return states / attn.rescale_output_factor


def _explicit(attn: nn.Module, call: Call, backend: Any) -> Tensor:
    """Softmax of a materialised map, which is what the oldest stock processor runs (and only that one).

    It honours `upcast_attention`, for which models are set to it.
    """
    batch = call.query.shape[0]
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (call.query, call.key, call.value))
    mask = None if call.attention_mask is None else call.attention_mask.flatten(0, 1)
    output = torch.bmm(attn.get_attention_scores(query, key, mask), value)
    return output.unflatten(0, (batch, -1)).transpose(1, 2)


PLAIN = Route(_project, _finish)
PLAIN_FUSED = Route(_project_fused, _finish)
PLAIN_EXPLICIT = Route(_project, _finish, dense=_explicit)
