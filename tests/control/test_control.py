"""Context, windows, batch rows, guidance through stock pipelines, masks, and what is left behind: nothing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import diffctrl
from diffctrl.attention import BlockLists
from diffctrl.control import Context, Control, Published, Rows
from diffctrl.control.context import current_step
from diffctrl.families import Call, Site
from diffctrl.processors import ControlAttnProcessor, NeutralAttnProcessor, SoftPAGAttnProcessor
from tests.helpers import FixedScheduler, build, example, rows_of, run, shared
from tests.pipelines import (
    cogvideox_pipeline,
    denoiser,
    flux_pipeline,
    generate,
    prompts,
    sd3_pipeline,
    sd_pipeline,
    wan_pipeline,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Seen:
    """What one forward's context said."""

    step: int | None
    total: int | None
    rows: Rows | None
    grid: tuple[int, int, int]


class Spy(ControlAttnProcessor):
    """Notes the context of every forward, changes nothing."""

    method = "spy"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        self.seen.append(Seen(context.step, context.total_steps, context.rows, context.grid()))
        return None


class Perturbed(ControlAttnProcessor):
    """Runs every row with attention maps blended towards the identity: the `p` of the guidance, by itself."""

    method = "perturbed"

    def __init__(self, site: str, u: float) -> None:
        super().__init__()
        self._site, self._u = site, u

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        return output + self._u * (call.value - output) if site.name == self._site else output


