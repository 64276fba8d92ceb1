"""Wan 2.1 and 2.2: self-attention (`attn1`), text cross-attention (`attn2`), an image branch for I2V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
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
    output_layer,
    split_name,
    to_heads,
)
from diffctrl.families.rotary import normed_and_rotated

# The text encoder's padded length, which the stock processor relies on to tell image from text tokens.
_TEXT_TOKENS = 512


def _projections(attn: nn.Module, states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, S, H, D), without their norms."""
    if not attn.fused_projections:
        query, key, value = attn.to_q(states), attn.to_k(context), attn.to_v(context)
    elif attn.is_cross_attention:
        query = attn.to_q(states)
        key, value = attn.to_kv(context).chunk(2, dim=-1)
    else:
        query, key, value = attn.to_qkv(states).chunk(3, dim=-1)
    return to_heads(attn, query), to_heads(attn, key), to_heads(attn, value)


def _image_branch(attn: nn.Module, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.fused_projections:
        key, value = attn.to_added_kv(tokens).chunk(2, dim=-1)
    else:
        key, value = attn.add_k_proj(tokens), attn.add_v_proj(tokens)
    key = normed_and_rotated(attn.norm_added_k, to_heads(attn, key), across_heads=True)
    return query, key, to_heads(attn, value)


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, context = inputs.hidden_states, inputs.encoder_hidden_states
    image_tokens = None
    if attn.add_k_proj is not None and context is not None:
        count = context.shape[1] - _TEXT_TOKENS
        image_tokens, context = context[:, :count], context[:, count:]
    query, key, value = _projections(attn, states, states if context is None else context)
    tables = inputs.image_rotary_emb or ()
    query, key = (
        normed_and_rotated(norm, part, *tables, across_heads=True, pairs=True)
        for norm, part in ((attn.norm_q, query), (attn.norm_k, key))
    )
    added = () if image_tokens is None else (_image_branch(attn, query, image_tokens),)
    return Call(
        query,
        key,
        value,
        inputs.attention_mask,
        image=Span(0, query.shape[1]),
        text=None,
        added=added,
        parallel=context is None,  # every device has all text and image tokens
    )


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Tensor:
    return output_layer(attn, output.flatten(2, 3).type_as(call.query))


class WanFamily(Family):
    """Wan 2.1 and Wan 2.2, text to video and image to video."""

    name = "wan"
    title = "Wan 2.1 / 2.2"
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "attention_kwargs",
    )
    # With a last frame besides the first one, the image embeddings of both follow one another.
    grouped = ("encoder_hidden_states_image",)
    cfg = "separate"
    stacks = ("blocks",)
    chains = ("blocks",)

    def model_class(self) -> type[nn.Module]:
        return WanTransformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {(WanAttention, WanAttnProcessor): Route(_project, _finish, rotary="rotary_emb")}

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, rest = split_name(name)
        return Place("self", stack, layer) if rest == "attn1" else Place("cross", "cross", layer)

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents = call["hidden_states"]
        frames, rows, columns = (
            size // patch for size, patch in zip(latents.shape[2:], model.config.patch_size, strict=True)
        )
        return ForwardInfo(
            batch=latents.shape[0],
            grid=(frames, rows, columns),
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=None,
            timestep=call["timestep"],
            device=latents.device,
        )
