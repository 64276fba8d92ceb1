"""What the difference c - p passes through, and the rescaled prediction, by itself and in pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from torch import Tensor

import diffctrl
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.softpag import SoftPAGConfig, guidance_delta, guide, rescaled
from diffctrl.softpag.guidance import projected, shared_direction
from tests import tiny
from tests.helpers import FixedScheduler, example, run, shared
from tests.pipelines import (
    cogvideox_pipeline,
    denoiser,
    flux_pipeline,
    generate,
    sd3_pipeline,
    sd_pipeline,
    sdxl_pipeline,
    wan_pipeline,
)
from tests.softpag.test_perturb import close, float64

torch.set_num_threads(1)

S, W = 4.0, 2.5


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).double()


# --- the mathematics ----------------------------------------------------------------------------------------


def test_the_worked_rescale() -> None:
    """Specification 2.5: phi = 0.7, unbiased deviation."""
    e, c, p = (float64([[1, 0, 2]]), float64([[2, 1, 0]]), float64([[1.5, 2, -1]]))
    guided = guide(c, p, 3.0, e, 5.0)
    close(guided, [[7.5, 2, -5]])
    close(rescaled(guided, c, 0.7)[0], [3.0879912287, 0.8234643277, -2.0586608191])
    torch.testing.assert_close(rescaled(guided, c, 0.0), guided)
    torch.testing.assert_close(rescaled(guided, c, 1.0).std(), c.std())


def test_rows_are_rescaled_by_themselves() -> None:
    guided, c = 5 * random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    alone = torch.cat([rescaled(guided[row : row + 1], c[row : row + 1], 0.6) for row in (0, 1)])
    torch.testing.assert_close(rescaled(guided, c, 0.6), alone)


def test_apg_keeps_what_is_orthogonal() -> None:
    c, d = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    torch.testing.assert_close(projected(d, c, 1.0, None), d)
    orthogonal = projected(d, c, 0.0, None)
    torch.testing.assert_close((orthogonal * c).flatten(1).sum(1), torch.zeros(2).double())
    parallel = d - orthogonal
    half = projected(d, c, 0.5, None)
    torch.testing.assert_close(half, orthogonal + 0.5 * parallel)
    # What is parallel is a multiple of c.
    cosine = torch.nn.functional.cosine_similarity(parallel.flatten(1), c.flatten(1)).abs()
    torch.testing.assert_close(cosine, torch.ones(2).double())


def test_apg_shortens_and_never_lengthens() -> None:
    c, d = random(2, 10), random(2, 10, seed=1)
    d[1] = 1e-3 * d[1]
    short = projected(d, c, 1.0, 1.0)
    torch.testing.assert_close(short[0].norm(), float64(1.0))
    assert torch.equal(short[1], d[1])


def test_momentum_adds_the_earlier_differences() -> None:
    config = SoftPAGConfig(w=2.0, difference="apg", apg_parallel=1.0, apg_momentum=-0.5)
    c, p = [random(1, 6, seed=s) for s in range(3)], [random(1, 6, seed=s) for s in range(3, 6)]
    memory: dict[str, Any] = {}
    deltas = [guidance_delta(config, *pair, memory) for pair in zip(c, p, strict=True)]
    d = [one - other for one, other in zip(c, p, strict=True)]
    running = [d[0], d[1] - 0.5 * d[0], d[2] - 0.5 * (d[1] - 0.5 * d[0])]
    for actual, expected in zip(deltas, running, strict=True):
        torch.testing.assert_close(actual, 2.0 * expected)
    assert torch.equal(guidance_delta(config, c[0], p[0], {}), deltas[0])


def test_tangential_damping_is_the_projection_on_the_first_singular_direction() -> None:
    c, p = random(3, 4, 5), random(3, 4, 5, seed=1) + random(3, 4, 5)
    kept = shared_direction(c, p)
    for row in range(3):
        pair = torch.stack([c[row].flatten(), p[row].flatten()])
        first = torch.linalg.svd(pair, full_matrices=False).Vh[0]
        expected = (p[row].flatten() @ first) * first
        torch.testing.assert_close(kept[row].flatten(), expected)
    torch.testing.assert_close(shared_direction(c, c), c)
    config = SoftPAGConfig(w=3.0, difference="tangential")
    torch.testing.assert_close(guidance_delta(config, c, p, {}), 3.0 * (c - kept))


@pytest.mark.parametrize("options", [{}, {"difference": "apg"}, {"difference": "tangential"}])
def test_no_difference_is_no_guidance(options: dict[str, Any]) -> None:
    c = random(2, 4, 5)
    zero = guidance_delta(SoftPAGConfig(**options), c, c, {})
    torch.testing.assert_close(zero, torch.zeros_like(c), rtol=0, atol=1e-12)
    half = guidance_delta(SoftPAGConfig(**options), c.half(), c.half().neg(), {})
    assert half.dtype == torch.float32


# --- in pipelines -------------------------------------------------------------------------------------------


def handed_to_the_scheduler(pipe: Any) -> list[Tensor]:
    taken: list[Tensor] = []
    step = pipe.scheduler.step

    def keep(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(prediction.clone())
        return step(prediction, *args, **kwargs)

    pipe.scheduler.step = keep
    return taken


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (sd3_pipeline, S),
        (sd_pipeline, S),
        (sdxl_pipeline, S),
        (sd3_pipeline, 1.0),
        (flux_pipeline, 1.0),
        (wan_pipeline, 1.0),
    ],
)
def test_the_pipelines_own_line_yields_the_rescaled_prediction(make: Any, scale: float, mode: Any) -> None:
    pipe = make()
    raw: list[Tensor] = []
    denoiser(pipe).register_forward_hook(lambda _, __, output: raw.append(output[0].clone()))
    taken = handed_to_the_scheduler(pipe)
    arguments = {} if make is flux_pipeline else {"guidance_scale": scale}
    processor = SoftPAGAttnProcessor(u=0.8, w=W, rescale=0.7, mode=mode)
    with diffctrl.apply(pipe, processor):
        generate(pipe, steps=1, batch=2, **arguments)
    with diffctrl.apply(pipe, SoftPAGAttnProcessor(u=0.8, w=W)):
        generate(pipe, steps=1, batch=2, **arguments)
    generate(pipe, steps=1, batch=2, **arguments)
    # The twin's raw prediction from the guided one without rescale.
    c = raw[-1].float().chunk(2)[1] if scale != 1 else raw[-1].float()
    wanted = rescaled(taken[1], c, 0.7)
    torch.testing.assert_close(taken[0].float(), wanted.float(), rtol=1e-4, atol=1e-4)
    assert (taken[0] - taken[1]).abs().max() > 1e-3


def test_rescale_is_refused_where_it_cannot_be_exact() -> None:
    processor = SoftPAGAttnProcessor(rescale=0.5)
    for pipe, arguments, message in (
        (wan_pipeline(), {"guidance_scale": S}, "one after the other"),
        (flux_pipeline(), {"true_cfg_scale": S}, "one after the other"),
        (cogvideox_pipeline(), {"guidance_scale": S}, "changes its guidance scale while it runs"),
        (sd_pipeline(), {"guidance_scale": S, "guidance_rescale": 0.3}, r"rescales too \(guidance_resc"),
    ):
        with diffctrl.apply(pipe, processor), pytest.raises(RuntimeError, match=message):
            generate(pipe, **arguments)
    with (
        diffctrl.apply(shared("sd3"), processor, batch_layout="uncond_cond"),
        pytest.raises(RuntimeError, match="outside of a pipeline"),
    ):
        run(shared("sd3"), example("sd3"))


def test_momentum_lasts_over_the_steps_of_one_run() -> None:
    pipe = sd3_pipeline()
    options: dict[str, Any] = {"difference": "apg", "apg_parallel": 1.0}

    def latents(steps: int, **more: Any) -> Tensor:
        with diffctrl.apply(pipe, SoftPAGAttnProcessor(w=W, **options, **more)):
            first = generate(pipe, steps=steps, guidance_scale=S)
            assert torch.equal(
                generate(pipe, steps=steps, guidance_scale=S), first
            )  # no memory of another run
        return first

    assert torch.equal(latents(1), latents(1, apg_momentum=0.5))
    assert not torch.equal(latents(3), latents(3, apg_momentum=0.5))
    with diffctrl.apply(pipe, SoftPAGAttnProcessor(w=W)):
        plain = generate(pipe, steps=3, guidance_scale=S)
    torch.testing.assert_close(latents(3), plain, rtol=1e-4, atol=1e-4)


def test_momentum_without_a_scheduler_says_what_to_do() -> None:
    model, processor = shared("sd3"), SoftPAGAttnProcessor(difference="apg", apg_momentum=0.5)
    with diffctrl.apply(model, processor), pytest.raises(RuntimeError, match=r"momentum.*scheduler="):
        run(model, example("sd3"))
    with diffctrl.apply(model, processor, scheduler=(scheduler := FixedScheduler(4))):
        scheduler.step_index = 0
        first = run(model, example("sd3"))
        scheduler.step_index = 1
        assert not torch.equal(run(model, example("sd3")), first)
        scheduler.step_index = 0
        assert torch.equal(run(model, example("sd3")), first)


@pytest.mark.parametrize("mode", ["batched", "sequential", "prefix"])
@pytest.mark.parametrize("scale", [S, 1.0])
def test_img2img_is_guided_in_the_steps_that_it_takes(mode: Any, scale: float) -> None:
    pipe = StableDiffusion3Img2ImgPipeline(**tiny.sd3_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def latents() -> Tensor:
        return pipe(
            "a red star",
            image=image,
            strength=0.5,
            num_inference_steps=6,
            guidance_scale=scale,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0]

    plain = latents()
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L1", u=0.0, mode=mode)):
        assert torch.equal(latents(), plain)
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L1", start_fraction=0.75, mode=mode)) as control:
        guided = latents()
        stats = control.stats()["transformer"]
    # Steps 3, 4 and 5 of 6 run; only step 5 lies behind 0.75 of the schedule.
    assert (stats["forwards"], stats["guided_forwards"]) == (3, 1)
    assert (guided - plain).abs().max() > 1e-3