def predictions(pipe: Any) -> list[Tensor]:
    """Filled with what the pipeline hands to its scheduler: the guided prediction of every step."""
    taken: list[Tensor] = []
    step = pipe.scheduler.step

    def keep(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(prediction.clone())
        return step(prediction, *args, **kwargs)

    pipe.scheduler.step = keep
    return taken


def forwards(model: nn.Module) -> list[dict[str, Any]]:
    """Filled with the arguments of every forward by name, as the model gets them."""
    taken: list[dict[str, Any]] = []
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        call.pop("return_dict", None)
        taken.append(call)

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return taken


# --- steps and windows --------------------------------------------------------------------------------------


def test_the_step_is_the_schedulers_own_index() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sample = torch.zeros(1, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        assert current_step(scheduler, timestep) == (index, 4)
        assert current_step(scheduler, timestep.bfloat16()) == (index, 4)
        scheduler.step(sample, timestep, sample)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert current_step(scheduler, scheduler.timesteps[2]) == (2, 4)
    scheduler.set_timesteps(5)
    scheduler._begin_index = None
    assert current_step(scheduler, scheduler.timesteps[3].expand(2)) == (3, 5)


def test_the_step_of_a_scheduler_without_index_is_found_by_timestep() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    assert not hasattr(scheduler, "step_index")
    assert [current_step(scheduler, t)[0] for t in scheduler.timesteps] == list(range(10))
    assert current_step(scheduler, int(scheduler.timesteps[4])) == (4, 10)
    assert current_step(scheduler, torch.tensor(-1)) == (None, 10)
    rounded = [current_step(scheduler, t.float().bfloat16())[0] for t in scheduler.timesteps]
    assert rounded == list(range(10))
    assert current_step(None, torch.tensor(1)) == (None, None)
    assert current_step(DDIMScheduler, torch.tensor(1)) == (None, None)


@pytest.mark.parametrize("make", [sd3_pipeline, sd_pipeline, flux_pipeline, wan_pipeline])
def test_a_window_is_half_open_and_counts_from_step_zero(make: Any) -> None:
    pipe = make()
    spy = Spy()
    guided = SoftPAGAttnProcessor(u=1.0, start_fraction=0.0, stop_fraction=0.3)
    with diffctrl.apply(pipe, [guided, spy]) as control:
        generate(pipe, steps=10, guidance_scale=1.0)
        generate(pipe, steps=10, guidance_scale=1.0)
        stats = next(iter(control.stats().values()))
    twins = [(seen.step, seen.rows.perturbed) for seen in spy.seen]
    assert twins == [(step, (1, 2) if step < 3 else (1, 1)) for step in range(10)] * 2
    assert {seen.total for seen in spy.seen} == {10}
    assert (stats["forwards"], stats["guided_forwards"]) == (20, 6)


def test_a_window_without_a_scheduler_says_what_to_do() -> None:
    model = shared("sd3")
    with (
        diffctrl.apply(model, SoftPAGAttnProcessor(stop_fraction=0.5)),
        pytest.raises(RuntimeError, match=r"no scheduler is known; apply to the pipeline.*scheduler="),
    ):
        run(model, example("sd3"))


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_of_a_batch() -> None:
    assert Rows.of(2, "cond") == Rows(2, (0, 0), (0, 2), (2, 2))
    assert Rows.of(2, "uncond") == Rows(2, (0, 2), (2, 2), (2, 2))
    assert Rows.of(4, "uncond_cond") == Rows(4, (0, 2), (2, 4), (4, 4))
    assert Rows.of(4, "uncond_cond").with_twins() == Rows(6, (0, 2), (2, 4), (4, 6))
    assert not Rows.of(2, "uncond").has_cond
    with pytest.raises(ValueError, match=r"3 rows.*even number.*batch_layout='cond'"):
        Rows.of(3, "uncond_cond")


def test_twins_repeat_the_positive_prompt_and_nothing_else_is_changed() -> None:
    pipe = sd3_pipeline()
    given = prompts(pipe, batch=2)
    with diffctrl.apply(pipe, [SoftPAGAttnProcessor(), spy := Spy()]):
        calls = forwards(pipe.transformer)
        generate(pipe, steps=1, batch=2, guidance_scale=4.0)
    (call,) = calls
    assert spy.seen[0].rows == Rows(6, (0, 2), (2, 4), (4, 6))
    negative, positive = given["negative_prompt_embeds"], given["prompt_embeds"]
    assert torch.equal(call["encoder_hidden_states"], torch.cat([negative, positive, positive]))
    negative, positive = given["negative_pooled_prompt_embeds"], given["pooled_prompt_embeds"]
    assert torch.equal(call["pooled_projections"], torch.cat([negative, positive, positive]))
    assert torch.equal(call["hidden_states"][4:], call["hidden_states"][2:4])
    assert call["timestep"].shape == (6,)


@pytest.mark.parametrize("name", ["wan-ends-fused", "sdxl", "flux", "mochi", "cogvideox-1.5", "ltx"])
def test_twins_of_every_batched_argument(name: str) -> None:
    """The forward with twins has the rows that a batch of that many rows would have."""
    model, inputs = shared(name), example(name)
    with diffctrl.apply(model, SoftPAGAttnProcessor()):
        hook = model.register_forward_pre_hook(lambda _, args, kwargs: taken.append(kwargs), with_kwargs=True)
        taken: list[dict[str, Any]] = []
        run(model, inputs)
        hook.remove()
    expected = rows_of(inputs, 0, 1, 0, 1)

    def check(actual: Any, wanted: Any) -> None:
        if isinstance(wanted, dict):
            for key in wanted:
                check(actual[key], wanted[key])
        elif isinstance(wanted, Tensor):
            assert torch.equal(actual, wanted)
        elif isinstance(wanted, tuple):
            for one, other in zip(actual, wanted, strict=True):
                check(one, other)
        else:
            assert actual == wanted

    check(taken[0], expected)


def test_a_bare_model_is_all_conditional_unless_told() -> None:
    model, inputs = shared("sd3"), example("sd3")
    for layout, rows in (
        (None, Rows(2, (0, 0), (0, 2), (2, 2))),
        ("uncond_cond", Rows(2, (0, 1), (1, 2), (2, 2))),
        ("uncond", Rows(2, (0, 2), (2, 2), (2, 2))),
    ):
        with diffctrl.apply(model, spy := Spy(), batch_layout=layout):
            run(model, inputs)
        assert spy.seen[0].rows == rows


def test_turning_guidance_off_in_a_callback_is_followed() -> None:
    pipe = sd3_pipeline()

    def no_more_guidance(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
            kwargs["pooled_prompt_embeds"] = kwargs["pooled_prompt_embeds"][-1:]
        return kwargs

    with diffctrl.apply(pipe, spy := Spy()):
        generate(
            pipe,
            guidance_scale=4.0,
            callback_on_step_end=no_more_guidance,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "pooled_prompt_embeds"],
        )
    assert [seen.rows.total for seen in spy.seen] == [2, 2, 1, 1]
    assert [seen.rows.cond for seen in spy.seen] == [(1, 2), (1, 2), (0, 1), (0, 1)]


def test_cogvideox_is_read_where_its_run_begins() -> None:
    """Its dynamic scale would read as guided in a run without guidance, and can read as unguided in one."""
    pipe = cogvideox_pipeline()
    with diffctrl.apply(pipe, spy := Spy()):
        generate(pipe, steps=6, guidance_scale=3.0, use_dynamic_cfg=True)
        generate(pipe, steps=6, guidance_scale=1.0, use_dynamic_cfg=True)
    assert [seen.rows.uncond for seen in spy.seen] == [(0, 1)] * 6 + [(0, 0)] * 6


def test_pipelines_that_cannot_be_read_are_refused() -> None:
    class Three:
        unet = shared("unet")
        scheduler = DDIMScheduler()
        do_classifier_free_guidance = True
        image_guidance_scale = 1.5

    class Perturbing:
        unet = shared("unet")
        scheduler = DDIMScheduler()
        do_classifier_free_guidance = do_perturbed_attention_guidance = True

    class Silent:
        unet = shared("unet")

    for pipe, message in (
        (Three(), "three passes in one batch"),
        (Perturbing(), "three passes in one batch"),
        (Silent(), "batch_layout='uncond_cond'"),
    ):
        with diffctrl.apply(pipe, Spy()), pytest.raises(RuntimeError, match=message):
            run(pipe.unet, example("unet"))
    with diffctrl.apply(Silent(), spy := Spy(), batch_layout="cond"):
        run(Silent.unet, example("unet"))
    assert spy.seen[0].rows == Rows(2, (0, 0), (0, 2), (2, 2))


# --- guidance -----------------------------------------------------------------------------------------------

S, W, U = 4.0, 2.5, 0.6


def assert_guided(actual: Tensor, e: Tensor | None, c: Tensor, p: Tensor) -> None:
    expected = c + W * (c - p) if e is None else e + S * (c - e) + W * (c - p)
    assert (c - p).abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-5)  # atol: rounding of values near 10


def perturbed(model: nn.Module, site: str, inputs: dict[str, Any]) -> Tensor:
    with diffctrl.apply(model, Perturbed(site, U)):
        return run(model, inputs)


@pytest.mark.parametrize("make", [sd3_pipeline, sd_pipeline])
@pytest.mark.parametrize("guidance", [S, 1.0])
def test_guidance_in_one_batch(make: Any, guidance: float) -> None:
    pipe = make()
    model = denoiser(pipe)
    taken, calls = predictions(pipe), forwards(model)
    generate(pipe, steps=1, batch=2, guidance_scale=guidance)
    inputs = calls.pop()
    taken.clear()
    processor = SoftPAGAttnProcessor("L1H0,L1H1", u=U, w=W)
    with diffctrl.apply(pipe, processor) as control:
        generate(pipe, steps=1, batch=2, guidance_scale=guidance)
        (site,) = processor.select(list(next(iter(control.contexts.values())).sites.values()))
    together, p = run(model, inputs), perturbed(model, site.name, inputs)
    if guidance == 1.0:
        assert_guided(taken[0], None, together, p)
    else:
        assert_guided(taken[0], *together.chunk(2), p.chunk(2)[1])


@pytest.mark.parametrize(
    "name", ["sd3.5", "flux", "hunyuan_video", "mochi", "cogvideox", "ltx", "sdxl", "wan"]
)
def test_the_perturbation_leaks_into_no_other_row(name: str) -> None:
    """Raw rows of a forward with twins: the first ones are bit for bit a plain forward of as many rows."""
    model, inputs = shared(name), example(name)
    raw: list[Tensor] = []
    last = model.conv_out if hasattr(model, "conv_out") else model.proj_out
    hook = last.register_forward_hook(lambda module, args, output: raw.append(output))
    with diffctrl.apply(model, SoftPAGAttnProcessor(u=1.0)):
        guided = run(model, inputs)
    run(model, rows_of(inputs, 0, 1, 0, 1))
    hook.remove()
    twins, plain = raw
    assert torch.equal(twins[:2], plain[:2])
    assert not torch.equal(twins[2:], plain[2:])
    assert not torch.equal(guided, run(model, inputs))


def test_guidance_in_separate_passes() -> None:
    pipe = wan_pipeline()
    taken, calls = predictions(pipe), forwards(pipe.transformer)
    generate(pipe, steps=2, guidance_scale=S)
    assert len(calls) == 4
    cond, uncond = calls[:2]
    taken.clear()
    with diffctrl.apply(pipe, [SoftPAGAttnProcessor("L1H1", u=1.0, w=W), spy := Spy()]) as control:
        generate(pipe, steps=2, guidance_scale=S)
        stats = control.stats()["transformer"]
    assert [(seen.step, seen.rows.cond, seen.rows.total) for seen in spy.seen] == [
        (0, (0, 1), 2), (0, (1, 1), 1), (1, (0, 1), 2), (1, (1, 1), 1)
    ]  # fmt: skip
    assert (stats["forwards"], stats["guided_forwards"]) == (4, 2)

    class OneHead(Perturbed):
        def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
            changed = super().transform_output(site, call, output)
            return torch.cat([output[:, :, :1], changed[:, :, 1:]], dim=2)

    e, c = run(pipe.transformer, uncond), run(pipe.transformer, cond)
    with diffctrl.apply(pipe.transformer, OneHead("blocks.1.attn1", 1.0)):
        p = run(pipe.transformer, cond)
    assert_guided(taken[0], e, c, p)


@pytest.mark.parametrize("true_cfg", [1.0, S])
def test_guidance_of_flux_with_and_without_true_cfg(true_cfg: float) -> None:
    pipe = flux_pipeline()
    taken, calls = predictions(pipe), forwards(pipe.transformer)
    generate(pipe, steps=2, true_cfg_scale=true_cfg)
    cond, uncond = calls[:2]
    taken.clear()
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L3", u=U, w=W)):
        generate(pipe, steps=2, true_cfg_scale=true_cfg)
    c, p = run(pipe.transformer, cond), perturbed(pipe.transformer, "single_transformer_blocks.1.attn", cond)
    e = None if true_cfg == 1.0 else run(pipe.transformer, uncond)
    assert_guided(taken[0], e, c, p)


def test_both_transformers_of_wan_2_2_are_guided_in_their_part_of_the_run() -> None:
    pipe = wan_pipeline(two=True)
    plain = generate(pipe, steps=4, guidance_scale=S)
    with diffctrl.apply(pipe, SoftPAGAttnProcessor(w=W)) as control:
        guided = generate(pipe, steps=4, guidance_scale=S)
        counts = {name: stats["forwards"] for name, stats in control.stats().items()}
    assert set(counts) == {"transformer", "transformer_2"}
    assert sum(counts.values()) == 8
    assert min(counts.values()) >= 2
    assert not torch.equal(plain, guided)
    assert torch.equal(generate(pipe, steps=4, guidance_scale=S), plain)


def test_skip_layer_guidance_of_sd3_is_not_taken_for_another_conditional_pass() -> None:
    pipe = sd3_pipeline()
    arguments = {"steps": 2, "guidance_scale": S, "skip_layer_guidance_start": -1.0}
    skipping = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_scale": 2.0,
        "skip_layer_guidance_stop": 1.0,
    }
    taken = predictions(pipe)
    generate(pipe, **arguments)
    generate(pipe, **arguments, **skipping)
    with diffctrl.apply(pipe, [SoftPAGAttnProcessor("L0", w=W), spy := Spy()]):
        generate(pipe, **arguments)
        generate(pipe, **arguments, **skipping)
    assert [seen.rows.total for seen in spy.seen] == [3, 3, 3, 1, 3, 1]
    # The first step of each run: what the perturbation adds is the same with and without skipped layers.
    torch.testing.assert_close(taken[6] - taken[2], taken[4] - taken[0], rtol=1e-5, atol=2e-5)


