"""The guider of modular pipelines: passes told apart by name, one meaning of w, nothing left on the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep
from torch import Tensor, nn

import diffctrl
from diffctrl.pipelines import SoftPAGGuidance
from diffctrl.processors import NeutralAttnProcessor, SoftPAGAttnProcessor
from diffctrl.processors.universe import universe_of
from diffctrl.softpag import Head, SoftPAGConfig, guide, rescaled
from diffctrl.softpag.headset import Chosen, HeadSet
from tests.helpers import build, example, run
from tests.pipelines import flux_pipeline, generate, prompts, sd3_pipeline

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def modular(guider: Any, model: nn.Module, steps: int = 4, negative: bool = True, batch: int = 1) -> Tensor:
    """The latents of diffusers' own modular denoising loop of SD3 around the tiny model."""
    pipe = StableDiffusion3DenoiseStep().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=model, scheduler=scheduler, guider=guider)
    stock = sd3_pipeline()
    given = prompts(stock, batch)
    if not negative:
        given = {name: value for name, value in given.items() if "negative" not in name}
    scheduler.set_timesteps(steps)
    latents = torch.randn(batch, 4, 10, 6, generator=torch.Generator().manual_seed(0))
    return pipe(
        latents=latents,
        timesteps=scheduler.timesteps,
        num_inference_steps=steps,
        output="latents",
        **given,
    )


def classic(processor: Any, scale: float, steps: int = 4) -> Tensor:
    pipe = sd3_pipeline()
    with diffctrl.apply(pipe, processor):
        return generate(pipe, steps=steps, guidance_scale=scale)


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_the_guider_equals_the_wrapper(scale: float) -> None:
    """Same seed, same latents: SD3 with classifier-free guidance and without."""
    options: dict[str, Any] = {"heads": "L1H0,attn2:L1=0.9", "u": 0.6, "w": 2.5, "stop": 0.5}
    guided = modular(SoftPAGGuidance(guidance_scale=scale, **options), build("sd3.5"), negative=scale != 1)
    stop = options.pop("stop")
    heads = options.pop("heads")
    processor = SoftPAGAttnProcessor(heads, stop_fraction=stop, **options)
    torch.testing.assert_close(guided, classic(processor, scale), rtol=1e-4, atol=1e-4)
    off = modular(SoftPAGGuidance(guidance_scale=scale, u=0.0), build("sd3.5"), negative=scale != 1)
    assert (off - guided).abs().max() > 1e-2


def test_without_cfg_the_wrapper_on_flux_and_the_guider_by_hand_agree() -> None:
    """FLUX has no modular loop that takes a guider: the guider's own interface is walked through."""
    pipe = flux_pipeline()
    model, inputs = pipe.transformer, example("flux")
    guider = SoftPAGGuidance(guidance_scale=1.0, heads="L1H0", w=8.0)
    named = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    pred = stepped(guider, model, {"hidden_states": named.pop("hidden_states")}, named)
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", w=8.0)):
        torch.testing.assert_close(pred, run(model, inputs), rtol=1e-5, atol=1e-5)


def stepped(
    guider: Any, model: nn.Module, split: dict[str, Any], rest: dict[str, Any], step: int = 0
) -> Tensor:
    """One step of a loop such as diffusers' own."""
    guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(500))
    batches = guider.prepare_inputs(split)
    for batch in batches:
        guider.prepare_models(model)
        arguments = {name: getattr(batch, name) for name in split}
        batch.noise_pred = model(**arguments, **rest, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches).pred


def sd3_inputs() -> tuple[dict[str, Any], dict[str, Any]]:
    """(what has a conditional and an unconditional form, the rest)."""
    one, other = example("sd3"), example("sd3", seed=7)
    split = {
        "hidden_states": (one["hidden_states"], one["hidden_states"]),
        "encoder_hidden_states": (one["encoder_hidden_states"], other["encoder_hidden_states"]),
        "pooled_projections": (one["pooled_projections"], other["pooled_projections"]),
    }
    return split, {"timestep": one["timestep"]}


@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_step_is_the_formula_of_its_passes(scale: float, rescale: float) -> None:
    model = build("sd3")
    split, rest = sd3_inputs()
    pred = stepped(
        SoftPAGGuidance(guidance_scale=scale, heads="L1", w=3.0, rescale=rescale), model, split, rest
    )
    c, e = (run(model, {**{n: v[i] for n, v in split.items()}, **rest}) for i in (0, 1))
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1"), batch_layout="perturbed"):
        p = run(model, {**{n: v[0] for n, v in split.items()}, **rest})
    assert (c - p).abs().max() > 1e-3
    expected = guide(c, p, 3.0, None if scale == 1 else e, scale)
    if rescale:
        expected = rescaled(expected, c, rescale)
    torch.testing.assert_close(pred, expected, rtol=1e-5, atol=1e-5)


