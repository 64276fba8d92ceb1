"""Tiny, randomly initialised, real diffusers models of every family, with example inputs. Shared by all
tests.

Every structural feature that a family has to take apart is on: norm weights that are not one, queries and
keys large enough for attention to be far from uniform, sizes that divide nothing, two rows with different
prompts and, where the model takes masks, different prompt lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

BATCH = 2
TEXT = 7


@dataclass(frozen=True)
class ModelCase:
    """One tiny model and what is true of its example forward.

    Attributes:
        name: of the case; a family's plain case is called like the family.
        family: name of the family.
        build: makes the model.
        inputs: (model, generator) -> keyword arguments of a forward with BATCH rows.
        grid: (frames, rows, columns) of that forward.
        text_length, text_valid: text tokens of that forward.
        blocks: names of the lists of repeated blocks that a user compiles.
        prepare: changes the processors of the fresh model (fused projections, another stock processor).
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, torch.Generator], dict[str, Any]]
    grid: tuple[int, int, int]
    text_length: int
    blocks: tuple[str, ...]
    text_valid: tuple[int, ...] | None = None
    prepare: Callable[[nn.Module], None] | None = None


def _randn(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator)


def _mask(*lengths: int, total: int) -> Tensor:
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).to(torch.int64)


# --- SD3 ----------------------------------------------------------------------------------------------------


def _sd3(**config: Any) -> nn.Module:
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


def _sd3_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _randn(generator, BATCH, 4, 10, 14),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
        "pooled_projections": _randn(generator, BATCH, 20),
        "timestep": torch.tensor([500.0, 500.0]),
    }


# --- FLUX ---------------------------------------------------------------------------------------------------


def _flux(num_layers: int = 2, **config: Any) -> nn.Module:
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


def _flux_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    inputs = {
        "hidden_states": _randn(generator, BATCH, 35, 8),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
        "pooled_projections": _randn(generator, BATCH, 20),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": flux_ids(5, 7),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5, 3.5])
    return inputs


# --- UNets --------------------------------------------------------------------------------------------------


def _sd15(**config: Any) -> nn.Module:
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


def _sdxl() -> nn.Module:
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


def _sd15_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "sample": _randn(generator, BATCH, 4, 11, 7),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
    }


def _sdxl_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_sd15_inputs(model, generator),
        "encoder_attention_mask": _mask(TEXT, 4, total=TEXT),
        "added_cond_kwargs": {
            "text_embeds": _randn(generator, BATCH, 20),
            "time_ids": torch.tensor([[88.0, 56.0, 0.0, 0.0, 88.0, 56.0]] * BATCH),
        },
    }


# --- Wan ----------------------------------------------------------------------------------------------------


def _wan(**config: Any) -> nn.Module:
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


def _wan_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _randn(generator, BATCH, 4, 3, 10, 6),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 16),
    }


def _wan_i2v_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_wan_inputs(model, generator),
        # The stock processor takes the last 512 tokens for text.
        "encoder_hidden_states": _randn(generator, BATCH, 512, 16),
        "encoder_hidden_states_image": _randn(generator, BATCH, 5, 10),
    }


def _wan_ends_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    inputs = _wan_i2v_inputs(model, generator)
    inputs["encoder_hidden_states_image"] = _randn(generator, BATCH * 2, 5, 10)
    return inputs


def _wan_ti2v_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    inputs = _wan_inputs(model, generator)
    inputs["timestep"] = torch.tensor([0] * 15 + [500] * 30).expand(BATCH, -1).clone()
    return inputs


def _vace() -> nn.Module:
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


def _vace_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_wan_inputs(model, generator),
        "control_hidden_states": _randn(generator, BATCH, 6, 3, 10, 6),
    }


# --- HunyuanVideo -------------------------------------------------------------------------------------------


def _hunyuan(num_layers: int = 2, **config: Any) -> nn.Module:
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


def _hunyuan_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _randn(generator, BATCH, 4, 3, 10, 6),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
        "encoder_attention_mask": _mask(TEXT, 3, total=TEXT),
        "pooled_projections": _randn(generator, BATCH, 20),
        "guidance": torch.tensor([6000.0, 6000.0]) if model.config.guidance_embeds else None,
    }


def _hunyuan15() -> nn.Module:
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


def _hunyuan15_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _randn(generator, BATCH, 4, 3, 10, 6),
        "timestep": torch.tensor([500, 500], dtype=model.dtype),  # as the pipelines cast it
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
        "encoder_attention_mask": _mask(TEXT, 3, total=TEXT).float(),
        "encoder_hidden_states_2": _randn(generator, BATCH, 4, 20),
        "encoder_attention_mask_2": _mask(1, 3, total=4).float(),
        "image_embeds": torch.zeros(BATCH, 2, 12),
    }