def test_passes_that_cannot_be_told_apart_are_refused_and_named_ones_work() -> None:
    model, inputs, scheduler = shared("wan"), example("wan"), FixedScheduler(4)
    scheduler.step_index = 0
    stock = run(model, inputs)
    with diffctrl.apply(model, SoftPAGAttnProcessor(w=W), scheduler=scheduler):
        run(model, inputs)
        with pytest.raises(RuntimeError, match=r"ran twice in step 0.*cache_context\('cond'\)"):
            run(model, inputs)
        scheduler.step_index = 1
        with model.cache_context("cond"):
            guided = run(model, inputs)
        with model.cache_context("uncond", step_index=1):
            delta = run(model, inputs) - stock
        torch.testing.assert_close(guided - stock, delta, rtol=1e-5, atol=1e-5)
        scheduler.step_index = 2
        with (
            model.cache_context("uncond"),
            pytest.raises(RuntimeError, match="ran before its conditional one"),
        ):
            run(model, inputs)
    assert torch.equal(run(model, inputs), stock)


def test_a_new_run_with_as_many_steps_is_not_taken_for_a_second_pass() -> None:
    pipe = wan_pipeline()
    with diffctrl.apply(pipe, SoftPAGAttnProcessor()):
        first = generate(pipe, steps=1, guidance_scale=1.0)
        assert torch.equal(generate(pipe, steps=1, guidance_scale=1.0), first)


