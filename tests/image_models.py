"""Tiny models of the picture families, and inputs of a forward of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from tests.model_inputs import BATCH, TEXT, lengths_mask, randn

# --- SD3 ----------------------------------------------------------------------------------------------------


def sd3(**config: Any) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=12,
        **config,
    )


def sd3_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": randn(generator, BATCH, 4, 10, 14),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
        "pooled_projections": randn(generator, BATCH, 20),
        "timestep": torch.tensor([500.0, 500.0]),
    }


# --- FLUX ---------------------------------------------------------------------------------------------------


def flux(num_layers: int = 2, **config: Any) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=num_layers,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        **config,
    )


def flux_ids(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3) position ids as the pipelines make them."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


def flux_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    inputs = {
        "hidden_states": randn(generator, BATCH, 35, 8),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
        "pooled_projections": randn(generator, BATCH, 20),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": flux_ids(5, 7),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5, 3.5])
    return inputs


# --- UNets --------------------------------------------------------------------------------------------------


def sd15(**config: Any) -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=8,
        **config,
    )


def sdxl() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )


def sd15_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "sample": randn(generator, BATCH, 4, 11, 7),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
    }


def sdxl_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        **sd15_inputs(model, generator),
        "encoder_attention_mask": lengths_mask(TEXT, 4, total=TEXT),
        "added_cond_kwargs": {
            "text_embeds": randn(generator, BATCH, 20),
            "time_ids": torch.tensor([[88.0, 56.0, 0.0, 0.0, 88.0, 56.0]] * BATCH),
        },
    }
