"""HunyuanVideo: double and single blocks over [video, text], and a refiner of the text tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
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
    projections,
    rotated,
    row_lengths,
    split_name,
    text_projections,
)
from diffctrl.families.parallel import video_plan
from diffctrl.families.plain import PLAIN


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, text = inputs.hidden_states, inputs.encoder_hidden_states
    video = states.shape[1]
    shared = attn.add_q_proj is None  # a single block: one projection for both streams
    query, key, value = projections(attn, torch.cat([states, text], dim=1) if shared else states)
    if inputs.image_rotary_emb is not None:
        cos, sin = (part[None, :, None, :].to(query.device) for part in inputs.image_rotary_emb)
        query, key = (
            torch.cat([rotated(part[:, :video], cos, sin), part[:, video:]], dim=1) for part in (query, key)
        )
    if not shared:
        added = text_projections(attn, text)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
    return Call(
        query,
        key,
        value,
        inputs.attention_mask,
        image=Span(0, video),
        text=Span(video, query.shape[1]),
    )


def _finish(attn: nn.Module, call: Call, output: Tensor) -> tuple[Tensor, Tensor]:
    states = output.flatten(2, 3).to(call.query.dtype)
    video, text = states[:, : call.image.stop], states[:, call.image.stop :]
    if attn.to_out is not None:
        video = output_layer(attn, video)
    return video, text if attn.to_add_out is None else attn.to_add_out(text)


class HunyuanVideoFamily(Family):
    """HunyuanVideo."""

    name = "hunyuan_video"
    title = "HunyuanVideo"
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "guidance",
        "attention_kwargs",
    )
    cfg = "separate"
    stacks = ("transformer_blocks", "single_transformer_blocks")
    chains = ("transformer_blocks", "single_transformer_blocks")
    block_streams = ("hidden_states", "encoder_hidden_states")
    text_side = "last"

    def model_class(self) -> type[nn.Module]:
        return HunyuanVideoTransformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, HunyuanVideoAttnProcessor2_0): Route(_project, _finish),
            (Attention, AttnProcessor2_0): PLAIN,
        }

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        if name.startswith("context_embedder."):
            return Place("text", "refiner")
        stack, layer, _ = split_name(name)
        return Place("joint", stack, layer)

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        if model.config.image_condition_type == "token_replace":
            raise TypeError(
                "HunyuanVideo models that replace the first frame's tokens count them from the start of the "
                "sequence in every block, which only the first device has; run them on one device"
            )
        return video_plan(
            "transformer_blocks.0" if model.config.num_layers else "single_transformer_blocks.0"
        )

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, config = call["hidden_states"], model.config
        frames, rows, columns = latents.shape[2:]
        return ForwardInfo(
            batch=latents.shape[0],
            grid=(frames // config.patch_size_t, rows // config.patch_size, columns // config.patch_size),
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=row_lengths(call["encoder_attention_mask"]),
            timestep=call["timestep"],
            device=latents.device,
        )