# --- what users have around it ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline, wan_pipeline, cogvideox_pipeline, sd_pipeline])
def test_a_neutral_run_equals_the_stock_run(make: Any) -> None:
    pipe = make()
    stock = generate(pipe, batch=2)
    for processor in (NeutralAttnProcessor(), SoftPAGAttnProcessor(u=0.0), SoftPAGAttnProcessor(w=0.0)):
        with diffctrl.apply(pipe, processor):
            assert torch.equal(generate(pipe, batch=2), stock)
    assert torch.equal(generate(pipe, batch=2), stock)


def test_an_exception_in_the_middle_of_a_run_leaves_nothing_behind() -> None:
    pipe = wan_pipeline()
    processor = SoftPAGAttnProcessor(u=1.0, w=W)
    stock = generate(pipe)
    with diffctrl.apply(pipe, processor):
        guided = generate(pipe)

    def fail(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    attributes = set(vars(pipe.transformer))
    with pytest.raises(KeyboardInterrupt), diffctrl.apply(pipe, processor):
        generate(pipe, callback_on_step_end=fail)
    assert set(vars(pipe.transformer)) == attributes
    assert diffctrl.summary(pipe) == "transformer (WanTransformer3DModel): stock attention"
    assert torch.equal(generate(pipe), stock)
    with diffctrl.apply(pipe, processor):
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(generate(pipe), guided)


def test_the_users_callback_keeps_working() -> None:
    pipe = sd3_pipeline()
    steps: list[int] = []

    def damp(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": kwargs["latents"] * 0.9}

    stock = generate(pipe, callback_on_step_end=damp)
    with diffctrl.apply(pipe, NeutralAttnProcessor()):
        assert torch.equal(generate(pipe, callback_on_step_end=damp), stock)
    assert steps == [0, 1, 2, 3] * 2
    assert not torch.equal(generate(pipe), stock)


def test_what_wraps_the_forward_meanwhile_stays() -> None:
    """Offloading wraps `model.forward`; taking a control off must not unwrap it."""

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, inputs = build("flux"), example("flux")
    stock = run(model, inputs)
    hook = Counting()
    with diffctrl.apply(model, SoftPAGAttnProcessor()):
        add_hook_to_module(model, hook)
        assert not torch.equal(run(model, inputs), stock)
    assert torch.equal(run(model, inputs), stock)
    assert hook.calls == 2


def test_a_processor_that_something_else_puts_on_meanwhile_is_noticed() -> None:
    model, inputs = build("unet"), example("unet")
    stock, before = run(model, inputs), list(model.attn_processors.values())
    with diffctrl.apply(model, SoftPAGAttnProcessor("mid:L0")):
        model.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match=r"mid_block.* runs FusedAttnProcessor2_0 instead.*remove\(\)"):
            run(model, inputs)
        model.unfuse_qkv_projections()
        assert not torch.equal(run(model, inputs), stock)
    with diffctrl.apply(model, NeutralAttnProcessor()):
        model.set_attn_processor(AttnProcessor2_0())
    after = model.attn_processors.values()
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_named_passes_of_other_hooks_are_still_heard() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = wan_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    stock = generate(pipe)
    with diffctrl.apply(pipe, NeutralAttnProcessor()):
        assert torch.equal(generate(pipe), stock)
    assert torch.equal(generate(pipe), stock)


def test_the_summary_says_what_is_active_where() -> None:
    pipe = wan_pipeline(two=True)
    stock = "stock attention"
    assert diffctrl.summary(pipe).splitlines() == [
        f"transformer (WanTransformer3DModel): {stock}",
        f"transformer_2 (WanTransformer3DModel): {stock}",
    ]
    with diffctrl.apply(pipe, [SoftPAGAttnProcessor("L0,L1H0", u=0.5, w=2.0), NeutralAttnProcessor()]):
        for model in ("transformer", "transformer_2"):
            assert (
                f"{model} (WanTransformer3DModel): 4 attention modules\n"
                "  softpag(heads=L0,L1H0, u=0.5, w=2, scope=joint): "
                "2 modules, blocks.0.attn1 .. blocks.1.attn1\n"
                "  neutral: 4 modules, blocks.0.attn1 .. blocks.1.attn2"
            ) in diffctrl.summary(pipe)
    with diffctrl.attach(pipe.transformer):
        assert diffctrl.summary(pipe.transformer) == (
            "WanTransformer3DModel (WanTransformer3DModel): 4 attention modules\n"
            "  context attached, no control active"
        )


def test_statistics_count_forwards_sites_and_engine_calls() -> None:
    pipe = sd3_pipeline()
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L0,attn2:L1", stop_fraction=0.5)) as control:
        generate(pipe, steps=4)
        stats = control.stats()["transformer"]
    assert stats == {
        "family": "sd3",
        "controls": ["softpag(heads=L0,attn2:L1, u=0.5, w=3, scope=joint)"],
        "sites": 5,
        "controlled": 2,
        "forwards": 4,
        "guided_forwards": 2,
        "masked_forwards": 0,
        "captures": {},
        "calls": {"sdpa": 8},
        "dense_calls": 8,
        "sparse_calls": 0,
        "density": 1.0,
        "sparse_density": None,
        "kernel_density": None,
        "fallbacks": {},
    }


def test_set_attn_processor_is_apply() -> None:
    pipe = sd3_pipeline()
    stock = generate(pipe)
    with diffctrl.set_attn_processor(pipe, NeutralAttnProcessor()) as control:
        assert torch.equal(generate(pipe), stock)
        assert control.stats()["transformer"]["controlled"] == 5


def test_a_controlled_model_is_not_copied() -> None:
    pipe = sd3_pipeline()
    attached = wan_pipeline().transformer
    controls = diffctrl.apply(pipe, NeutralAttnProcessor()), diffctrl.attach(attached)
    for model in (pipe.transformer, attached):
        with pytest.raises(TypeError, match=r"cannot be copied; call `control.remove\(\)` first"):
            copy.deepcopy(model)
    for control in controls:
        control.remove()
    copied = copy.deepcopy(pipe.transformer)
    assert diffctrl.summary(copied).endswith("stock attention")


def test_a_compiled_model_is_controlled_through_its_wrapper() -> None:
    model = build("wan")
    wrapped = torch.compile(model, backend="eager")
    with diffctrl.apply(wrapped, NeutralAttnProcessor()) as control:
        assert list(control.contexts) == ["WanTransformer3DModel"]
        assert hasattr(model.blocks[0].attn1, "diffctrl_site")


# --- masks --------------------------------------------------------------------------------------------------


class Masked(ControlAttnProcessor):
    """Publishes one mask for the sites of a kind."""

    method = "masked"

    def __init__(self, lists: BlockLists, kinds: tuple[str, ...] = ("joint", "self")) -> None:
        super().__init__()
        self._lists, self._kinds = lists, kinds

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        names = [site.name for site in context.sites.values() if site.kind in self._kinds]
        return previous or Published("once", masks=dict.fromkeys(names, self._lists))


class MaskedToo(Masked):
    method = "masked-too"


class Dense(ControlAttnProcessor):
    """The reference of `Masked`: additive masks, where the mask of the stock processor is kept."""

    method = "dense"

    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        self._allowed = allowed

    def transform_inputs(self, site: Site, call: Call) -> Call:
        mask = self._allowed if call.attention_mask is None else self._allowed & call.attention_mask
        return replace(call, attention_mask=mask)


def lists_of(blocks: Tensor, length: int) -> BlockLists:
    return BlockLists.from_dense_blocks(blocks[None, None], (8, 8), (length, length))


def random_blocks(count: int, seed: int) -> Tensor:
    blocks = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)) < 0.6
    return blocks | torch.eye(count, dtype=torch.bool)


