"""LTX-Video: self-attention (`attn1`), text cross-attention (`attn2`), norms and rotation across heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoTransformer3DModel,
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
    row_lengths,
    split_name,
    to_heads,
)
from diffctrl.families.plain import kernel_mask
from diffctrl.families.rotary import normed_and_rotated


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, context = inputs.hidden_states, inputs.encoder_hidden_states
    context = states if context is None else context
    projected = attn.to_q(states), attn.to_k(context), attn.to_v(context)
    query, key, value = (to_heads(attn, part) for part in projected)
    tables = [to_heads(attn, part) for part in inputs.image_rotary_emb or ()]  # across heads, as the norms
    query, key = (
        normed_and_rotated(norm, part, *tables, across_heads=True)
        for norm, part in ((attn.norm_q, query), (attn.norm_k, key))
    )
    return Call(
        query,
        key,
        value,
        kernel_mask(attn, inputs.attention_mask, context.shape[1], query.shape[0]),
        image=Span(0, query.shape[1]),
        text=None,
    )


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Tensor:
    return output_layer(attn, output.flatten(2, 3).to(call.query.dtype))


class LTXFamily(Family):
    """LTX-Video."""

    name = "ltx"
    title = "LTX-Video"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
        "video_coords",
        "attention_kwargs",
    )
    cfg = "batched"
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)

    def model_class(self) -> type[nn.Module]:
        return LTXVideoTransformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {(LTXAttention, LTXVideoAttnProcessor): Route(_project, _finish)}

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, rest = split_name(name)
        return Place("self", stack, layer) if rest == "attn1" else Place("cross", "cross", layer)

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, mask = call["hidden_states"], call["encoder_attention_mask"]
        # Latents come packed to (B, S, C), and some pipelines give coordinates instead of sizes.
        coordinates = call.get("video_coords")
        sizes: Any = tuple(call.get(name) for name in ("num_frames", "height", "width"))
        if coordinates is not None:
            sizes = read_once(coordinates, lambda tensor: lattice(tensor[0].T))
        return ForwardInfo(
            batch=latents.shape[0],
            grid=None if sizes is None or None in sizes else sizes,
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=row_lengths(mask) if mask is not None and mask.ndim == 2 else None,
            timestep=call["timestep"],
            device=latents.device,
        )
