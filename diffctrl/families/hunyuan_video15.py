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
    read_once,
    rotated,
    row_lengths,
    split_name,
    text_projections,
)
from diffctrl.families.parallel import video_plan
from diffctrl.families.plain import PLAIN


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    query, key, value = projections(attn, inputs.hidden_states)
    video = query.shape[1]
    if inputs.image_rotary_emb is not None:
        cos, sin = (part[None, :, None, :].to(query.device) for part in inputs.image_rotary_emb)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
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


def _finish(attn: nn.Module, call: Call, output: Tensor) -> tuple[Tensor, Tensor]:
    states = output.flatten(2, 3).to(call.query.dtype)
    video, text = states[:, : call.image.stop], states[:, call.image.stop :]
    return output_layer(attn, video), text if attn.to_add_out is None else attn.to_add_out(text)


class HunyuanVideo15Family(Family):
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
    cfg = "separate"
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)
    block_streams = ("hidden_states", "encoder_hidden_states")
    text_side = "last"

    def model_class(self) -> type[nn.Module]:
        return HunyuanVideo15Transformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, HunyuanVideo15AttnProcessor2_0): Route(_project, _finish),
            (Attention, AttnProcessor2_0): PLAIN,
        }

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        if name.startswith("context_embedder."):
            return Place("text", "refiner")
        stack, layer, _ = split_name(name)
        return Place("joint", stack, layer)

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        return video_plan("transformer_blocks.0")

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, config, image = call["hidden_states"], model.config, call["image_embeds"]
        frames, rows, columns = latents.shape[2:]
        prompts = "encoder_hidden_states", "encoder_hidden_states_2"
        masks = "encoder_attention_mask", "encoder_attention_mask_2"
        # The model takes an image of zeros for none.
        tokens = 0 if read_once(image, lambda tensor: bool((tensor == 0).all())) else image.shape[1]
        valid = zip(*(row_lengths(call[name]) for name in masks), strict=True)
        return ForwardInfo(
            batch=latents.shape[0],
            grid=(frames // config.patch_size_t, rows // config.patch_size, columns // config.patch_size),
            text_length=image.shape[1] + sum(call[name].shape[1] for name in prompts),
            text_valid=tuple(tokens + one + other for one, other in valid),
            timestep=call["timestep"],
            device=latents.device,
        )