@pytest.mark.parametrize(("name", "length"), [("hunyuan_video", 52), ("wan", 45), ("sd3", 42), ("flux", 42)])
def test_masks_of_two_controls_are_intersected_and_cut_to_valid_text(name: str, length: int) -> None:
    count = -(-length // 8)
    one, two = random_blocks(count, 1), random_blocks(count, 2)
    one[:, 0] = two[:, 0] = True  # some key is always valid
    model, inputs = shared(name), example(name)
    with diffctrl.apply(model, [Masked(lists_of(one, length)), MaskedToo(lists_of(two, length))]) as control:
        actual = run(model, inputs)
        stats = next(iter(control.stats().values()))
        context = next(iter(control.contexts.values()))
        masks = {site.name: site.mask for site in context.sites.values() if site.kind != "text"}
        valid = context.info.text_valid
    allowed = (one & two).repeat_interleave(8, 0).repeat_interleave(8, 1)[:length, :length]
    with diffctrl.apply(model, Dense(allowed)):
        expected = run(model, inputs)
    assert stats["sparse_calls"] > 0
    assert stats["sparse_density"] < 0.8
    for path, mask in masks.items():
        if context.sites[path].kind == "cross":
            assert mask is None
        elif valid is not None:
            assert mask.n_valid.tolist() == [45 + rows for rows in valid]
    video = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-4 * video


def test_a_mask_is_composed_once_and_kept_while_nothing_changes() -> None:
    length, model, inputs = 52, shared("hunyuan_video"), example("hunyuan_video")
    mask = Masked(lists_of(random_blocks(7, 1) | torch.eye(7)[0].bool(), length))
    other = {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].flip(0)}
    with diffctrl.apply(model, mask) as control:
        site = next(s for s in next(iter(control.contexts.values())).sites.values() if s.kind == "joint")
        run(model, inputs)
        first = site.mask
        run(model, inputs)
        assert site.mask is first
        run(model, other)
        assert site.mask.n_valid.tolist() == [48, 52]
    assert site.mask is None


def test_a_mask_applies_to_twins_with_their_own_text() -> None:
    model, inputs = shared("hunyuan_video"), example("hunyuan_video")
    full = BlockLists.full((8, 8), (52, 52))
    with diffctrl.apply(model, SoftPAGAttnProcessor(u=1.0)):
        dense = run(model, inputs)
    with diffctrl.apply(model, [SoftPAGAttnProcessor(u=1.0), Masked(full)]) as control:
        context = next(iter(control.contexts.values()))
        masked = run(model, inputs)
        assert context.info.text_valid == (7, 3, 7, 3)
    torch.testing.assert_close(masked, dense, rtol=1e-4, atol=1e-4)


def test_the_base_control_does_nothing_by_itself() -> None:
    class Nothing(Control):
        method = "nothing"

    control = Nothing()
    assert control.guidance is None
    assert control.prepare(Context("m", {}), None) is None
    assert control.describe() == "nothing"