def _hunyuan15_i2v_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {**_hunyuan15_inputs(model, generator), "image_embeds": _randn(generator, BATCH, 2, 12)}


# --- Mochi, CogVideoX, LTX ----------------------------------------------------------------------------------


def _mochi() -> nn.Module:
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


def _mochi_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _randn(generator, BATCH, 4, 3, 10, 6),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 16),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": _mask(TEXT, 3, total=TEXT),
    }


def _cogvideox(**config: Any) -> nn.Module:
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


def _cogvideox_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    frames = 3 if model.config.patch_size_t is None else 4
    inputs = {
        "hidden_states": _randn(generator, BATCH, frames, 4, 10, 6),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
        "timestep": torch.tensor([500, 500]),
    }
    if model.config.use_rotary_positional_embeddings:
        grid = (frames // (model.config.patch_size_t or 1), 5, 3)
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            16, None, grid_size=grid[1:], temporal_size=grid[0], grid_type="slice", max_size=grid[1:]
        )
    return inputs


def _ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )


def _ltx_inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _randn(generator, BATCH, 45, 8),
        "encoder_hidden_states": _randn(generator, BATCH, TEXT, 24),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": _mask(TEXT, 3, total=TEXT),
        "num_frames": 3,
        "height": 5,
        "width": 3,
        "rope_interpolation_scale": (0.8, 32.0, 32.0),
    }


# --- the table ----------------------------------------------------------------------------------------------

_I2V = {"image_dim": 10, "added_kv_proj_dim": 24}
_ROTARY = {"use_rotary_positional_embeddings": True}
_BLOCKS, _TWO_STACKS = ("transformer_blocks",), ("transformer_blocks", "single_transformer_blocks")


def _fuse(model: nn.Module) -> None:
    model.fuse_qkv_projections()


def _explicit(model: nn.Module) -> None:
    model.set_attn_processor(AttnProcessor())


def _case(
    name: str, family: str, build: Any, inputs: Any, grid: tuple[int, int, int], **rest: Any
) -> ModelCase:
    return ModelCase(name, family, build, inputs, grid, **{"text_length": TEXT, "blocks": _BLOCKS, **rest})


_IMAGE, _VIDEO, _UNET, _PADDED = (1, 5, 7), (3, 5, 3), (1, 11, 7), (TEXT, 3)
_UNET_BLOCKS = {"blocks": ("mid_block.attentions.0.transformer_blocks",)}

