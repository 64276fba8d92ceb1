"""Capture on models: against the maps that the stock processors attend with, and what it leaves alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import diffctrl
from diffctrl import CaptureSpec
from diffctrl.attention import BlockLists
from diffctrl.control import Context, Contributions, Published
from diffctrl.control.capture_task import run_task
from diffctrl.families import Call, Inputs, Span, family_of
from diffctrl.processors import CaptureAttnProcessor, ControlAttnProcessor, SoftPAGAttnProcessor
from diffctrl.processors import capture as capture_module
from tests.attention.cases import random_lists
from tests.helpers import (
    BATCH,
    CASES,
    TEXT,
    FixedScheduler,
    build,
    example,
    rows_of,
    run,
    shared,
)
from tests.image_models import flux_ids
from tests.pipelines import flux_pipeline, generate, sd3_pipeline, wan_pipeline

torch.set_num_threads(1)

FAMILIES = ("flux", "sd3", "mochi", "wan", "cogvideox", "hunyuan_video", "ltx", "sdxl")
# Where the text tokens lie among the keys, as the papers and the models' code have it; not as a family says.
TEXT_FIRST = ("flux", "cogvideox")
ROUTES = (None, "second_call", "chunked", "one_hot")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- what the stock model attends with, read where torch computes it ----------------------------------------


@contextmanager
def heard() -> Iterator[list[tuple[Tensor, Tensor, Any]]]:
    """(query (B, H, Sq, D), key, mask) of every call of torch's attention."""
    calls: list[tuple[Tensor, Tensor, Any]] = []
    stock = F.scaled_dot_product_attention

    def listen(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **rest: Any
    ) -> Any:
        calls.append((query, key, attn_mask))
        return stock(query, key, value, attn_mask, *args, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", listen)
        yield calls


def stock_maps(name: str, inputs: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """(B, H, Sq, Sk) in float64 of each attention module of the stock model, by name."""
    model, maps = shared(name), {}
    inputs = example(name) if inputs is None else inputs
    with heard() as calls:
        hooks, counts = [], {}

        def before(path: str) -> Any:
            return lambda *_: counts.__setitem__(path, len(calls))

        def after(path: str) -> Any:
            return lambda *_: maps.__setitem__(path, calls[counts[path] :])

        for path, module in family_of(model).attention_modules(model):
            hooks += [
                module.register_forward_pre_hook(before(path)),
                module.register_forward_hook(after(path)),
            ]
        run(model, inputs)
        for hook in hooks:
            hook.remove()
    return {path: _joined([_softmax(*call) for call in made]) for path, made in maps.items()}


def _softmax(query: Tensor, key: Tensor, mask: Any) -> Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0.0)


def _joined(made: list[Tensor]) -> Tensor:
    """Of the rows of Mochi, which attends one after another over its own valid tokens; of the text alone in
    Wan's image to video, which attends the image's tokens beside it."""
    if len(made) == 1 or len(made[0]) > 1:
        return max(made, key=lambda one: one.shape[-1])
    most = max(one.shape[-1] for one in made)
    return torch.cat([F.pad(one, (0, most - one.shape[-1]) * 2) for one in made])


def expected_block(name: str, whole: Tensor, queries: str, keys: str) -> Tensor:
    """The part of a stock map that a spec speaks of."""
    case, image = CASES[name], math.prod(CASES[name].grid)
    if name in ("wan", "ltx", "sdxl"):
        return whole
    total = image + case.text_length
    whole = F.pad(whole, (0, total - whole.shape[-1], 0, total - whole.shape[-2]))  # Mochi: all are padded
    text = slice(0, case.text_length) if name in TEXT_FIRST else slice(image, total)
    places = {"text": text, "image": slice(text.stop, total) if name in TEXT_FIRST else slice(0, image)}
    if case.text_valid is not None and queries == "text":  # queries of padding have no weights
        valid = torch.arange(case.text_length) < torch.tensor(case.text_valid)[:, None]
        return whole[:, :, places["text"], places[keys]] * valid[:, None, :, None]
    return whole[:, :, places[queries], places[keys]]


def captured_blocks(name: str, spec: CaptureSpec, **options: Any) -> dict[str, Tensor]:
    """(B, H, Q, K) of each captured block, by the name of its attention module."""
    model, inputs = shared(name), example(name)
    with diffctrl.capture(model, spec, **options) as maps:
        run(model, inputs)
    result = maps.result()
    return dict(zip(result.sites, result.values.unbind(1), strict=True))


def check(name: str, queries: Any = "image", keys: Any = "text", **options: Any) -> None:
    stock = stock_maps(name)
    # Blocks of a UNet are of several sizes: one capture for each.
    groups = [(index,) for index in range(len(cross_sites(name)))] if name == "sdxl" else [None]
    for blocks in groups:
        spec = CaptureSpec(queries=queries, keys=keys, heads="each", blocks="each", only_blocks=blocks)
        for path, actual in captured_blocks(name, spec, **options).items():
            expected = expected_block(name, stock[path], queries, keys)
            torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
            assert float(expected.amax()) > 1.5 * float(expected.mean()), "a flat map tells nothing"


def cross_sites(name: str) -> list[Any]:
    model = shared(name)
    return [site for site in family_of(model).sites(model) if site.kind == "cross"]


JOINT = [name for name in FAMILIES if name not in ("wan", "ltx", "sdxl")]
REGIONS = [("image", "text"), ("text", "text"), ("text", "image"), ("image", "image")]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FAMILIES)
def test_captured_weights_are_those_of_the_stock_model(name: str, route: Any) -> None:
    check(name, route=route)


