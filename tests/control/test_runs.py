"""Runs as users make them: replaced schedulers, shared models, late starts, inference mode, failures."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXVideoToVideoPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import apply_group_offloading
from PIL import Image
from torch import Tensor

import diffctrl
from diffctrl import CaptureSpec
from diffctrl.processors import CaptureAttnProcessor, RadialAttnProcessor, SoftPAGAttnProcessor
from tests.helpers import FixedScheduler, build, example, run
from tests.length.models import wan
from tests.pipelines import denoiser, flux_pipeline, generate, prompts, sd3_pipeline, sdxl_pipeline

SPARSE: dict[str, Any] = {
    "dense_steps": 0, "dense_last_steps": 0, "dense_blocks": 0, "block": 8, "decay_factor": 0.06,
}  # fmt: skip


WAN_PARTS = ("vae", "text_encoder", "tokenizer", "transformer")


def guided(mode: str = "batched") -> SoftPAGAttnProcessor:
    return SoftPAGAttnProcessor("L0,L1", u=1.0, w=3.0, mode=mode)


@pytest.mark.parametrize("run_before", [False, True])
def test_a_scheduler_that_is_replaced_under_a_control_is_followed(run_before: bool) -> None:
    def drawn(swap_first: bool) -> tuple[Tensor, int]:
        pipe = sd3_pipeline()
        if run_before:
            generate(pipe, steps=4)
        window = SoftPAGAttnProcessor("L0", u=1.0, start_fraction=0.5)
        other = FlowMatchEulerDiscreteScheduler(shift=1.0)
        if swap_first:
            pipe.scheduler = other
        with diffctrl.apply(pipe, window) as control:
            pipe.scheduler = other
            latents = generate(pipe, steps=4)
            return latents, control.stats()["transformer"]["guided_forwards"]

    (wanted, expected), (found, forwards) = drawn(True), drawn(False)
    assert forwards == expected == 2
    assert torch.equal(found, wanted)


def test_another_pipeline_that_shares_the_model_is_refused() -> None:
    pipe = sd3_pipeline()
    other = StableDiffusion3Pipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with diffctrl.apply(other, guided()):
        wanted = generate(other, guidance_scale=1.0)
    with diffctrl.apply(pipe, guided()):
        generate(pipe, guidance_scale=5.0)
        with pytest.raises(RuntimeError, match="shares it with the StableDiffusion3Pipeline under control"):
            generate(other, guidance_scale=1.0)
        assert torch.equal(generate(pipe, guidance_scale=1.0), wanted)
    assert torch.isfinite(generate(other, guidance_scale=1.0)).all()


def test_adapters_residuals_reach_a_twin_that_runs_by_itself() -> None:
    model = build("unet")
    inputs = example("unet", model)
    shapes: list[torch.Size] = []
    hooks = []
    for block in model.down_blocks:
        last = block.attentions[-1] if getattr(block, "attentions", None) else block.resnets[-1]
        hooks.append(
            last.register_forward_hook(
                lambda _, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
            )
        )
    stock = run(model, inputs)
    for hook in hooks:
        hook.remove()
    draw = torch.Generator().manual_seed(5)
    residuals = [torch.randn(shape, generator=draw) for shape in shapes]

    def controlled(mode: str) -> Tensor:
        given = [residual.clone() for residual in residuals]  # the model takes them out of the list
        with diffctrl.apply(model, guided(mode)):
            return run(model, {**inputs, "down_intrablock_additional_residuals": given})

    batched = controlled("batched")
    torch.testing.assert_close(controlled("sequential"), batched, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(batched, stock, atol=1e-2)


def _video_to_video(scheduler: Any) -> Any:
    """A call of Wan's pipeline (`func`), which does not tell the scheduler where a run begins."""
    parts = {name: part for name, part in wan().components.items() if name in WAN_PARTS}
    pipe = WanVideoToVideoPipeline(**parts, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (32, 32), (10 * shade, 0, 0)) for shade in range(17)]
    text = torch.randn(1, 32, pipe.text_encoder.config.d_model, generator=torch.Generator().manual_seed(0))
    given = {"video": video, "prompt_embeds": text, "height": 32, "width": 32}
    return partial(pipe, **given, guidance_scale=1.0, output_type="latent")


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_dense_steps_of_wans_video_to_video_are_counted_from_its_start(scheduler: Any) -> None:
    """The pipeline begins late and does not tell the scheduler, which could say so."""
    pipe = _video_to_video(scheduler)
    settings = {"block": 16, "dense_steps": 3, "dense_last_steps": 0, "dense_blocks": 0}
    sparse: list[int] = []
    with diffctrl.apply(pipe.func, RadialAttnProcessor(**settings)) as control:
        context = control.contexts["transformer"]

        def step_end(pipe: Any, step: int, time: Any, kept: Any) -> Any:
            sparse.append(context.masked_forwards)
            return kept

        pipe(num_inference_steps=10, strength=0.5, callback_on_step_end=step_end)
    assert sparse == [0, 0, 0, 1, 2]


