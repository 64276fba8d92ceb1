"""HunyuanVideo 1.5: double blocks over [video, text], where text is two prompts and an image's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15Transformer3DModel,
)
from torch import nn

from diffctrl.families.base import (
    Call,
    ForwardInfo,
    Inputs,
    Route,
    Span,
    read_once,
    row_lengths,
    text_projections,
)
from diffctrl.families.hunyuan import HunyuanFamily, finish, token_grid, turned_projections
from diffctrl.families.parallel import video_plan
from diffctrl.families.plain import PLAIN


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    query, key, value = turned_projections(attn, inputs, inputs.hidden_states)
    video = query.shape[1]
    added = text_projections(attn, inputs.encoder_hidden_states)
    query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
    valid = inputs.attention_mask.bool()  # (B, T), valid text first
    # The stock processor masks padded queries too, in a map of all tokens by all tokens (12 GB for 5 seconds
    # of 720p). Nothing ever attends them, so that masking keys gives the same video.
    mask = torch.cat([valid.new_ones(valid.shape[0], video), valid], dim=1)[:, None, None, :]
    return Call(
        query,
        key,
        value,
        mask,
        image=Span(0, video),
        text=Span(video, query.shape[1]),
    )


class HunyuanVideo15Family(HunyuanFamily):
    """HunyuanVideo 1.5, text to video and image to video."""

    name = "hunyuan_video15"
    title = "HunyuanVideo 1.5"
    batched = (
        "hidden_states",
        "timestep",
        "timestep_r",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
        "attention_kwargs",
    )
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)

    def model_class(self) -> type[nn.Module]:
        return HunyuanVideo15Transformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, HunyuanVideo15AttnProcessor2_0): Route(_project, finish),
            (Attention, AttnProcessor2_0): PLAIN,
        }

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        return video_plan("transformer_blocks.0")

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, image = call["hidden_states"], call["image_embeds"]
        prompts = "encoder_hidden_states", "encoder_hidden_states_2"
        masks = "encoder_attention_mask", "encoder_attention_mask_2"
        # The model takes an image of zeros for none.
        tokens = 0 if read_once(image, lambda tensor: bool((tensor == 0).all())) else image.shape[1]
        valid = zip(*(row_lengths(call[name]) for name in masks), strict=True)
        return ForwardInfo(
            batch=latents.shape[0],
            grid=token_grid(model.config, latents),
            text_length=image.shape[1] + sum(call[name].shape[1] for name in prompts),
            text_valid=tuple(tokens + one + other for one, other in valid),
            timestep=call["timestep"],
            device=latents.device,
        )