@pytest.mark.parametrize(("queries", "keys"), REGIONS[1:])
@pytest.mark.parametrize("name", JOINT)
def test_other_regions_of_a_joint_map(name: str, queries: str, keys: str) -> None:
    check(name, queries, keys)


@pytest.mark.parametrize("name", ["sd3.5", "flux-fused", "wan-i2v", "cogvideox-1.5", "hunyuan_video-i2v"])
def test_variants_of_a_family(name: str) -> None:
    model, inputs, maps = shared(name), example(name), stock_maps(name)
    with diffctrl.capture(model, CaptureSpec(heads="each", blocks="each")) as captured:
        run(model, inputs)
    result = captured.result()
    image, first = math.prod(CASES[name].grid), name.startswith(TEXT_FIRST)
    for path, actual in zip(result.sites, result.values.unbind(1), strict=True):
        whole = maps[path]
        if name != "wan-i2v":
            whole = whole[:, :, -image:, :TEXT] if first else whole[:, :, :image, image:]
        torch.testing.assert_close(actual.double(), whole, atol=1e-5, rtol=1e-5)


# --- the checks above would notice --------------------------------------------------------------------------


class _As:
    """An attention module with some attributes of others."""

    def __init__(self, attn: nn.Module, **others: str) -> None:
        self._attn, self._others = attn, others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, self._others.get(name, name))


def _other_norm(project: Any) -> Any:
    """Keys of the text normed with the weights of its queries."""
    return lambda attn, inputs: project(_As(attn, norm_added_k="norm_added_q"), inputs)


def _before_rotation(project: Any) -> Any:
    def changed(attn: nn.Module, inputs: Inputs) -> Call:
        return project(attn, replace(inputs, image_rotary_emb=None))

    return changed


def _before_norm(project: Any) -> Any:
    identity = nn.Identity()

    class Without(_As):
        def __getattr__(self, name: str) -> Any:
            return identity if name in ("norm_q", "norm_k") else super().__getattr__(name)

    return lambda attn, inputs: project(Without(attn), inputs)