def test_dense_steps_of_a_control_that_comes_under_way_are_the_runs() -> None:
    """Where the run began is not said, but that steps were made."""
    seen: list[Any] = []

    def step_end(pipe: Any, step: int, time: Any, kept: Any) -> Any:
        if step == 1:
            settings = {"block": 16, "dense_steps": 3, "dense_last_steps": 0, "dense_blocks": 0}
            seen.append(diffctrl.apply(pipe, RadialAttnProcessor(**settings)).contexts["transformer"])
        return kept

    _video_to_video(FlowMatchEulerDiscreteScheduler(shift=3.0))(num_inference_steps=6, strength=1.0,
                                                               callback_on_step_end=step_end)  # fmt: skip
    assert seen[0].masked_forwards == 3  # steps 3, 4 and 5; step 2 is dense


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_dense_steps_of_a_late_start_are_counted_from_it(scheduler: Any) -> None:
    """CogVideoX's schedulers do not say where a run began."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = CogVideoXVideoToVideoPipeline(**parts, transformer=build("cogvideox"), scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 3, 4, 10, 6, generator=torch.Generator().manual_seed(3))
    pipe.prepare_latents = lambda *args, **kwargs: latents  # stands for the VAE and its noise
    for _ in range(2):  # a second run begins anew
        sparse: list[int] = []
        with diffctrl.apply(pipe, RadialAttnProcessor(**{**SPARSE, "dense_steps": 2})) as control:
            context = control.contexts["transformer"]

            def step_end(pipe: Any, step: int, time: Any, kept: Any) -> Any:
                sparse.append(context.masked_forwards)  # noqa: B023
                return kept

            pipe(
                **prompts(pipe), height=80, width=48, num_inference_steps=10, strength=0.5, latents=latents,
                guidance_scale=1.0, output_type="latent", callback_on_step_end=step_end,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        assert sparse == [0, 0, 1, 2, 3]


def test_a_mask_that_is_written_to_in_inference_mode_is_read_again() -> None:
    model, scheduler = build("hunyuan_video"), FixedScheduler(4)
    scheduler.step_index = 3
    with torch.inference_mode():
        inputs = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in example("hunyuan_video", model).items()
        }
        full = torch.ones_like(inputs["encoder_attention_mask"])
        with diffctrl.apply(model, RadialAttnProcessor(**SPARSE), scheduler=scheduler):
            wanted = run(model, {**inputs, "encoder_attention_mask": full})
            short = run(model, inputs)
            inputs["encoder_attention_mask"].copy_(full)
            assert torch.equal(run(model, inputs), wanted)
    assert not torch.equal(short, wanted)


def test_gradients_after_a_run_in_inference_mode() -> None:
    model = build("sd3")
    inputs = example("sd3", model)

    def gradients() -> Tensor:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return model.proj_out.weight.grad.clone()

    model.requires_grad_(True)
    with diffctrl.apply(model, guided()):
        wanted = gradients()
    with diffctrl.apply(model, guided()):
        with torch.inference_mode():
            model(**inputs, return_dict=False)
        assert torch.equal(gradients(), wanted)


def test_a_failed_forward_leaves_the_blocks_as_they_were() -> None:
    pipe = sd3_pipeline()
    model = pipe.transformer
    names, blocks = list(model.state_dict()), list(model.transformer_blocks)
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L2", u=1.0, mode="prefix")):
        expected = generate(pipe, guidance_scale=1.0)

        def fail(module: Any, args: Any) -> None:
            raise torch.OutOfMemoryError

        hook = blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            generate(pipe, guidance_scale=1.0)
        hook.remove()
        assert list(model.state_dict()) == names
        assert all(one is two for one, two in zip(model.transformer_blocks, blocks, strict=True))
        assert torch.equal(generate(pipe, guidance_scale=1.0), expected)


@pytest.mark.parametrize("make", [sd3_pipeline, sdxl_pipeline, flux_pipeline])
def test_twins_by_themselves_under_group_offloading(make: Any) -> None:
    pipe = make()
    with diffctrl.apply(pipe, guided("sequential")):
        wanted = generate(pipe, steps=2)
    device = torch.device("cpu")
    apply_group_offloading(
        denoiser(pipe), onload_device=device, offload_device=device, offload_type="block_level",
        num_blocks_per_group=1,
    )  # fmt: skip
    with diffctrl.apply(pipe, guided("sequential")):
        assert torch.equal(generate(pipe, steps=2), wanted)


def test_a_capture_on_two_pipelines_does_not_mix_them_up() -> None:
    one, other = sd3_pipeline(), sd3_pipeline()
    capture = CaptureAttnProcessor(CaptureSpec())
    results = []
    for seed in range(2):
        with diffctrl.apply(one, capture):
            generate(one, guidance_scale=1.0, seed=seed)
        results.append(capture.result().values)
    assert len(capture._collectors) == 1  # of the control that is over, nothing is kept
    assert not torch.equal(*results)
    with diffctrl.apply(one, capture), diffctrl.apply(other, capture):
        generate(one, guidance_scale=1.0)
        assert torch.equal(capture.result().values, results[0])
        generate(other, guidance_scale=1.0)
        with pytest.raises(RuntimeError, match="is on two pipelines"):
            capture.result()