CASES: dict[str, ModelCase] = {
    case.name: case
    for case in (
        _case("sd3", "sd3", _sd3, _sd3_inputs, _IMAGE),
        _case(
            "sd3.5",
            "sd3",
            lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
            _sd3_inputs,
            _IMAGE,
        ),
        _case("sd3-fused", "sd3", lambda: _sd3(qk_norm="rms_norm"), _sd3_inputs, _IMAGE, prepare=_fuse),
        _case("flux", "flux", lambda: _flux(guidance_embeds=True), _flux_inputs, _IMAGE, blocks=_TWO_STACKS),
        _case("flux-fused", "flux", _flux, _flux_inputs, _IMAGE, blocks=_TWO_STACKS, prepare=_fuse),
        _case(
            "flux-single", "flux", lambda: _flux(num_layers=0), _flux_inputs, _IMAGE, blocks=_TWO_STACKS[1:]
        ),
        _case("unet", "unet", _sd15, _sd15_inputs, _UNET, **_UNET_BLOCKS),
        _case("sdxl", "unet", _sdxl, _sdxl_inputs, _UNET, text_valid=(TEXT, 4), **_UNET_BLOCKS),
        _case("unet-fused", "unet", _sd15, _sd15_inputs, _UNET, prepare=_fuse, **_UNET_BLOCKS),
        _case(
            "unet-explicit",
            "unet",
            lambda: _sd15(upcast_attention=True),
            _sd15_inputs,
            _UNET,
            prepare=_explicit,
            **_UNET_BLOCKS,
        ),
        _case("wan", "wan", _wan, _wan_inputs, _VIDEO, blocks=("blocks",)),
        _case("wan-ti2v", "wan", _wan, _wan_ti2v_inputs, _VIDEO, blocks=("blocks",)),
        _case(
            "wan-i2v",
            "wan",
            lambda: _wan(**_I2V),
            _wan_i2v_inputs,
            _VIDEO,
            text_length=512,
            blocks=("blocks",),
        ),
        _case(
            "wan-ends-fused",
            "wan",
            lambda: _wan(**_I2V, pos_embed_seq_len=10),
            _wan_ends_inputs,
            _VIDEO,
            text_length=512,
            blocks=("blocks",),
            prepare=_fuse,
        ),
        _case("wan_vace", "wan_vace", _vace, _vace_inputs, _VIDEO, blocks=("blocks",)),
        _case(
            "hunyuan_video",
            "hunyuan_video",
            _hunyuan,
            _hunyuan_inputs,
            _VIDEO,
            text_valid=_PADDED,
            blocks=_TWO_STACKS,
        ),
        _case(
            "hunyuan_video-i2v",
            "hunyuan_video",
            lambda: _hunyuan(image_condition_type="token_replace", guidance_embeds=False),
            _hunyuan_inputs,
            _VIDEO,
            text_valid=_PADDED,
            blocks=_TWO_STACKS,
        ),
        _case(
            "hunyuan_video-single",
            "hunyuan_video",
            lambda: _hunyuan(num_layers=0),
            _hunyuan_inputs,
            _VIDEO,
            text_valid=_PADDED,
            blocks=_TWO_STACKS[1:],
        ),
        _case(
            "hunyuan_video15",
            "hunyuan_video15",
            _hunyuan15,
            _hunyuan15_inputs,
            _VIDEO,
            text_length=13,
            text_valid=(8, 6),
        ),
        _case(
            "hunyuan_video15-i2v",
            "hunyuan_video15",
            _hunyuan15,
            _hunyuan15_i2v_inputs,
            _VIDEO,
            text_length=13,
            text_valid=(10, 8),
        ),
        _case("mochi", "mochi", _mochi, _mochi_inputs, _VIDEO, text_valid=_PADDED),
        _case("cogvideox", "cogvideox", _cogvideox, _cogvideox_inputs, _VIDEO),
        _case(
            "cogvideox-1.5",
            "cogvideox",
            lambda: _cogvideox(patch_size_t=2, patch_bias=False, **_ROTARY),
            _cogvideox_inputs,
            (2, 5, 3),
        ),
        _case(
            "cogvideox-fused",
            "cogvideox",
            lambda: _cogvideox(**_ROTARY),
            _cogvideox_inputs,
            _VIDEO,
            prepare=_fuse,
        ),
        _case("ltx", "ltx", _ltx, _ltx_inputs, _VIDEO, text_valid=_PADDED),
    )
}

FAMILY_CASES = tuple(dict.fromkeys(case.family for case in CASES.values()))


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model of the case, in evaluation mode; the same seed gives the same weights."""
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                leaf = path.split(".")[-2] if "." in path else ""
                if "norm" in leaf and parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
                elif leaf in ("to_q", "to_k", "add_q_proj", "add_k_proj"):
                    parameter.mul_(3.0)
                elif path == "pos_frequencies":  # Mochi's rotation, zero before training
                    parameter.normal_()
    model.eval()
    if dtype != torch.float32:
        model.to(dtype)
    if case.prepare is not None:
        case.prepare(model)
    return model


@cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One model of the case for tests that leave it as it was."""
    return build(name, dtype=dtype)


def example(name: str, model: nn.Module | None = None, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of a forward with BATCH rows, in the dtype of the model."""
    model = shared(name) if model is None else model
    inputs = CASES[name].inputs(model, torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    keep = ("timestep", "img_ids", "txt_ids", "time_ids", "guidance", "image_rotary_emb")

    def cast(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: cast(inner, item) for inner, item in value.items()}
        if isinstance(value, Tensor) and value.is_floating_point() and key not in keep:
            return value.to(dtype)
        return value

    return {key: cast(key, value) for key, value in inputs.items()}


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The prediction of one forward, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def rows_of(inputs: Mapping[str, Any], *rows: int) -> dict[str, Any]:
    """The forward of some of the BATCH rows, in this order; a row may come more than once."""

    def pick(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: pick(inner, item) for inner, item in value.items()}
        size = 2 * BATCH if key == "encoder_hidden_states_image" else BATCH  # two images a row, or one
        if not isinstance(value, Tensor) or key in ("img_ids", "txt_ids") or value.ndim == 0:
            return value
        if value.shape[0] == size == 2 * BATCH:
            return value.unflatten(0, (BATCH, 2))[list(rows)].flatten(0, 1)
        return value[list(rows)] if value.shape[0] == BATCH else value

    return {key: pick(key, value) for key, value in inputs.items()}


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []
    )


class FixedScheduler:
    """Stands where a pipeline's scheduler does: the test moves it."""

    def __init__(self, steps: int) -> None:
        self.timesteps = torch.linspace(1000, 1000 / steps, steps)
        self.step_index: int | None = None
        self.begin_index: int | None = None