def test_passes_are_named_and_the_third_gets_the_positive_prompt() -> None:
    split, _ = sd3_inputs()
    for scale, names in ((5.0, ["pred_cond", "pred_uncond", "pred_cond_perturbed"]),
                         (1.0, ["pred_cond", "pred_cond_perturbed"])):  # fmt: skip
        guider = SoftPAGGuidance(guidance_scale=scale)
        guider.set_state(0, 10, torch.tensor(1))
        batches = guider.prepare_inputs(split)
        assert [getattr(batch, "__guidance_identifier__") for batch in batches] == names  # noqa: B009
        assert guider.num_conditions == len(names)
        assert batches[-1].encoder_hidden_states is split["encoder_hidden_states"][0]


def test_the_window_is_half_open_and_step_zero_is_in_it() -> None:
    guider = SoftPAGGuidance(guidance_scale=1.0, stop=0.3)
    counts = []
    for step in range(10):
        guider.set_state(step, 10, torch.tensor(1))
        counts.append(guider.num_conditions)
    assert counts == [2, 2, 2] + [1] * 7
    guider = SoftPAGGuidance(guidance_scale=4.0, start=0.5)
    guider.set_state(4, 10, torch.tensor(1))
    assert guider.num_conditions == 2  # classifier-free guidance is not bound to the window
    guider.disable()
    assert guider.num_conditions == 1


def test_nothing_is_left_on_the_model() -> None:
    model = build("sd3")
    before = {
        name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")
    }
    split, rest = sd3_inputs()
    guider = SoftPAGGuidance(guidance_scale=1.0, heads="L1")
    first = stepped(guider, model, split, rest)

    def now() -> dict[str, Any]:
        return {
            name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")
        }

    assert now() == before
    assert not any(hasattr(module, "diffctrl_site") for module in model.modules())
    # A forward that fails inside of the perturbed pass: the next step, of this run or another, cleans up.
    calls = 0

    def fail(module: nn.Module, args: tuple) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise FloatingPointError("planted")

    hook = model.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        stepped(guider, model, split, rest, step=1)
    hook.remove()
    assert torch.equal(stepped(guider, model, split, rest), first)
    assert now() == before
    with diffctrl.apply(model, NeutralAttnProcessor()), pytest.raises(RuntimeError, match="under a control"):
        stepped(guider, model, split, rest)


def test_a_head_set_of_another_model_is_refused() -> None:
    """Though the model has heads of these names."""
    model, (split, rest) = build("sd3"), sd3_inputs()
    own, other = (
        HeadSet(chosen=(Chosen(Head(1, 1)),), signature=universe_of(each).signature, use={"u": 0.4, "w": 2.0})
        for each in (model, build("flux"))
    )
    by_name = stepped(SoftPAGGuidance(guidance_scale=1.0, heads="L1H1", u=0.4, w=2.0), model, split, rest)
    assert torch.equal(stepped(SoftPAGGuidance(guidance_scale=1.0, heads=own), model, split, rest), by_name)
    with pytest.raises(ValueError, match=r"found on FluxTransformer2DModel.*heads mean nothing there"):
        stepped(SoftPAGGuidance(guidance_scale=1.0, heads=other), model, split, rest)
    assert not any(hasattr(module, "diffctrl_site") for module in model.modules())


def test_the_same_processor_objects_serve_every_step() -> None:
    """Compiled blocks would be compiled anew for others."""
    model = build("sd3")
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.transformer_blocks[1].attn.processor))
    split, rest = sd3_inputs()
    guider = SoftPAGGuidance(guidance_scale=1.0, heads="L1")
    for step in range(3):
        stepped(guider, model, split, rest, step=step)
    assert [isinstance(each, SoftPAGAttnProcessor) for each in seen] == [False, True] * 3
    assert seen[1] is seen[3] is seen[5]


def test_a_loop_that_does_not_walk_is_refused() -> None:
    split, _ = sd3_inputs()
    guider = SoftPAGGuidance()
    guider.set_state(0, 10, torch.tensor(1))
    guider.prepare_inputs(split)
    with pytest.raises(RuntimeError, match="does not know which pass begins"):
        guider.prepare_models(build("sd3"))


