"""The UNet of Stable Diffusion 1.x, 2.x and XL: self-attention and text cross-attention at several levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from diffctrl.families.base import Family, ForwardInfo, Place, Route, row_lengths
from diffctrl.families.plain import PLAIN, PLAIN_EXPLICIT, PLAIN_FUSED


class UNetFamily(Family):
    """Stable Diffusion 1.x / 2.x and Stable Diffusion XL."""

    name = "unet"
    title = "Stable Diffusion / SDXL (UNet)"
    batched = (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
    )
    cfg = "batched"
    stacks = ("down", "mid", "up")

    def model_class(self) -> type[nn.Module]:
        return UNet2DConditionModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, AttnProcessor2_0): PLAIN,
            (Attention, FusedAttnProcessor2_0): PLAIN_FUSED,
            (Attention, AttnProcessor): PLAIN_EXPLICIT,
        }

    def adapters(self) -> frozenset[type]:
        return frozenset({IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0})

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        side, index, _ = name.split(".", 2)
        deepest = len(model.config.down_block_types) - 1
        if side == "mid_block":
            stack, level = "mid", deepest
        elif side == "down_blocks":
            stack, level = "down", int(index)  # a block attends before it halves
        else:
            stack, level = "up", deepest - int(index)  # and before it doubles
        kind = "cross" if module.is_cross_attention else "self"
        return Place(kind, stack, level=level)

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        sample, text = call["sample"], call["encoder_hidden_states"]
        mask = call.get("encoder_attention_mask")
        rows, columns = sample.shape[-2:]
        # `site_grid` rounds up, as a stride-2 convolution with padding 1 does.
        known = model.config.downsample_padding == 1
        return ForwardInfo(
            batch=sample.shape[0],
            grid=(1, rows, columns) if known else None,
            text_length=None if text is None else text.shape[1],
            text_valid=None if mask is None else row_lengths(mask),
            timestep=call["timestep"],
            device=sample.device,
        )
