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
from torch import nn

from diffctrl.families.base import (
    Call,
    ForwardInfo,
    Inputs,
    Route,
    Span,
    row_lengths,
    text_projections,
)
from diffctrl.families.hunyuan import HunyuanFamily, finish, token_grid, turned_projections
from diffctrl.families.parallel import video_plan
from diffctrl.families.plain import PLAIN


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, text = inputs.hidden_states, inputs.encoder_hidden_states
    video = states.shape[1]
    shared = attn.add_q_proj is None  # a single block: one projection for both streams
    both = torch.cat([states, text], dim=1) if shared else states
    query, key, value = turned_projections(attn, inputs, both)
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


class HunyuanVideoFamily(HunyuanFamily):
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
    stacks = ("transformer_blocks", "single_transformer_blocks")
    chains = ("transformer_blocks", "single_transformer_blocks")

    def model_class(self) -> type[nn.Module]:
        return HunyuanVideoTransformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, HunyuanVideoAttnProcessor2_0): Route(_project, finish),
            (Attention, AttnProcessor2_0): PLAIN,
        }

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
        latents = call["hidden_states"]
        return ForwardInfo(
            batch=latents.shape[0],
            grid=token_grid(model.config, latents),
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=row_lengths(call["encoder_attention_mask"]),
            timestep=call["timestep"],
            device=latents.device,
        )