def test_the_configuration_goes_through_json(tmp_path: Any) -> None:
    guider = SoftPAGGuidance(
        guidance_scale=4.0,
        heads={"L1H0": 0.3, "L2": 0.9},
        w=2.0,
        kind="temperature",
        temperature=0.5,
        difference="apg",
        apg_momentum=-0.5,
        rescale=0.2,
        start=0.1,
        stop=0.7,
    )
    guider.save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["heads"] == "L1H0=0.3,L2=0.9"
    again = SoftPAGGuidance.from_pretrained(tmp_path)
    assert (again.settings, again.guidance_scale) == (guider.settings, 4.0)
    assert guider.new(w=5.0).settings == SoftPAGConfig(
        **{**{name: getattr(guider.settings, name) for name in SoftPAGConfig.__slots__}, "w": 5.0}
    )
    with pytest.raises(ValueError, match=r"u=2\.0 is not in"):
        SoftPAGGuidance(u=2.0)


def test_momentum_lasts_for_one_run() -> None:
    model = build("sd3")
    split, rest = sd3_inputs()
    options: dict[str, Any] = {"guidance_scale": 1.0, "heads": "L1", "difference": "apg"}
    plain = stepped(SoftPAGGuidance(**options), model, split, rest)
    guider = SoftPAGGuidance(**options, apg_momentum=0.5)
    steps = [stepped(guider, model, split, rest, step=step) for step in (0, 1, 0)]
    assert torch.equal(steps[0], plain)
    assert not torch.equal(steps[1], plain)
    assert torch.equal(steps[2], plain)


@pytest.mark.parametrize("name", ["ClassifierFreeGuidance", "AdaptiveProjectedGuidance"])
def test_a_base_treats_the_other_predictions(name: str, tmp_path: Any) -> None:
    """Its result plus w (c - p); with plain guidance as the base, what `guidance_scale` gives."""
    from diffusers import guiders

    model, (split, rest) = build("sd3"), sd3_inputs()
    options: dict[str, Any] = {"guidance_scale": 4.0}
    if name == "AdaptiveProjectedGuidance":
        options |= {"eta": 0.0, "adaptive_projected_guidance_rescale": 1.0}
    base = getattr(guiders, name)(**options)
    guider = SoftPAGGuidance(base=base, heads="L1", w=2.0)
    assert guider.num_conditions == 3
    pred = stepped(guider, model, split, rest)
    c, e = (run(model, {**{n: v[i] for n, v in split.items()}, **rest}) for i in (0, 1))
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1"), batch_layout="perturbed"):
        p = run(model, {**{n: v[0] for n, v in split.items()}, **rest})
    alone = stepped(getattr(guiders, name)(**options), model, split, rest)
    torch.testing.assert_close(pred, alone + 2.0 * (c - p), rtol=1e-5, atol=1e-5)
    if name == "ClassifierFreeGuidance":
        same = stepped(SoftPAGGuidance(guidance_scale=4.0, heads="L1", w=2.0), model, split, rest)
        torch.testing.assert_close(pred, same, rtol=1e-5, atol=1e-5)
    else:
        assert (alone - (e + 4.0 * (c - e))).abs().max() > 1e-3
    assert not any(hasattr(module, "diffctrl_site") for module in model.modules())
    guider.save_pretrained(tmp_path)
    again = SoftPAGGuidance.from_pretrained(tmp_path)
    torch.testing.assert_close(stepped(again, model, split, rest), pred)
    guider.disable()
    assert guider.num_conditions == 1


def test_a_base_in_a_whole_modular_run() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    options: dict[str, Any] = {"heads": "L1H0", "w": 2.5, "stop": 0.5}
    based = modular(
        SoftPAGGuidance(base=ClassifierFreeGuidance(guidance_scale=4.0), **options), build("sd3.5")
    )
    plain = modular(SoftPAGGuidance(guidance_scale=4.0, **options), build("sd3.5"))
    torch.testing.assert_close(based, plain, rtol=1e-4, atol=1e-4)


def test_a_base_that_cannot_be_one_is_refused() -> None:
    from diffusers.guiders import ClassifierFreeGuidance, PerturbedAttentionGuidance

    with pytest.raises(ValueError, match="PerturbedAttentionGuidance runs a perturbed pass of its own"):
        SoftPAGGuidance(base=PerturbedAttentionGuidance(perturbed_guidance_layers=1))
    with pytest.raises(TypeError, match="base is a float; it takes a guider"):
        SoftPAGGuidance(base=4.0)
    with pytest.raises(ValueError, match="the guider 'os', which"):
        SoftPAGGuidance(base={"class": "os", "config": {}})
    with pytest.raises(ValueError, match="give the scale to the base"):
        SoftPAGGuidance(guidance_scale=3.0, base=ClassifierFreeGuidance())
