"""Shared checks of every method on every family; the rows are in `tests.helpers` and `tests.methods`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch import nn

import diffctrl
from diffctrl.control import Context, Contributions, ControlHandle, Published
from diffctrl.families import Call, Site, Span, family_of
from diffctrl.processors import ControlAttnProcessor, NeutralAttnProcessor, SoftPAGAttnProcessor
from tests.helpers import CASES, FAMILY_CASES, build, example, rows_of, run, shared, tensors_in
from tests.methods import METHODS, MethodCase

torch.set_num_threads(1)

ALL_ROWS = [
    pytest.param(case, method, id=f"{case}-{method.name}")
    for case in CASES
    for method in METHODS
    if method.families is None or CASES[case].family in method.families
]
# What does not depend on how a variant projects runs on one case of each family.
ROWS = [row for row in ALL_ROWS if row.values[0] in FAMILY_CASES]
NEUTRAL = [row for row in ALL_ROWS if row.values[1].neutral]
ACTIVE = [row for row in ALL_ROWS if not row.values[1].neutral]
EVERY_CASE = pytest.mark.parametrize("name", CASES)
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILY_CASES)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def processors_of(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def context_of(handle: ControlHandle) -> Context:
    return next(iter(handle.contexts.values()))


def assert_stock(model: nn.Module, processors: list[Any]) -> None:
    """The model is as it was before: the same processor objects, no hook, no attribute of ours."""
    now = processors_of(model)
    assert len(now) == len(processors)
    assert all(one is other for one, other in zip(now, processors, strict=True))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    for module in model.modules():
        assert not [name for name in vars(module) if "diffctrl" in name or name == "cache_context"]


def check_neutral(name: str, method: MethodCase, dtype: torch.dtype = torch.float32) -> None:
    model = shared(name, dtype)
    inputs = example(name, model)
    expected = run(model, inputs)
    with diffctrl.apply(model, method.make()):
        actual = run(model, inputs)
    assert torch.isfinite(expected).all()
    assert torch.equal(actual, expected)


class Recorder(ControlAttnProcessor):
    """Keeps the calls of every site, changes nothing."""

    method = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def acts_on(self, site: Site) -> bool:
        return site.kind != "text"

    def transform_inputs(self, site: Site, call: Call) -> Call:
        self.calls[site.name] = call
        return call


def record(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Call], Context]:
    recorder = Recorder()
    with diffctrl.apply(model, recorder) as handle:
        run(model, inputs)
        return recorder.calls, context_of(handle)


# --- neutral is stock ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), NEUTRAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neutral_is_stock_bit_for_bit(name: str, method: MethodCase, dtype: torch.dtype) -> None:
    check_neutral(name, method, dtype)


@pytest.mark.parametrize(("name", "method"), NEUTRAL)
def test_neutral_is_stock_under_autocast(name: str, method: MethodCase) -> None:
    """Weights in float32 as in training: norms of queries and keys then leave float32, layers 16 bits."""
    with torch.autocast("cpu", torch.bfloat16):
        check_neutral(name, method)


@pytest.mark.parametrize(("name", "method"), ACTIVE)
def test_an_active_method_changes_the_prediction(name: str, method: MethodCase) -> None:
    model, inputs = shared(name), example(name)
    expected = run(model, inputs)
    with diffctrl.apply(model, method.make()):
        assert not torch.equal(run(model, inputs), expected)


@EVERY_FAMILY
def test_neutral_is_stock_in_batches_of_one_and_three(name: str) -> None:
    model = shared(name)
    for rows in ((1,), (1, 0, 1)):
        inputs = rows_of(example(name), *rows)
        expected = run(model, inputs)
        with diffctrl.apply(model, NeutralAttnProcessor()):
            assert torch.equal(run(model, inputs), expected)


# --- applying and removing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_removing_restores(name: str, method: MethodCase) -> None:
    model, inputs = shared(name), example(name)
    processors, expected = processors_of(model), run(model, inputs)
    handle = diffctrl.apply(model, method.make())
    assert any(one is not other for one, other in zip(processors_of(model), processors, strict=True))
    run(model, inputs)
    handle.remove()
    assert_stock(model, processors)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_an_exception_in_the_forward_leaves_nothing_behind(name: str, method: MethodCase) -> None:
    model, inputs = shared(name), example(name)
    processors, expected = processors_of(model), run(model, inputs)
    with diffctrl.apply(model, method.make()):
        under_control = run(model, inputs)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    last = model.get_submodule(CASES[name].blocks[-1])[-1]
    with diffctrl.apply(model, method.make()):
        hook = last.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        hook.remove()
        assert torch.equal(run(model, inputs), under_control)  # the next forward is none the worse
        hook = last.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt), diffctrl_leaving(model):
            run(model, inputs)
        hook.remove()
    assert_stock(model, processors)
    assert torch.equal(run(model, inputs), expected)


@contextmanager
def diffctrl_leaving(model: nn.Module) -> Iterator[None]:
    """Nothing is taken off by an exception alone: only the handle does that."""
    controlled = processors_of(model)
    try:
        yield
    finally:
        assert all(one is other for one, other in zip(processors_of(model), controlled, strict=True))


@EVERY_FAMILY
def test_a_second_control_is_refused_and_the_first_stays(name: str) -> None:
    model, inputs = shared(name), example(name)
    with diffctrl.apply(model, NeutralAttnProcessor()) as handle:
        for again in (lambda: diffctrl.apply(model, SoftPAGAttnProcessor()), lambda: diffctrl.attach(model)):
            with pytest.raises(RuntimeError, match=r"already under a control.*one list"):
                again()
        run(model, inputs)
        assert context_of(handle).forwards == 1
    with pytest.raises(RuntimeError, match="removed before"):
        handle.remove()


# --- what a forward does and does not do --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_rows_of_a_batch_equal_single_rows(name: str, method: MethodCase) -> None:
    model, inputs = shared(name), example(name)

    def controlled(inputs: dict[str, Any]) -> torch.Tensor:
        with diffctrl.apply(model, method.make()):
            return run(model, inputs)

    together = controlled(inputs)
    for row in range(len(together)):
        alone = controlled(rows_of(inputs, row))
        # Matrix products of other shapes round differently, in the stock model as well.
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_the_same_forward_gives_the_same_bits_and_edits_no_input(name: str, method: MethodCase) -> None:
    model, inputs = shared(name), example(name)
    before = [tensor.clone() for tensor in tensors_in(inputs)]
    clones: dict[int, list[torch.Tensor]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        clones[id(module)] = [tensor.clone() for tensor in tensors_in([args, kwargs])]

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        for now, then in zip(tensors_in([args, kwargs]), clones[id(module)], strict=True):
            assert torch.equal(now, then), "an input of attention was edited in place"

    with diffctrl.apply(model, method.make()) as handle:
        hooks = []
        for site in context_of(handle).sites.values():
            hooks.append(site.module.register_forward_pre_hook(keep, with_kwargs=True))
            hooks.append(site.module.register_forward_hook(compare, with_kwargs=True))
        first, second = run(model, inputs), run(model, inputs)
        for hook in hooks:
            hook.remove()
    assert torch.equal(first, second)
    assert all(torch.equal(now, then) for now, then in zip(tensors_in(inputs), before, strict=True))


@EVERY_FAMILY
def test_two_models_in_one_process_are_independent(name: str) -> None:
    one, other = shared(name), build(name, seed=5)
    inputs = example(name)
    stock = run(one, inputs), run(other, inputs)
    with diffctrl.apply(one, SoftPAGAttnProcessor()):
        alone = run(one, inputs)
    with diffctrl.apply(one, SoftPAGAttnProcessor()) as first, diffctrl.apply(other, NeutralAttnProcessor()):
        assert torch.equal(run(other, inputs), stock[1])
        assert torch.equal(run(one, inputs), alone)
        assert torch.equal(run(other, inputs), stock[1])
        assert context_of(first).forwards == 1
    assert torch.equal(run(one, inputs), stock[0])


@EVERY_FAMILY
def test_changed_weights_are_seen_and_survive(name: str) -> None:
    model = build(name)
    inputs = example(name, model)
    with diffctrl.apply(model, NeutralAttnProcessor()):
        before = run(model, inputs)
        for path, parameter in model.named_parameters():
            if path.endswith("to_v.weight"):
                parameter.mul_(1.5)
        under_control = run(model, inputs)
    assert not torch.equal(under_control, before)
    assert torch.equal(run(model, inputs), under_control)


@EVERY_FAMILY
def test_a_lora_is_loaded_and_unloaded_under_a_control(name: str) -> None:
    model = build(name)
    inputs = example(name, model)
    stock = run(model, inputs)
    with diffctrl.apply(model, NeutralAttnProcessor()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        with_lora = run(model, inputs)
        model.disable_adapters()
        assert torch.equal(run(model, inputs), stock)
        model.enable_adapters()
    assert not torch.equal(with_lora, stock)
    assert torch.equal(run(model, inputs), with_lora)


# --- where image and text tokens lie ------------------------------------------------------------------------


def check_layout(name: str) -> None:
    case, model, inputs = CASES[name], shared(name), example(name)
    calls, context = record(model, inputs)
    info = context.info
    assert info is not None
    assert (info.grid, info.text_length, info.text_valid) == (case.grid, case.text_length, case.text_valid)
    assert {site.name for site in context.sites.values() if site.kind != "text"} == set(calls)
    for path, call in calls.items():
        site = context.sites[path]
        grid = site.family.site_grid(info.grid, site)
        assert call.image.length == math.prod(grid), f"{path}: {call.image} image tokens, grid {grid}"
        assert call.query.shape[2] == site.heads
        if site.kind == "joint":
            assert call.text is not None
            assert call.text.length == info.text_length
            first, last = sorted((call.image, call.text), key=lambda span: span.start)
            assert (first.start, first.stop, last.stop) == (0, last.start, call.query.shape[1])
            assert (call.text is first) == (site.family.text_side == "first")
        else:
            assert call.text is None
            assert call.image.stop == call.query.shape[1]
        keys = info.text_length if site.kind == "cross" else call.query.shape[1]
        assert call.key.shape[1] == call.value.shape[1] == keys
        assert call.query.is_floating_point()
        check_valid_lengths(case.text_valid, site, call)
    check_text_side(name, calls)


def check_valid_lengths(valid: tuple[int, ...] | None, site: Site, call: Call) -> None:
    """The mask of a call attends exactly the image tokens of a joint sequence and the valid text tokens."""
    if valid is None or site.kind == "self":
        assert call.attention_mask is None
        return
    mask = call.attention_mask
    assert mask is not None
    attended = mask if mask.dtype == torch.bool else mask == 0
    image = call.image.length if site.kind == "joint" else 0
    assert attended[:, 0, 0].sum(dim=1).tolist() == [image + count for count in valid]


def check_text_side(name: str, calls: dict[str, Call]) -> None:
    """Other latents change the values of the image tokens in the first joint site, and of no text token."""
    joint = next((path for path, call in calls.items() if call.text is not None), None)
    if joint is None:
        return
    model, inputs = shared(name), example(name)
    inputs["hidden_states"] = inputs["hidden_states"] + 1.0
    other = record(model, inputs)[0][joint]
    same = (calls[joint].value == other.value).all(dim=(0, 2, 3))
    span = calls[joint].text
    assert span is not None
    assert same[span.start : span.stop].all()
    assert not same[calls[joint].image.start : calls[joint].image.stop].any()


@EVERY_CASE
def test_the_grid_and_the_spans_are_where_the_tokens_are(name: str) -> None:
    check_layout(name)


@EVERY_CASE
def test_heads_and_layers_are_named_once(name: str) -> None:
    model = shared(name)
    family = family_of(model)
    sites = family.sites(model)
    places = [(site.kind, site.stack, site.layer) for site in sites]
    assert len(set(places)) == len(places)
    counted = [site for site in sites if site.kind in ("joint", "self") and site.stack in family.stacks]
    assert sorted(family.flat_layer(sites, site) for site in counted) == list(range(len(counted)))


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (11, 7), (13, 5)])
def test_unet_levels_round_up_where_the_size_is_odd(size: tuple[int, int]) -> None:
    model, inputs = shared("sdxl"), example("sdxl")
    inputs["sample"] = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    calls, context = record(model, inputs)
    for path, call in calls.items():
        site = context.sites[path]
        assert call.image.length == math.prod(site.family.site_grid((1, *size), site))
    levels = {site.stack: {s.level for s in context.sites.values() if s.stack == site.stack} for site in
              context.sites.values()}  # fmt: skip
    assert levels == {"down": {1, 2}, "mid": {2}, "up": {1, 2}}


def test_a_grid_that_the_call_does_not_say_is_not_guessed() -> None:
    for name, change in (
        ("ltx", {"num_frames": None, "video_coords": torch.rand(2, 3, 45)}),
        ("flux", {"img_ids": torch.cat([example("flux")["img_ids"][:30], torch.ones(5, 3)])}),
    ):
        _, context = record(shared(name), {**example(name), **change})
        with pytest.raises(RuntimeError, match=r"does not say its token grid.*img_ids.*num_frames"):
            context.grid()


def test_ltx_coordinates_say_the_grid_where_they_are_one() -> None:
    axes = torch.arange(3) * 8 / 25, torch.arange(5) * 32.0, torch.arange(3) * 32.0
    coordinates = torch.cartesian_prod(*axes).T.expand(2, -1, -1)
    _, context = record(shared("ltx"), {**example("ltx"), "num_frames": None, "video_coords": coordinates})
    assert context.grid() == (3, 5, 3)


@EVERY_FAMILY
def test_gradients_are_those_of_the_stock_model(name: str) -> None:
    """Length LoRAs are trained under a control."""
    model, inputs = build(name), example(name)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            model(**inputs, return_dict=False)[0].square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    stock = gradients()
    with diffctrl.apply(model, NeutralAttnProcessor()):
        controlled = gradients()
    for one, other in zip(controlled, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_mochi_text_may_be_valid_anywhere() -> None:
    model, inputs = shared("mochi"), example("mochi")
    inputs["encoder_attention_mask"] = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]])
    expected = run(model, inputs)
    with diffctrl.apply(model, NeutralAttnProcessor()) as handle:
        assert torch.equal(run(model, inputs), expected)
        assert context_of(handle).info.text_valid == (4, 3)


# --- set_attn_processor, backends, errors -------------------------------------------------------------------


@EVERY_CASE
def test_the_models_own_set_attn_processor_works_once_attached(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared(name)
    inputs, processors = example(name), processors_of(model)
    expected = run(model, inputs)
    if not hasattr(model, "set_attn_processor"):  # diffusers gives Mochi none
        assert CASES[name].family == "mochi"
        with diffctrl.set_attn_processor(model, NeutralAttnProcessor()) as control:
            assert torch.equal(run(model, inputs), expected)
            (stats,) = control.stats().values()
            assert stats["controlled"] > 0
        return
    delegated = []
    with diffctrl.attach(model) as handle:
        sites = context_of(handle).sites
        for processor in {type(site.stock) for site in sites.values()}:

            def spy(
                self: Any, attn: nn.Module, *args: Any, stock: Any = processor.__call__, **rest: Any
            ) -> Any:
                delegated.append(attn.diffctrl_site.kind)
                return stock(self, attn, *args, **rest)

            monkeypatch.setattr(processor, "__call__", spy)
        model.set_attn_processor(SoftPAGAttnProcessor(u=0.0))
        assert torch.equal(run(model, inputs), expected)
        monkeypatch.undo()
        left_alone = sorted(site.kind for site in sites.values() if site.kind in ("cross", "text"))
        assert sorted(delegated) == left_alone
    assert all(one is two for one, two in zip(processors_of(model), processors, strict=True))
    assert torch.equal(run(model, inputs), expected)


def test_a_method_that_is_set_without_attach_says_what_to_do() -> None:
    model = build("wan")
    model.set_attn_processor(SoftPAGAttnProcessor())
    with pytest.raises(
        RuntimeError, match=r"WanAttention knows no context: call `diffctrl\.attach\(model\)`"
    ):
        run(model, example("wan", model))


def test_what_apply_checks_is_checked_after_attach_too() -> None:
    model, inputs = build("wan"), example("wan")
    with diffctrl.attach(model):
        model.set_attn_processor(SoftPAGAttnProcessor("L9H0"))
        with pytest.raises(ValueError, match="head L9H0 does not exist"):
            run(model, inputs)


@pytest.fixture
def _active_backend_kept() -> Iterator[None]:
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_active_backend_kept")
@pytest.mark.parametrize("name", ["flux", "wan-i2v", "hunyuan_video", "ltx"])
def test_a_backend_that_was_set_before_is_honoured(name: str) -> None:
    model, inputs = build(name), example(name)
    model.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend("native")  # diffusers sets it process-wide as well
    expected = run(model, inputs)
    with diffctrl.apply(model, NeutralAttnProcessor()) as handle:
        assert torch.equal(run(model, inputs), expected)
        calls = next(iter(handle.stats().values()))["calls"]
        model.set_attention_backend("native")
        _AttentionBackendRegistry.set_active_backend("native")
        assert torch.equal(run(model, inputs), run(shared(name), inputs))
    assert set(calls) == {"_native_math"}


class _Guiding(NeutralAttnProcessor):
    method = "other"
    contributes = Contributions(guides=True)


class _OnlyOnFlux(NeutralAttnProcessor):
    families = ("flux",)


def test_errors_name_what_was_given_and_what_is_accepted() -> None:
    model = build("unet")
    stock = processors_of(model)
    apply = diffctrl.apply
    with pytest.raises(
        TypeError, match=r"does not know the model class torch.*Linear.*WanTransformer3DModel"
    ):
        apply(nn.Linear(2, 2), NeutralAttnProcessor())
    with pytest.raises(TypeError, match=r"cannot control a dict.*transformer.*unet"):
        apply({}, NeutralAttnProcessor())
    with pytest.raises(TypeError, match=r"got a AttnProcessor2_0.*processors of diffctrl\.processors"):
        apply(model, stock[0])
    with pytest.raises(ValueError, match="empty list"):
        apply(model, [])
    with pytest.raises(ValueError, match=r"softpag and softpag cannot be combined: one control per method"):
        apply(model, [SoftPAGAttnProcessor(), SoftPAGAttnProcessor()])
    with pytest.raises(
        ValueError, match=r"softpag and other cannot be combined: both append a perturbed twin"
    ):
        apply(model, [SoftPAGAttnProcessor(), _Guiding()])
    with pytest.raises(TypeError, match=r"neutral does not support Stable Diffusion / SDXL.*flux"):
        apply(model, _OnlyOnFlux())
    with pytest.raises(ValueError, match=r"head L99 does not exist.*stacks down, mid, up"):
        apply(model, SoftPAGAttnProcessor("L99"))
    assert_stock(model, stock)


def test_a_class_of_the_same_name_is_not_taken_for_the_models() -> None:
    imitation = type("WanTransformer3DModel", (nn.Linear,), {})(2, 2)
    with pytest.raises(TypeError, match="does not know the model class"):
        diffctrl.apply(imitation, NeutralAttnProcessor())
    derived = type("Derived", (type(shared("ltx")),), {})
    with pytest.raises(TypeError, match="does not know the model class"):
        family_of(derived.from_config(shared("ltx").config))


def test_foreign_processors_are_refused_by_name() -> None:
    model = build("unet")
    model.set_attention_slice(1)
    with pytest.raises(TypeError, match=r"runs the processor SlicedAttnProcessor.*knows AttnProcessor, Attn"):
        diffctrl.apply(model, NeutralAttnProcessor())
    model = build("flux")
    derived = type("MyFluxProcessor", (FluxAttnProcessor,), {})
    model.transformer_blocks[1].attn.set_processor(derived())
    with pytest.raises(TypeError, match=r"transformer_blocks\.1\.attn .* MyFluxProcessor.*unload"):
        diffctrl.apply(model, NeutralAttnProcessor())


# --- two controls compose -----------------------------------------------------------------------------------


class _Scaled(NeutralAttnProcessor):
    """Multiplies attention outputs by what it published."""

    method = "scaled"

    def prepare(self, context: Context, previous: Published | None) -> Published:
        return previous or Published("once", dict.fromkeys(context.sites, torch.tensor(1.25)))

    def transform_output(self, site: Site, call: Call, output: torch.Tensor) -> torch.Tensor:
        return output * site.published[self.method]


@EVERY_FAMILY
def test_a_list_of_controls_acts_in_one_pass(name: str) -> None:
    model, inputs = shared(name), example(name)
    with diffctrl.apply(model, _Scaled()):
        alone = run(model, inputs)
    for controls in ([_Scaled(), SoftPAGAttnProcessor(u=0.0)], [SoftPAGAttnProcessor(u=0.0), _Scaled()]):
        with diffctrl.apply(model, controls):
            assert torch.equal(run(model, inputs), alone)


# --- the checks above would notice --------------------------------------------------------------------------


class _Without:
    """An attention module whose named norm does nothing."""

    def __init__(self, attn: nn.Module, name: str) -> None:
        self._attn, self._name = attn, name

    def __getattr__(self, name: str) -> Any:
        return nn.Identity() if name == self._name else getattr(self._attn, name)


def _forget(name: str) -> Any:
    return lambda project: lambda attn, inputs: project(_Without(attn, name), inputs)


def _changed(change: Any) -> Any:
    return lambda project: lambda attn, inputs: change(project(attn, inputs))


def _swap_query_and_key(call: Call) -> Call:
    return call.with_heads(call.key, call.query, call.value) if call.key.shape == call.query.shape else call


def _swap_spans(call: Call) -> Call:
    if call.text is None:
        return call
    total, text = call.query.shape[1], call.text.length
    if call.text.start == 0:
        return replace(call, image=Span(0, total - text), text=Span(total - text, total))
    return replace(call, image=Span(text, total), text=Span(0, text))


def _dropping(field: str, value: Any) -> Any:
    return _changed(lambda call: replace(call, **{field: value}))


FAULTS = [
    *[(name, "query and key swapped", _changed(_swap_query_and_key)) for name in FAMILY_CASES],
    *[(name, "norm_q forgotten", _forget("norm_q")) for name in FAMILY_CASES if name not in ("sd3", "unet")],
    *[(name, "spans swapped", _changed(_swap_spans)) for name in
      ("sd3", "flux", "flux-single", "hunyuan_video", "hunyuan_video-single", "mochi", "cogvideox")],
    ("sd3.5", "norm_k forgotten", _forget("norm_k")),
    ("sd3.5", "norm_added_q forgotten", _forget("norm_added_q")),
    ("flux", "norm_added_k forgotten", _forget("norm_added_k")),
    ("hunyuan_video", "mask dropped", _dropping("attention_mask", None)),
    ("ltx", "mask dropped", _dropping("attention_mask", None)),
    ("sdxl", "mask dropped", _dropping("attention_mask", None)),
    ("wan-i2v", "image branch dropped", _dropping("added", ())),
]  # fmt: skip


def failed_checks(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    family = type(family_of(shared(name)))
    routes = {key: replace(route, project=fault(route.project)) for key, route in family().routes().items()}
    monkeypatch.setattr(family, "routes", lambda self: routes)
    failed = 0
    for check in (lambda: check_neutral(name, METHODS[0]), lambda: check_layout(name)):
        try:
            check()
        except (AssertionError, RuntimeError):
            failed += 1
    return failed


@pytest.mark.parametrize(
    ("name", "fault"), [pytest.param(name, fault, id=f"{name}: {what}") for name, what, fault in FAULTS]
)
def test_a_planted_fault_turns_the_table_red(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed_checks(name, fault, monkeypatch)


def test_planting_nothing_leaves_the_table_green(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed_checks("flux", _changed(lambda call: call), monkeypatch)
