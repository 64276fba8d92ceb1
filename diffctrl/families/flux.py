"""FLUX.1: double blocks of two streams, then single blocks where one tensor holds both. Text first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from diffctrl.families.base import (
    Call,
    Family,
    ForwardInfo,
    Inputs,
    Place,
    Route,
    Span,
    lattice,
    output_layer,
    read_once,
    split_name,
)
from diffctrl.families.rotary import normed_and_rotated


def _tables(inputs: Inputs) -> list[Tensor]:
    """Cosines and sines (1, S, 1, D) of all tokens, text first; none where the model turns nothing."""
    device = inputs.hidden_states.device
    return [part[None, :, None, :].to(device) for part in inputs.image_rotary_emb or ()]


def _projections(attn: nn.Module, states: Tensor, *tables: Tensor) -> list[Tensor]:
    if attn.fused_projections:
        parts = attn.to_qkv(states).chunk(3, dim=-1)
    else:
        parts = attn.to_q(states), attn.to_k(states), attn.to_v(states)
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return [
        normed_and_rotated(attn.norm_q, query, *tables),
        normed_and_rotated(attn.norm_k, key, *tables),
        value,
    ]


def _text_projections(attn: nn.Module, text: Tensor, *tables: Tensor) -> list[Tensor]:
    if attn.fused_projections:
        parts = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        parts = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return [
        normed_and_rotated(attn.norm_added_q, query, *tables),
        normed_and_rotated(attn.norm_added_k, key, *tables),
        value,
    ]


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, text, tables = inputs.hidden_states, inputs.encoder_hidden_states, _tables(inputs)
    split = text is not None
    text_length = text.shape[1] if split else inputs.text_length
    if split:
        text_streams = _text_projections(attn, text, *(table[:, :text_length] for table in tables))
        streams = _projections(attn, states, *(table[:, text_length:] for table in tables))
        streams = [torch.cat(pair, dim=1) for pair in zip(text_streams, streams, strict=True)]
    else:
        streams = _projections(attn, states, *tables)
    query, key, value = streams
    return Call(
        query,
        key,
        value,
        inputs.attention_mask,
        image=Span(text_length, query.shape[1]),
        text=Span(0, text_length),
        saved={"split": split},
    )


def _project_adapted(attn: nn.Module, inputs: Inputs) -> Call:
    """The call of an IP-Adapter's processor, with the image's attention to each image prompt beside it."""
    call, adapter = _project(attn, inputs), inputs.adapter
    if not call.saved["split"] or inputs.ip_hidden_states is None:
        return call
    query = _projections(attn, inputs.hidden_states)[0]  # without rotary embedding
    branches = [
        # An adapter may get several images: (B, images, tokens, C).
        (scale, query, *(layer(prompt).flatten(1, -2).unflatten(-1, (attn.heads, -1)) for layer in layers))
        for prompt, scale, *layers in zip(
            inputs.ip_hidden_states, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, strict=False
        )
    ]
    return replace(call, saved={"split": True, "branches": branches, "adapter": adapter})


def _finish_adapted(attn: nn.Module, call: Call, output: Tensor) -> Any:
    result = _finish(attn, call, output)
    if "branches" not in call.saved:
        return result
    image, text = result
    added, adapter = torch.zeros_like(image), call.saved["adapter"]
    for scale, query, key, value in call.saved["branches"]:
        states = dispatch_attention_fn(query, key, value, backend=adapter._attention_backend,
                                       parallel_config=adapter._parallel_config)  # fmt: skip
        added = added + scale * states.flatten(2, 3).to(query.dtype)
    return image, text, added  # the block adds it after its MLP


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Any:
    states = output.flatten(2, 3).to(call.query.dtype)
    if not call.saved["split"]:
        return states  # a single block projects attention and MLP together
    text, image = states[:, : call.image.start], states[:, call.image.start :]
    return output_layer(attn, image.contiguous()), attn.to_add_out(text.contiguous())


class FluxFamily(Family):
    """FLUX.1."""

    name = "flux"
    title = "FLUX.1"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )
    cfg = "separate"
    stacks = ("transformer_blocks", "single_transformer_blocks")
    chains = ("transformer_blocks", "single_transformer_blocks")
    block_streams = ("encoder_hidden_states", "hidden_states")
    text_side = "first"

    def model_class(self) -> type[nn.Module]:
        return FluxTransformer2DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (FluxAttention, FluxAttnProcessor): Route(_project, _finish),
            (FluxAttention, FluxIPAdapterAttnProcessor): Route(
                _project_adapted, _finish_adapted, adapts=True
            ),
        }

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, _ = split_name(name)
        return Place("joint", stack, layer)

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, ids = call["hidden_states"], call["img_ids"]
        return ForwardInfo(
            batch=latents.shape[0],
            # Latents come packed to (B, S, C): only the position ids say what S is made of.
            grid=read_once(ids, lambda tensor: lattice(tensor[0] if tensor.ndim == 3 else tensor)),
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=None,
            timestep=call["timestep"] * 1000,  # pipelines divide it
            device=latents.device,
        )