FAULTS = [
    ("flux", _other_norm),
    ("mochi", _other_norm),
    ("flux", _before_rotation),
    ("hunyuan_video", _before_rotation),
    ("mochi", _before_rotation),
    ("ltx", _before_norm),
    ("wan", _before_norm),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_planted_fault_is_noticed(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = type(family_of(shared(name)))
    routes = {key: replace(route, project=fault(route.project)) for key, route in family().routes().items()}
    monkeypatch.setattr(family, "routes", lambda self: routes)
    with pytest.raises(AssertionError, match="not close"):
        check(name)


@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox"])
def test_swapped_spans_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(ticket: Tensor, call: Call, lse: Tensor | None) -> None:
        assert call.text is not None
        text, total = call.text.length, call.query.shape[1]
        image_first = replace(call, image=Span(0, total - text), text=Span(total - text, total))
        text_first = replace(call, image=Span(text, total), text=Span(0, text))
        run_task(ticket, image_first if call.text.start == 0 else text_first, lse)

    monkeypatch.setattr(capture_module, "run_task", swapped)
    with pytest.raises(AssertionError, match="not close"):
        check(name)


# --- where text and image lie -------------------------------------------------------------------------------


def captured(name: str, inputs: dict[str, Any], spec: CaptureSpec, **options: Any) -> Any:
    model = shared(name)
    with diffctrl.capture(model, spec, **options) as maps:
        run(model, inputs)
    return maps.result()


def test_all_blocks_of_both_kinds_are_captured() -> None:
    """Double and single blocks of FLUX; five text and nine image tokens (specification, row 4)."""
    inputs = example("flux")
    for key, value in {"hidden_states": (2, 9, 8), "encoder_hidden_states": (2, 5, 24)}.items():
        inputs[key] = torch.randn(*value, generator=torch.Generator().manual_seed(0))
    inputs |= {"img_ids": flux_ids(3, 3), "txt_ids": torch.zeros(5, 3)}
    result = captured("flux", inputs, CaptureSpec(blocks="each"))
    assert result.values.shape == (2, 4, 9, 5)
    assert result.blocks == (0, 1, 2, 3)
    assert [site.split("_", 1)[0] for site in result.sites] == ["transformer"] * 2 + ["single"] * 2


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_image_tokens_lie_row_by_row_on_a_grid_that_is_not_square(name: str) -> None:
    result = captured(name, example(name), CaptureSpec(only_keys=(4, 2)))
    frames, rows, columns = CASES[name].grid
    assert rows != columns
    heat = result.on_grid()
    assert heat.shape == (2, 2, frames, rows, columns)
    for frame in range(frames):
        place = (frame * rows + 1) * columns + 2
        assert torch.equal(heat[:, 1, frame, 1, 2], result.values[:, place, 1])


def test_frames_are_chosen_by_their_number() -> None:
    every = captured("wan", example("wan"), CaptureSpec()).on_grid()
    some = captured("wan", example("wan"), CaptureSpec(only_frames=(2, 0)))
    assert some.grid == (2, 5, 3)
    torch.testing.assert_close(some.on_grid(), every[:, :, [2, 0]])
    mass = captured("wan", example("wan"), CaptureSpec(only_frames=(1,), quantity="column_mass"))
    torch.testing.assert_close(mass.values, every[:, :, 1].mean(dim=(-1, -2)))
    with pytest.raises(ValueError, match="only_frames holds 3, but there are 3: 0 to 2"):
        captured("wan", example("wan"), CaptureSpec(only_frames=(3,)))


def test_text_of_mochi_stands_in_the_prompts_order() -> None:
    inputs = example("mochi")
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]])
    inputs["encoder_attention_mask"] = mask
    stock = stock_maps("mochi", inputs)  # valid tokens first
    for queries, keys in (("image", "text"), ("text", "image")):
        spec = CaptureSpec(queries=queries, keys=keys, heads="each", blocks="each")  # type: ignore[arg-type]
        result = captured("mochi", inputs, spec)
        for path, actual in zip(result.sites, result.values.unbind(1), strict=True):
            for row in range(2):
                places = mask[row].nonzero()[:, 0]
                count = len(places)
                if keys == "text":
                    expected = torch.zeros(2, 45, TEXT).double()
                    expected[..., places] = stock[path][row, :, :45, 45 : 45 + count]
                else:
                    expected = torch.zeros(2, TEXT, 45).double()
                    expected[:, places] = stock[path][row, :, 45 : 45 + count, :45]
                torch.testing.assert_close(actual[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_of_the_text_is_in_no_mean() -> None:
    for name in ("hunyuan_video", "mochi"):
        stock = stock_maps(name)
        spec = CaptureSpec(quantity="column_mass", queries="text", blocks="each")
        result = captured(name, example(name), spec)
        for path, actual in zip(result.sites, result.values.unbind(1), strict=True):
            whole = expected_block(name, stock[path], "text", "text").mean(1)
            for row, valid in enumerate(CASES[name].text_valid or ()):
                expected = whole[row, :valid].mean(0)
                torch.testing.assert_close(actual[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_levels_of_a_unet_are_brought_to_the_finest_grid() -> None:
    count = len(cross_sites("sdxl"))
    each = [captured("sdxl", example("sdxl"), CaptureSpec(only_blocks=(block,))) for block in range(count)]
    grids = [result.grid for result in each]
    sides = [result.sites[0].split(".")[0] for result in each]
    assert list(dict.fromkeys(sides)) == ["down_blocks", "mid_block", "up_blocks"]
    assert sorted(sides) == sides
    finest = max(grids, key=math.prod)
    assert len(set(grids)) > 1
    expected = sum(
        F.interpolate(one.on_grid()[:, :, 0], size=finest[1:], mode="bilinear") for one in each
    ) / len(each)
    result = captured("sdxl", example("sdxl"), CaptureSpec())
    assert result.grid == finest
    torch.testing.assert_close(result.on_grid()[:, :, 0], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"choose blocks of one grid with only_blocks"):
        captured("sdxl", example("sdxl"), CaptureSpec(only_queries=(0, 3)))


# --- reductions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "mochi", "wan"])
def test_what_is_reduced_is_what_is_captured_apart(name: str) -> None:
    inputs = example(name)
    whole = captured(name, inputs, CaptureSpec(heads="each", blocks="each")).values  # (B, L, H, Q, K)
    layers = whole.shape[1]
    for heads, blocks in (("mean", "mean"), ("sum", "each"), ("each", "sum"), ("mean", "sum")):
        expected = whole
        expected = expected if heads == "each" else getattr(expected, heads)(2, keepdim=True)
        expected = expected if blocks == "each" else getattr(expected, blocks)(1, keepdim=True)
        spec = CaptureSpec(heads=heads, blocks=blocks)  # type: ignore[arg-type]
        actual = captured(name, inputs, spec)
        assert actual.values.shape == tuple(
            size for i, size in enumerate(expected.shape) if i not in (1, 2) or size > 1
        )
        torch.testing.assert_close(actual.values, expected.squeeze(2).squeeze(1), atol=1e-6, rtol=1e-5)
    some = captured(name, inputs, CaptureSpec(
        only_heads=(1,), only_blocks=(layers - 1, 0), only_keys=(3, 1), only_queries=(4, 2, 7), blocks="each",
    ))  # fmt: skip
    assert some.axes == ("row", "block", "query", "key")
    torch.testing.assert_close(some.values, whole[:, [layers - 1, 0], 1][:, :, [4, 2, 7]][..., [3, 1]])
    mass = captured(name, inputs, CaptureSpec(quantity="row_mass", only_keys=(3, 1)))
    torch.testing.assert_close(mass.values, whole[..., [3, 1]].sum(-1).mean((1, 2)), atol=1e-6, rtol=1e-5)


def test_several_specs_share_their_work() -> None:
    specs = {
        "map": CaptureSpec(),
        "even": CaptureSpec(quantity="column_entropy", blocks="each"),
        "image": CaptureSpec(quantity="column_mass", blocks="each"),
        "text": CaptureSpec(quantity="column_mass", queries="text", blocks="each"),
    }
    model, inputs = shared("flux"), example("flux")
    with diffctrl.capture(model, specs) as maps:
        run(model, inputs)
        (stats,) = maps.stats().values()
    assert stats["captures"] == {"lse": 8}  # four blocks, image and text queries
    for name, spec in specs.items():
        alone = captured("flux", inputs, spec)
        assert torch.equal(maps.result(name).values, alone.values)
    with pytest.raises(ValueError, match=r"spec=None is not among.*map, even, image, text"):
        maps.result()


def test_steps_are_averaged_added_or_kept() -> None:
    model, inputs, scheduler = shared("wan"), example("wan"), FixedScheduler(4)
    steps = {}
    for step in range(4):
        inputs_then = {**inputs, "timestep": inputs["timestep"] * (4 - step) / 4}
        steps[step] = captured("wan", inputs_then, CaptureSpec()).values
    specs = {
        "mean": CaptureSpec(),
        "sum": CaptureSpec(steps="sum"),
        "each": CaptureSpec(steps="each"),
        "some": CaptureSpec(steps="each", only_steps=(1, 3)),
    }
    with diffctrl.capture(model, specs, scheduler=scheduler) as maps:
        for step in range(4):
            scheduler.step_index = step
            run(model, {**inputs, "timestep": inputs["timestep"] * (4 - step) / 4})
    each = maps.result("each")
    assert each.axes == ("row", "step", "query", "key")
    assert each.steps == (0, 1, 2, 3)
    assert torch.equal(each.values, torch.stack(list(steps.values()), 1))
    torch.testing.assert_close(maps.result("mean").values, each.values.mean(1))
    torch.testing.assert_close(maps.result("sum").values, each.values.sum(1))
    assert maps.result("some").steps == (1, 3)
    assert torch.equal(maps.result("some").values, each.values[:, [1, 3]])
    with (
        pytest.raises(RuntimeError, match=r"only_steps needs the denoising step.*scheduler="),
        diffctrl.capture(model, specs["some"]),
    ):
        run(model, inputs)


# --- batch rows and pipelines -------------------------------------------------------------------------------


def test_rows_are_those_of_the_prompt_that_is_asked_for() -> None:
    model, inputs = shared("sd3"), example("sd3")
    rows = [captured("sd3", rows_of(inputs, row), CaptureSpec()).values[0] for row in range(BATCH)]
    assert not torch.allclose(*rows, atol=1e-3)
    specs = {rows: CaptureSpec(rows=rows) for rows in ("cond", "uncond", "all")}  # type: ignore[arg-type]
    with diffctrl.capture(model, specs, batch_layout="uncond_cond") as maps:
        run(model, inputs)
    for name, expected in (("uncond", rows[:1]), ("cond", rows[1:]), ("all", rows)):
        torch.testing.assert_close(maps.result(name).values, torch.stack(expected), atol=1e-5, rtol=1e-4)
    with diffctrl.capture(model, CaptureSpec(), batch_layout="uncond") as maps:
        run(model, inputs)
        with pytest.raises(RuntimeError, match=r"nothing was captured.*0 forwards began with rows='cond'"):
            maps.result()


@pytest.mark.parametrize(
    ("make", "scale"),
    [(sd3_pipeline, "guidance_scale"), (flux_pipeline, "true_cfg_scale"), (wan_pipeline, "guidance_scale")],
)
def test_a_pipeline_draws_the_same_and_the_positive_prompt_is_captured(make: Any, scale: str) -> None:
    pipe = make()
    stock = generate(pipe, steps=2, **{scale: 3.0})
    results = []
    for value in (1.0, 3.0):  # without and with a negative prompt
        with diffctrl.capture(pipe, CaptureSpec(steps="each")) as maps:
            drawn = generate(pipe, steps=2, **{scale: value})
        results.append(maps.result())
    assert torch.equal(drawn, stock)
    for result in results:
        assert result.steps == (0, 1)
        assert result.values.shape[:2] == (1, 2)
    # The first step starts from the same latents.
    torch.testing.assert_close(results[0].values[:, 0], results[1].values[:, 0], atol=1e-5, rtol=1e-4)


def test_two_denoisers_are_captured_apart() -> None:
    pipe = wan_pipeline(two=True)
    with diffctrl.capture(pipe, CaptureSpec()) as maps:
        generate(pipe, steps=4, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"model=None is not among.*transformer, transformer_2"):
        maps.result()
    steps = maps.result(model="transformer").steps + maps.result(model="transformer_2").steps
    assert steps == (0, 1, 2, 3)


def test_passes_that_cannot_be_told_apart_are_refused() -> None:
    model, inputs, scheduler = shared("wan"), example("wan"), FixedScheduler(2)
    scheduler.step_index = 0
    with diffctrl.capture(model, CaptureSpec(), scheduler=scheduler):
        run(model, inputs)
        with pytest.raises(RuntimeError, match=r"ran twice in step 0.*cache_context"):
            run(model, inputs)
    with diffctrl.capture(model, CaptureSpec(rows="all"), scheduler=scheduler) as maps:
        run(model, inputs)
        run(model, inputs)
        assert maps.result().steps == (0, 0)


def test_passes_of_a_guidance_of_the_pipelines_own_are_left_out() -> None:
    """SD3's skip-layer guidance runs the positive prompt once more, without some blocks."""
    model, inputs = shared("sd3"), example("sd3")
    with diffctrl.capture(model, CaptureSpec()) as maps:
        run(model, inputs)
        before = maps.result()
        run(model, {**inputs, "skip_layers": [1]})
        assert torch.equal(maps.result().values, before.values)
        assert len(maps.result().steps) == 1


# --- beside other controls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batched", "sequential", "prefix"])
@pytest.mark.parametrize("name", ["flux", "sd3", "mochi", "wan", "cogvideox", "hunyuan_video"])
def test_beside_softpag_both_do_what_they_do_alone(name: str, mode: str) -> None:
    model, inputs = shared(name), example(name)
    softpag = SoftPAGAttnProcessor(u=0.5, w=2.0, mode=mode)
    with diffctrl.apply(model, softpag):
        guided = run(model, inputs)
    alone = captured(name, inputs, CaptureSpec(blocks="each", heads="each"))
    with diffctrl.capture(model, CaptureSpec(blocks="each", heads="each"), also=[softpag]) as maps:
        assert torch.equal(run(model, inputs), guided)
    torch.testing.assert_close(maps.result().values, alone.values, atol=1e-5, rtol=1e-4)


class Sparse(ControlAttnProcessor):
    """Publishes block lists of its own for each head, and keeps the calls of every site."""

    method = "sparse"
    contributes = Contributions(masks=True)

    def __init__(self, lists: BlockLists) -> None:
        super().__init__()
        self.lists, self.calls = lists, {}

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        masks = {name: self.lists for name, site in context.sites.items() if site.kind in ("joint", "self")}
        return Published("sparse", masks=masks)

    def transform_inputs(self, site: Any, call: Call) -> Call:
        self.calls[site.name] = call
        return call


@pytest.mark.parametrize("route", ["lse", "chunked", "one_hot"])
@pytest.mark.parametrize("name", ["flux", "sd3", "hunyuan_video", "mochi", "wan", "cogvideox"])
def test_under_block_lists_the_weights_are_those_of_the_sparse_softmax(name: str, route: Any) -> None:
    model, inputs, case = shared(name), example(name), CASES[name]
    length = math.prod(case.grid) + (case.text_length if name != "wan" else 0)
    keys = "image" if name == "wan" else "text"
    text_first = name in TEXT_FIRST
    text = (0, TEXT) if text_first else (length - TEXT, length)
    lists = random_lists((8, 8), (length, length), density=0.4, heads=2)
    sparse = Sparse(lists.force(rows=text) if name != "wan" else lists)
    spec = CaptureSpec(keys=keys, heads="each", blocks="each")  # type: ignore[arg-type]
    with diffctrl.apply(model, sparse):
        expected_output = run(model, inputs)
    with diffctrl.capture(model, spec, also=[sparse], route=route) as maps:
        assert torch.equal(run(model, inputs), expected_output)
        (stats,) = maps.stats().values()
    result = maps.result()
    assert stats["captures"] == {route: len(result.sites)}
    assert 0 < stats["density"] < 0.9
    allowed = sparse.lists.to_dense_bool()
    image = math.prod(case.grid)
    rows = slice(length - image, length) if text_first else slice(0, image)
    columns = rows if keys == "image" else slice(*text)
    for path, actual in zip(result.sites, result.values.unbind(1), strict=True):
        call = sparse.calls[path]
        mask = allowed if call.attention_mask is None else allowed & call.attention_mask
        whole = _softmax(call.query.transpose(1, 2), call.key.transpose(1, 2), mask)
        torch.testing.assert_close(actual.double(), whole[:, :, rows, columns], atol=1e-5, rtol=1e-5)
        assert bool((actual == 0).any()), "pairs that are left out have no weight"


def test_controls_that_reorder_tokens_are_refused() -> None:
    class Reordering(ControlAttnProcessor):
        method = "reordering"
        contributes = Contributions(reorders=True)

    for controls in ([Reordering()], [SoftPAGAttnProcessor(), Reordering()]):
        with pytest.raises(
            ValueError, match="capture looks tokens up by their place, and reordering reorders"
        ):
            diffctrl.capture(shared("wan"), CaptureSpec(), also=controls)


# --- bounds, failures, errors -------------------------------------------------------------------------------


def test_max_bytes_is_checked_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = shared("flux"), example("flux")
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **rest: made.append(args) or zeros(*args, **rest))
    spec = CaptureSpec(heads="each", blocks="each", steps="each")
    for limit in (1000, 19_000):
        with (
            diffctrl.capture(model, {"small": CaptureSpec(), "large": spec}, max_bytes=limit),
            pytest.raises(ValueError, match=(
                rf"max_bytes={limit} .*'large': 2 rows, 4 blocks, 2 heads, 35 queries, 7 keys in "
                r"float32, for each step.*only_keys.*raise max_bytes"
            )),
        ):  # fmt: skip
            run(model, inputs)
        assert not made
    with diffctrl.capture(model, spec, max_bytes=400_000) as maps:
        run(model, inputs)
    assert maps.result().values.numel() == 2 * 4 * 2 * 35 * 7
    assert made


# Of FLUX.1 at 1024 px: 4096 image and 512 text tokens. The running forward is kept apart from the total.
@pytest.mark.parametrize(
    ("fields", "mib"),
    [
        ({}, 2 * 8),
        ({"only_keys": tuple(range(20))}, 2 * 0.3125),
        ({"blocks": "each"}, 2 * 456),
        ({"heads": "each", "only_blocks": (3,)}, 2 * 192),
        ({"heads": "each", "blocks": "each"}, 2 * 57 * 192),
        ({"blocks": "each", "steps": "each"}, 28 * 456),
    ],
)
def test_sizes_at_1024_pixels_are_those_of_the_specification(fields: dict[str, Any], mib: float) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel().eval()
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
        }
    inputs |= {"timestep": torch.tensor([0.5]), "img_ids": flux_ids(64, 64), "txt_ids": torch.zeros(512, 3)}
    scheduler = FixedScheduler(28)
    scheduler.step_index = 0
    with (
        diffctrl.capture(model, CaptureSpec(**fields), max_bytes=1, scheduler=scheduler),
        pytest.raises(ValueError, match=re.escape(f"needs {mib:.4g} MiB for its totals")),
    ):
        run(model, inputs)


def test_a_route_that_does_not_fit_is_not_taken() -> None:
    model, inputs = shared("mochi"), example("mochi")
    totals, tiles = 2 * 4 * BATCH * 45 * TEXT, 3 * 4 * BATCH * 2 * TEXT
    with diffctrl.capture(model, CaptureSpec(), max_bytes=totals + tiles) as maps:
        run(model, inputs)
        (stats,) = maps.stats().values()
    assert stats["captures"] == {"chunked": 3}
    torch.testing.assert_close(maps.result().values, captured("mochi", inputs, CaptureSpec()).values)
    with (
        diffctrl.capture(model, CaptureSpec(), max_bytes=totals + tiles, route="one_hot"),
        pytest.raises(ValueError, match=r"route='one_hot' needs \d+ bytes in .*attn1, but max_bytes leaves"),
    ):
        run(model, inputs)


def test_a_run_that_grows_past_max_bytes_is_stopped_before_its_first_step() -> None:
    model, inputs, scheduler = shared("wan"), example("wan"), FixedScheduler(50)
    scheduler.step_index = 0
    spec = CaptureSpec(steps="each")
    size = 4 * BATCH * 45 * TEXT
    with (
        diffctrl.capture(model, spec, max_bytes=20 * size, scheduler=scheduler),
        pytest.raises(ValueError, match="for each step"),
    ):
        run(model, inputs)


def test_a_forward_that_fails_leaves_nothing_in_the_mean() -> None:
    model, inputs = build("flux"), example("flux")
    expected = captured("flux", inputs, CaptureSpec()).values
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with diffctrl.capture(model, CaptureSpec()) as maps:
        hook = model.single_transformer_blocks[0].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        hook.remove()
        with pytest.raises(
            RuntimeError, match=r"1 forwards began with rows='cond' and none ran all of its 4"
        ):
            maps.result()
        run(model, inputs)
        assert torch.equal(maps.result().values, expected)
        assert maps.result().steps == (None,)
    now = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert all(one is other for one, other in zip(now, processors, strict=True))
    assert torch.equal(maps.result().values, expected)  # also after it was taken off


def test_reset_forgets_and_another_size_is_refused() -> None:
    model, inputs = shared("wan"), example("wan")
    with diffctrl.capture(model, CaptureSpec()) as maps:
        with pytest.raises(RuntimeError, match="the model has not run yet"):
            maps.result()
        run(model, inputs)
        first = maps.result().values
        wide = {**inputs, "hidden_states": torch.randn(2, 4, 3, 10, 8)}
        with pytest.raises(
            RuntimeError, match=r"totals of shape \(2, 45, 7\).*would add \(2, 60, 7\).*reset"
        ):
            run(model, wide)
        maps.reset()
        run(model, wide)
        assert maps.result().values.shape == (2, 60, 7)
        maps.reset()
        run(model, inputs)
        assert torch.equal(maps.result().values, first)


def test_errors_name_what_was_given_and_what_is_accepted() -> None:
    flux, wan = shared("flux"), shared("wan")
    for make, error, message in (
        (lambda: diffctrl.capture(flux, {}), ValueError, "got no spec"),
        (lambda: diffctrl.capture(flux, "map"), TypeError, "'capture' is a str; give a CaptureSpec"),
        (lambda: diffctrl.capture(flux, CaptureSpec(), route="fast"), ValueError, "route='fast'.*lse, "),
        (lambda: diffctrl.capture(flux, CaptureSpec(), max_bytes=0), ValueError, "max_bytes=0"),
        (lambda: diffctrl.capture(wan, CaptureSpec(queries="text")), ValueError,
         "Wan 2.1 / 2.2 has no attention of text queries over text keys; its kinds of attention are cross"),
        (lambda: diffctrl.capture(flux, CaptureSpec(only_blocks=(4,))), ValueError, "only_blocks holds 4"),
        (lambda: diffctrl.capture(flux, CaptureSpec(only_heads=(2,))), ValueError,
         r"block 0 \(transformer_blocks.0.attn\): only_heads holds 2, but there are 2"),
        (lambda: diffctrl.capture(shared("sdxl"), CaptureSpec(heads="each")), ValueError, r"have \[2, 4\]"),
        (lambda: diffctrl.capture(flux, CaptureSpec(), also=[CaptureAttnProcessor(CaptureSpec())]),
         ValueError, "one control per method"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()
    with (
        pytest.raises(ValueError, match="only_keys holds 7, but there are 7: 0 to 6"),
        diffctrl.capture(flux, CaptureSpec(only_keys=(7,))),
    ):
        run(flux, example("flux"))
    with (
        pytest.raises(RuntimeError, match=r"route='lse' was asked for.*transformer_blocks.0.attn1"),
        diffctrl.capture(shared("mochi"), CaptureSpec(), route="lse"),
    ):
        run(shared("mochi"), example("mochi"))
    result = captured("flux", example("flux"), CaptureSpec(keys="image"))
    with pytest.raises(ValueError, match="do not lie on one grid"):
        result.on_grid()


def test_it_is_described_in_the_summary() -> None:
    model = shared("flux")
    with diffctrl.capture(model, {"map": CaptureSpec(only_blocks=(1, 3))}):
        text = diffctrl.summary(model)
    assert (
        "capture(map: weights): 2 modules, transformer_blocks.1.attn .. single_transformer_blocks.1" in text
    )


# --- compiled blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_blocks_compile_in_full_and_capture_the_same(name: str) -> None:
    model = build(name)
    inputs, specs = (
        example(name, model),
        {"map": CaptureSpec(), "even": CaptureSpec(quantity="column_entropy")},
    )
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    with diffctrl.capture(model, specs) as maps:
        run(model, inputs)
        eager = {key: maps.result(key).values for key in specs}
        maps.reset()
        torch._dynamo.reset()
        model.get_submodule(CASES[name].blocks[-1])[1].compile(backend=backend, fullgraph=True)
        for _ in range(2):
            run(model, inputs)
        for key in specs:
            assert len(maps.result(key).steps) == 2
            torch.testing.assert_close(maps.result(key).values, eager[key], atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()
    assert len(graphs) == 1
