"""Tiny models of the video families, and inputs of a forward of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from tests.model_inputs import BATCH, TEXT, lengths_mask, randn

# --- Wan ----------------------------------------------------------------------------------------------------


def wan(**config: Any) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        **config,
    )


def wan_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": randn(generator, BATCH, 4, 3, 10, 6),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 16),
    }


def wan_i2v_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        **wan_inputs(model, generator),
        # The stock processor takes the last 512 tokens for text.
        "encoder_hidden_states": randn(generator, BATCH, 512, 16),
        "encoder_hidden_states_image": randn(generator, BATCH, 5, 10),
    }


def wan_ends_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    inputs = wan_i2v_inputs(model, generator)
    inputs["encoder_hidden_states_image"] = randn(generator, BATCH * 2, 5, 10)
    return inputs


def wan_ti2v_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    inputs = wan_inputs(model, generator)
    inputs["timestep"] = torch.tensor([0] * 15 + [500] * 30).expand(BATCH, -1).clone()
    return inputs


def vace() -> nn.Module:
    return WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        vace_layers=[0, 1],
        vace_in_channels=6,
    )


def vace_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        **wan_inputs(model, generator),
        "control_hidden_states": randn(generator, BATCH, 6, 3, 10, 6),
    }


# --- HunyuanVideo -------------------------------------------------------------------------------------------


def hunyuan(num_layers: int = 2, **config: Any) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=num_layers,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        **config,
    )


def hunyuan_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": randn(generator, BATCH, 4, 3, 10, 6),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
        "encoder_attention_mask": lengths_mask(TEXT, 3, total=TEXT),
        "pooled_projections": randn(generator, BATCH, 20),
        "guidance": torch.tensor([6000.0, 6000.0]) if model.config.guidance_embeds else None,
    }


def hunyuan15() -> nn.Module:
    return HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=24,
        text_embed_2_dim=20,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
    )


def hunyuan15_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": randn(generator, BATCH, 4, 3, 10, 6),
        "timestep": torch.tensor([500, 500], dtype=model.dtype),  # as the pipelines cast it
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
        "encoder_attention_mask": lengths_mask(TEXT, 3, total=TEXT).float(),
        "encoder_hidden_states_2": randn(generator, BATCH, 4, 20),
        "encoder_attention_mask_2": lengths_mask(1, 3, total=4).float(),
        "image_embeds": torch.zeros(BATCH, 2, 12),
    }


def hunyuan15_i2v_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {**hunyuan15_inputs(model, generator), "image_embeds": randn(generator, BATCH, 2, 12)}


# --- Mochi, CogVideoX, LTX ----------------------------------------------------------------------------------


def mochi() -> nn.Module:
    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=24,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
    )


def mochi_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": randn(generator, BATCH, 4, 3, 10, 6),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 16),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": lengths_mask(TEXT, 3, total=TEXT),
    }


def cogvideox(**config: Any) -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=6,
        sample_height=10,
        sample_frames=9,
        max_text_seq_length=TEXT,
        **config,
    )


def cogvideox_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    frames = 3 if model.config.patch_size_t is None else 4
    inputs = {
        "hidden_states": randn(generator, BATCH, frames, 4, 10, 6),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
        "timestep": torch.tensor([500, 500]),
    }
    if model.config.use_rotary_positional_embeddings:
        grid = (frames // (model.config.patch_size_t or 1), 5, 3)
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            16, None, grid_size=grid[1:], temporal_size=grid[0], grid_type="slice", max_size=grid[1:]
        )
    return inputs


def ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )


def ltx_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": randn(generator, BATCH, 45, 8),
        "encoder_hidden_states": randn(generator, BATCH, TEXT, 24),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": lengths_mask(TEXT, 3, total=TEXT),
        "num_frames": 3,
        "height": 5,
        "width": 3,
        "rope_interpolation_scale": (0.8, 32.0, 32.0),
    }
