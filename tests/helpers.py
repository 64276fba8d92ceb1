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
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tests.image_models import (
    flux,
    flux_inputs,
    sd3,
    sd3_inputs,
    sd15,
    sd15_inputs,
    sdxl,
    sdxl_inputs,
)
from tests.model_inputs import BATCH, TEXT
from tests.video_models import (
    cogvideox,
    cogvideox_inputs,
    hunyuan,
    hunyuan15,
    hunyuan15_i2v_inputs,
    hunyuan15_inputs,
    hunyuan_inputs,
    ltx,
    ltx_inputs,
    mochi,
    mochi_inputs,
    vace,
    vace_inputs,
    wan,
    wan_ends_inputs,
    wan_i2v_inputs,
    wan_inputs,
    wan_ti2v_inputs,
)


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
        _case("sd3", "sd3", sd3, sd3_inputs, _IMAGE),
        _case(
            "sd3.5",
            "sd3",
            lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
            sd3_inputs,
            _IMAGE,
        ),
        _case("sd3-fused", "sd3", lambda: sd3(qk_norm="rms_norm"), sd3_inputs, _IMAGE, prepare=_fuse),
        _case("flux", "flux", lambda: flux(guidance_embeds=True), flux_inputs, _IMAGE, blocks=_TWO_STACKS),
        _case("flux-fused", "flux", flux, flux_inputs, _IMAGE, blocks=_TWO_STACKS, prepare=_fuse),
        _case("flux-single", "flux", lambda: flux(num_layers=0), flux_inputs, _IMAGE, blocks=_TWO_STACKS[1:]),
        _case("unet", "unet", sd15, sd15_inputs, _UNET, **_UNET_BLOCKS),
        _case("sdxl", "unet", sdxl, sdxl_inputs, _UNET, text_valid=(TEXT, 4), **_UNET_BLOCKS),
        _case("unet-fused", "unet", sd15, sd15_inputs, _UNET, prepare=_fuse, **_UNET_BLOCKS),
        _case(
            "unet-explicit",
            "unet",
            lambda: sd15(upcast_attention=True),
            sd15_inputs,
            _UNET,
            prepare=_explicit,
            **_UNET_BLOCKS,
        ),
        _case("wan", "wan", wan, wan_inputs, _VIDEO, blocks=("blocks",)),
        _case("wan-ti2v", "wan", wan, wan_ti2v_inputs, _VIDEO, blocks=("blocks",)),
        _case(
            "wan-i2v",
            "wan",
            lambda: wan(**_I2V),
            wan_i2v_inputs,
            _VIDEO,
            text_length=512,
            blocks=("blocks",),
        ),
        _case(
            "wan-ends-fused",
            "wan",
            lambda: wan(**_I2V, pos_embed_seq_len=10),
            wan_ends_inputs,
            _VIDEO,
            text_length=512,
            blocks=("blocks",),
            prepare=_fuse,
        ),
        _case("wan_vace", "wan_vace", vace, vace_inputs, _VIDEO, blocks=("blocks",)),
        _case(
            "hunyuan_video",
            "hunyuan_video",
            hunyuan,
            hunyuan_inputs,
            _VIDEO,
            text_valid=_PADDED,
            blocks=_TWO_STACKS,
        ),
        _case(
            "hunyuan_video-i2v",
            "hunyuan_video",
            lambda: hunyuan(image_condition_type="token_replace", guidance_embeds=False),
            hunyuan_inputs,
            _VIDEO,
            text_valid=_PADDED,
            blocks=_TWO_STACKS,
        ),
        _case(
            "hunyuan_video-single",
            "hunyuan_video",
            lambda: hunyuan(num_layers=0),
            hunyuan_inputs,
            _VIDEO,
            text_valid=_PADDED,
            blocks=_TWO_STACKS[1:],
        ),
        _case(
            "hunyuan_video15",
            "hunyuan_video15",
            hunyuan15,
            hunyuan15_inputs,
            _VIDEO,
            text_length=13,
            text_valid=(8, 6),
        ),
        _case(
            "hunyuan_video15-i2v",
            "hunyuan_video15",
            hunyuan15,
            hunyuan15_i2v_inputs,
            _VIDEO,
            text_length=13,
            text_valid=(10, 8),
        ),
        _case("mochi", "mochi", mochi, mochi_inputs, _VIDEO, text_valid=_PADDED),
        _case("cogvideox", "cogvideox", cogvideox, cogvideox_inputs, _VIDEO),
        _case(
            "cogvideox-1.5",
            "cogvideox",
            lambda: cogvideox(patch_size_t=2, patch_bias=False, **_ROTARY),
            cogvideox_inputs,
            (2, 5, 3),
        ),
        _case(
            "cogvideox-fused",
            "cogvideox",
            lambda: cogvideox(**_ROTARY),
            cogvideox_inputs,
            _VIDEO,
            prepare=_fuse,
        ),
        _case("ltx", "ltx", ltx, ltx_inputs, _VIDEO, text_valid=_PADDED),
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
