"""The ready pipelines: stock where every step is dense, `diffctrl.apply` by hand otherwise. Estimates."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

import diffctrl
from diffctrl.pipelines import (
    CogVideoXRadialPipeline,
    HunyuanVideoRadialPipeline,
    LTXRadialPipeline,
    MochiRadialPipeline,
    WanImageToVideoRadialPipeline,
    WanRadialPipeline,
)
from diffctrl.processors import RadialAttnProcessor, RadialConfig
from diffctrl.processors.radial_estimate import subject_of
from tests.helpers import TEXT, build
from tests.pipelines import cogvideox_pipeline, generate, wan_pipeline

torch.set_num_threads(1)

# Sparse from the second step on, in every block and between neighbouring frames.
SPARSE: dict[str, Any] = {
    "block": 4, "adjacent": "decay", "sink": False,
    "dense_steps": 1, "dense_last_steps": 0, "dense_blocks": 0,
}  # fmt: skip


def _randn(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _none(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def _texts(width: int, **more: Any) -> dict[str, Any]:
    """A positive and a negative prompt of other lengths."""
    mask, negative = torch.ones(1, TEXT, dtype=torch.int64), torch.ones(1, TEXT, dtype=torch.int64)
    mask[:, 5:], negative[:, 3:] = 0, 0
    return {
        "prompt_embeds": _randn(3, 1, TEXT, width),
        "negative_prompt_embeds": _randn(4, 1, TEXT, width),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": negative,
        **more,
    }


def _hunyuan() -> tuple[Any, dict[str, Any]]:
    parts = _none("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = HunyuanVideoPipeline(
        transformer=build("hunyuan_video"), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **parts
    )
    pooled = {"pooled_prompt_embeds": _randn(5, 1, 20), "negative_pooled_prompt_embeds": _randn(6, 1, 20)}
    return pipe, {**_texts(24, **pooled), "true_cfg_scale": 3.0, "height": 80, "width": 48, "num_frames": 9}


def _mochi() -> tuple[Any, dict[str, Any]]:
    parts = _none("vae", "text_encoder", "tokenizer")
    pipe = MochiPipeline(
        transformer=build("mochi"), scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), **parts
    )
    return pipe, {**_texts(16), "guidance_scale": 3.0, "height": 80, "width": 48, "num_frames": 13}


def _ltx() -> tuple[Any, dict[str, Any]]:
    parts = _none("vae", "text_encoder", "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = LTXPipeline(transformer=build("ltx"), scheduler=scheduler, **parts)
    return pipe, {**_texts(24), "guidance_scale": 3.0, "height": 160, "width": 96, "num_frames": 17}


def _wan() -> tuple[Any, dict[str, Any]]:
    return wan_pipeline(), {"guidance_scale": 3.0}


def _wan_two() -> tuple[Any, dict[str, Any]]:
    return wan_pipeline(two=True), {"guidance_scale": 3.0}


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    return cogvideox_pipeline(), {"guidance_scale": 3.0}


def _wan_image() -> tuple[Any, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval()
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    parts = _none("tokenizer", "text_encoder", "image_encoder", "image_processor")
    pipe = WanImageToVideoPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
    texts = {"prompt_embeds": _randn(3, 1, TEXT, 16), "negative_prompt_embeds": _randn(4, 1, TEXT, 16)}
    image = torch.rand(1, 3, 80, 48, generator=torch.Generator().manual_seed(7))
    return pipe, {**texts, "image": image, "guidance_scale": 3.0, "height": 80, "width": 48, "num_frames": 9}


READY: dict[str, tuple[Any, Callable[[], tuple[Any, dict[str, Any]]]]] = {
    "wan": (WanRadialPipeline, _wan),
    "wan-2.2": (WanRadialPipeline, _wan_two),
    "wan-image": (WanImageToVideoRadialPipeline, _wan_image),
    "hunyuan_video": (HunyuanVideoRadialPipeline, _hunyuan),
    "mochi": (MochiRadialPipeline, _mochi),
    "cogvideox": (CogVideoXRadialPipeline, _cogvideox),
    "ltx": (LTXRadialPipeline, _ltx),
}


def latents(pipe: Any, call: dict[str, Any], **settings: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    if "prompt_embeds" not in call:
        return generate(pipe, steps=3, **call, **settings)
    return pipe(
        **call,
        **settings,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
    )[0]


@pytest.mark.parametrize("name", READY)
def test_a_ready_pipeline_is_stock_when_dense_and_apply_by_hand_else(name: str) -> None:
    ready, make = READY[name]
    stock, call = make()
    more = {k: v for k, v in stock.config.items() if k in ("boundary_ratio", "expand_timesteps")}
    pipe = ready(**stock.components, **more)
    plain = latents(stock, call)
    assert torch.equal(latents(pipe, call, dense_fraction=1.0), plain)
    with diffctrl.apply(stock, RadialAttnProcessor(**SPARSE)) as handle:
        wanted = latents(stock, call)
        stats = list(handle.stats().values())
    assert torch.equal(latents(pipe, call, **SPARSE), wanted)
    assert not torch.equal(wanted, plain)
    assert torch.isfinite(wanted).all()
    # The first step is dense: one forward, or two where classifier-free guidance takes two.
    passes = 2 if name.startswith(("wan", "hunyuan")) else 1
    assert sum(one["forwards"] for one in stats) == 3 * passes
    assert sum(one["masked_forwards"] for one in stats) == 2 * passes
    assert not any(hasattr(module, "diffctrl_site") for module in pipe.transformer.modules())


@pytest.mark.parametrize(("two", "sparse"), [(False, 2), (True, 1)])
def test_experts_share_one_run_and_have_a_preset_of_their_own(two: bool, sparse: int) -> None:
    """Of four steps the last is dense, and before it 24 % of them, or 27.5 % where two models take turns."""
    pipe = wan_pipeline(two=two)
    with diffctrl.apply(pipe, RadialAttnProcessor(block=4)) as handle:
        generate(pipe, steps=4, guidance_scale=1.0)
        stats = list(handle.stats().values())
    assert len(stats) == 1 + two
    assert sum(one["forwards"] for one in stats) == 4
    assert sum(one["masked_forwards"] for one in stats) == sparse


def test_the_signature_names_the_stock_arguments_and_the_settings() -> None:
    settings = [field.name for field in fields(RadialConfig)]
    for ready, _ in READY.values():
        names = list(inspect.signature(ready.__call__).parameters)
        assert [name for name in names if name not in settings] == list(
            inspect.signature(ready.stock_class.__call__).parameters
        )
        assert [name for name in names if name in settings] == settings


def test_an_installed_processor_stays_and_a_call_may_change_it() -> None:
    pipe = WanRadialPipeline(**wan_pipeline().components)
    usual = latents(pipe, {"guidance_scale": 1.0}, **SPARSE)
    pipe.set_attn_processor(RadialAttnProcessor(**SPARSE))
    assert torch.equal(latents(pipe, {"guidance_scale": 1.0}), usual)
    other = latents(pipe, {"guidance_scale": 1.0}, dense_steps=2)
    assert not torch.equal(other, usual)
    assert pipe.control.controls[0].config == RadialConfig(**SPARSE)
    pipe.set_attn_processor(None)
    with pytest.raises(ValueError, match="decay_factor=3.0 is not in"):
        latents(pipe, {"guidance_scale": 1.0}, decay_factor=3.0)


# --- estimates ----------------------------------------------------------------------------------------------


def _real(model: str, spatial: int, temporal: int, two: bool = False, **config: Any) -> Any:
    with torch.device("meta"):
        transformer = getattr(diffusers, model)(**config)
    pipe = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=spatial)
    pipe.vae_scale_factor_temporal = temporal
    if two:
        pipe.transformer_2 = transformer
    return pipe


def test_estimates_of_real_models() -> None:
    """Against the arithmetic of the specification, whose shares of attention are rounded."""
    wan = _real("WanTransformer3DModel", 8, 4)
    found = RadialAttnProcessor().estimate(wan, 768, 1280, 69, 50)
    assert found.tokens == 69120
    assert round(found.density, 4) == 0.2871
    assert found.attention_share == pytest.approx(0.70, abs=0.02)
    assert found.dense_share == pytest.approx(0.259, abs=1e-3)
    assert found.speed_up == pytest.approx(1.58, abs=0.03)
    # A tenth of its 20 double and 40 single blocks has the same shares.
    hunyuan = _real("HunyuanVideoTransformer3DModel", 8, 4, num_layers=2, num_single_layers=4)
    found = RadialAttnProcessor(dense_blocks=0).estimate(hunyuan, 720, 1280, 509, 50)
    assert found.attention_share == pytest.approx(0.95, abs=0.02)
    assert found.dense_share == pytest.approx(0.04)
    assert found.speed_up == pytest.approx(5.2, abs=0.4)
    with pytest.raises(ValueError, match="0 steps are no run"):
        RadialAttnProcessor().estimate(hunyuan, 720, 1280, 509, 0)
    slower = RadialAttnProcessor().estimate(hunyuan, 720, 1280, 509, 50, efficiency=0.7)
    assert slower.speed_up < found.speed_up
    experts = _real("WanTransformer3DModel", 8, 4, two=True, num_layers=4)
    both = RadialAttnProcessor().estimate(experts, 720, 1280, 81, 40)
    assert round(both.dense_share, 3) == round(1 - (1 - 11 / 40) * (1 - 1 / 4), 3)
    assert both.density > RadialAttnProcessor().estimate(wan, 720, 1280, 81, 40).density


# (autoencoder's strides, model's own settings, height, width, frames) -> (latent frames, tokens of each).
SIZES: list[tuple[str, tuple[int, int], dict[str, Any], tuple[int, int, int], tuple[int, int]]] = [
    ("WanTransformer3DModel", (8, 4), {}, (480, 832, 81), (21, 1560)),
    ("WanTransformer3DModel", (8, 4), {}, (720, 1280, 81), (21, 3600)),
    ("WanTransformer3DModel", (16, 4), {}, (704, 1280, 121), (31, 880)),
    ("HunyuanVideoTransformer3DModel", (8, 4), {"num_single_layers": 1}, (720, 1280, 129), (33, 3600)),
    ("HunyuanVideoTransformer3DModel", (8, 4), {"num_single_layers": 1}, (768, 1280, 117), (30, 3840)),
    ("HunyuanVideo15Transformer3DModel", (16, 4), {}, (720, 1280, 121), (31, 3600)),
    ("MochiTransformer3DModel", (8, 6), {}, (480, 848, 163), (28, 1590)),
    ("CogVideoXTransformer3DModel", (8, 4), {}, (480, 720, 49), (13, 1350)),
    ("CogVideoXTransformer3DModel", (8, 4), {"patch_size_t": 2}, (768, 1360, 81), (11, 4080)),
    ("LTXVideoTransformer3DModel", (32, 8), {}, (512, 768, 121), (16, 384)),
]


@pytest.mark.parametrize(("model", "strides", "config", "size", "wanted"), SIZES)
def test_frames_and_tokens_of_real_sizes(
    model: str, strides: tuple[int, int], config: dict[str, Any], size: tuple[int, int, int], wanted: Any
) -> None:
    layout = subject_of(_real(model, *strides, num_layers=2, **config), *size).layout
    assert (layout.frames, layout.tokens) == wanted
    assert layout.text_first == model.startswith("CogVideoX")


def test_an_estimate_warns_where_little_is_gained(caplog: pytest.LogCaptureFixture) -> None:
    ltx = _real("LTXVideoTransformer3DModel", 32, 8)
    with caplog.at_level(logging.WARNING, logger="diffctrl.radial"):
        found = RadialAttnProcessor().estimate(ltx, 512, 768, 121, 50)
    assert not found.worthwhile
    assert [str(found) in record.getMessage() for record in caplog.records] == [True]


def test_an_estimate_needs_a_video_pipeline() -> None:
    with pytest.raises(TypeError, match="strides of its autoencoder"):
        RadialAttnProcessor().estimate(SimpleNamespace(transformer=build("wan")), 720, 1280, 81)
    sd3 = SimpleNamespace(transformer=build("sd3"), vae_scale_factor_spatial=8, vae_scale_factor_temporal=1)
    with pytest.raises(TypeError, match="radial does not support Stable Diffusion 3"):
        RadialAttnProcessor().estimate(sd3, 512, 512, 1)
