"""Unmodified pipelines of other tasks under SoftPAG: each guided forward is the formula of its passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionControlNetPipeline,
)
from torch import Tensor, nn

import diffctrl
from diffctrl.processors import SoftPAGAttnProcessor
from tests import tiny
from tests.helpers import build
from tests.pipelines import flux_pipeline, generate, prompts, wan_pipeline

torch.set_num_threads(1)

STEPS = 2
PICTURE = torch.rand(1, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(2))
MASK = (PICTURE[:, :1] > 0.5).float()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _sd3_parts(channels: int = 4) -> dict[str, Any]:
    return tiny.sd3_pipeline(replace(tiny.SIZE, latent_channels=channels)).components


def _opened(controlnet: nn.Module) -> nn.Module:
    """Its zero-initialised layers opened, so that it does something."""
    generator = torch.Generator().manual_seed(7)
    for weight in controlnet.parameters():
        if not weight.any():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return controlnet.eval()


def img2img() -> tuple[Any, dict[str, Any]]:
    return StableDiffusion3Img2ImgPipeline(**_sd3_parts()), {"image": PICTURE, "strength": 0.75}


def inpaint() -> tuple[Any, dict[str, Any]]:
    given = {"image": PICTURE, "mask_image": MASK, "strength": 0.75, "height": tiny.SIDE, "width": tiny.SIDE}
    return StableDiffusion3InpaintPipeline(**_sd3_parts(16)), given  # it refuses other latents


def controlnet() -> tuple[Any, dict[str, Any]]:
    parts = _sd3_parts()
    model = SD3ControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_extra_conditioning_channels=0
    )
    given = {"control_image": PICTURE, "height": tiny.SIDE, "width": tiny.SIDE}
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=_opened(model)), given


def guess_mode() -> tuple[Any, dict[str, Any]]:
    """A UNet's ControlNet that sees the conditional half alone."""
    unet = build("unet")
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionControlNetPipeline(
        unet=unet,
        controlnet=_opened(ControlNetModel.from_unet(unet)),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **parts,
    )
    return pipe, {"image": torch.rand(1, 3, 80, 48), "guess_mode": True, "prompt": None, **prompts(pipe)}


def latents(pipe: Any, given: dict[str, Any], steps: int = STEPS) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red star", **given}
    torch.manual_seed(0)  # the encoded control image is a sample that takes no generator
    return pipe(
        **{name: value for name, value in call.items() if value is not None},
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
    )[0]


class First:
    """The first forward of a model for its pipeline: its arguments and its prediction, of both halves."""

    def __init__(self, model: nn.Module) -> None:
        self.kwargs: dict[str, Any] = {}
        self.prediction: Any = None
        self._handle = model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.prediction is None and len(output[0]) == 2:  # not a twin inside of it
            names = ("sample", "timestep") if "sample" not in kwargs else ()
            self.kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            self.prediction = output[0]

    def close(self) -> None:
        self._handle.remove()


def halved(value: Any, total: int) -> Any:
    """The conditional rows of a call's argument."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == total:
        return value[total // 2 :]
    if isinstance(value, (list, tuple)):
        return type(value)(halved(item, total) for item in value)
    return value


@pytest.mark.parametrize("make", [img2img, inpaint, controlnet, guess_mode])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_the_pipeline_sees_the_guided_prediction_in_both_halves(make: Any, mode: Any) -> None:
    pipe, given = make()
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    stock = First(model)
    plain = latents(pipe, given)
    stock.close()
    heads = None if hasattr(pipe, "unet") else "L1H0"
    processor = SoftPAGAttnProcessor(heads, u=0.8, w=2.0, mode=mode)
    with diffctrl.apply(pipe, processor) as handle:
        guided = First(model)
        changed = latents(pipe, given)
        guided.close()
        counts = next(iter(handle.stats().values()))
    assert counts["forwards"] == counts["guided_forwards"] >= 1
    assert (changed - plain).abs().max() > 1e-3
    with diffctrl.apply(pipe, SoftPAGAttnProcessor(heads, u=0.0)):
        assert torch.equal(latents(pipe, given), plain)
    with diffctrl.apply(model, SoftPAGAttnProcessor(heads, u=0.8), batch_layout="perturbed"):
        p = model(**{name: halved(value, 2) for name, value in stock.kwargs.items()})[0]
    e, c = stock.prediction.chunk(2)
    delta = 2.0 * (c - p)
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(guided.prediction, torch.cat([e + delta, c + delta]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("make", "call"), [(flux_pipeline, {"true_cfg_scale": 3.0}), (wan_pipeline, {})])
def test_passes_of_their_own_share_the_difference(make: Any, call: dict[str, Any]) -> None:
    """True-CFG FLUX and video: the unconditional pass of a step gets what its conditional pass made."""
    pipe = make()
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0])

    hook = pipe.transformer.register_forward_hook(note)
    generate(pipe, steps=1, **call)
    c, e = seen
    seen.clear()
    hook.remove()
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L1H0", w=2.0)) as handle:
        pipe.transformer.register_forward_hook(note)  # behind the guidance
        generate(pipe, steps=1, **call)
        assert next(iter(handle.stats().values()))["guided_forwards"] == 1
    assert (seen[0] - c).abs().max() > 1e-4
    torch.testing.assert_close(seen[1] - e, seen[0] - c, rtol=1e-3, atol=1e-5)
