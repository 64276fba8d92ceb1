"""Radial Attention inside real models: against scaled_dot_product_attention with the mask written out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffctrl
from diffctrl.families import Call, Site
from diffctrl.processors import NeutralAttnProcessor, RadialAttnProcessor, RadialConfig, SoftPAGAttnProcessor
from diffctrl.processors import radial as processor_module
from diffctrl.radial import Layout, Pattern, block_grid, reference
from tests.families.test_compile import Counting
from tests.helpers import CASES, FixedScheduler, build, example, rows_of, run, shared

torch.set_num_threads(1)

MODELS = ("wan", "wan-i2v", "wan_vace", "hunyuan_video", "hunyuan_video15", "hunyuan_video15-i2v", "mochi",
          "cogvideox", "cogvideox-1.5", "cogvideox-fused", "ltx")  # fmt: skip
FAMILIES = tuple(name for name in MODELS if CASES[name].family == name)
# Every step and block is sparse, and so are neighbouring frames: the tiny models have two or three.
SPARSE: dict[str, Any] = {
    "block": 4, "adjacent": "decay", "sink": False,
    "dense_steps": 0, "dense_last_steps": 0, "dense_blocks": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


class Watched(RadialAttnProcessor):
    """Keeps the call and the attention output of each site."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.taken: dict[str, tuple[Site, Call, Tensor]] = {}

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        self.taken[site.name] = site, call, output
        return output


def run_sparse(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with diffctrl.apply(model, RadialAttnProcessor(**SPARSE)):
        return run(model, inputs)


def written_out(made: Pattern, layout: Layout) -> Tensor:
    """bool (N, N): "exact" by the definition of a pair, others by their blocks."""
    if made.block_rule == "exact":
        return reference.token_mask(made, layout)
    blocks = torch.from_numpy(block_grid(made, layout))
    spread = blocks.repeat_interleave(made.block, 0).repeat_interleave(made.block, 1)
    return spread[: layout.length, : layout.length]


def expected(call: Call, mask: Tensor, valid: tuple[int, ...] | None) -> Tensor:
    query, key, value = (part.transpose(1, 2).double() for part in (call.query, call.key, call.value))
    mask = mask.expand(len(query), 1, *mask.shape)
    if valid is not None:
        keys = torch.arange(mask.shape[-1]) < call.image.stop + torch.tensor(valid)[:, None]
        mask = mask & keys[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def check_sites(name: str, inputs: dict[str, Any], **settings: Any) -> float:
    """Compares every site; returns the density of the mask."""
    processor = Watched(**{**SPARSE, **settings})
    with diffctrl.apply(shared(name), processor) as handle:
        run(shared(name), inputs)
        (context,) = handle.contexts.values()
    frames, rows, columns = context.grid()
    info = context.info
    assert info is not None
    text = (info.text_length or 0) if CASES[name].family in ("mochi", "cogvideox") or "hunyuan" in name else 0
    layout = Layout(
        frames=frames, tokens=rows * columns, text=text, text_first=CASES[name].family == "cogvideox"
    )
    made, _ = processor.resolved(CASES[name].family, frames)
    mask = written_out(made, layout)
    assert len(processor.taken) >= 2
    for site, call, output in processor.taken.values():
        valid = info.text_valid if site.kind == "joint" else None
        wanted = expected(call, mask, valid)
        for row in range(len(output)):
            stop = None if valid is None else call.image.stop + valid[row]
            error = (output[row, :stop].double() - wanted[row, :stop]).abs().max()
            assert error < 1e-5, f"{site.name} row {row}: {error}"
    return float(mask.float().mean())


# --- against the mask written out ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["hybrid", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_the_mask_written_out(name: str, rule: str) -> None:
    assert check_sites(name, example(name), block_rule=rule) < 1


@pytest.mark.parametrize(
    "settings", [{"pattern": "paper"}, {"sink": True}, {"block_rule": "reference"}, {"block": 7}]
)
def test_other_settings(settings: dict[str, Any]) -> None:
    rest = {"adjacent": "full"} if settings.get("pattern") == "paper" else {}
    for name in ("wan", "hunyuan_video", "cogvideox"):
        check_sites(name, example(name), **{**settings, **rest})


def sized(name: str, frames: int, height: int, width: int) -> dict[str, Any]:
    """A forward of as many latent frames, rows and columns."""
    inputs, generator = example(name), torch.Generator().manual_seed(2)
    if name == "ltx":  # a token is a latent pixel there
        inputs |= {"num_frames": frames, "height": height // 2, "width": width // 2}
        size = (2, frames * (height // 2) * (width // 2), 8)
    else:
        size = (2, frames, 4, height, width) if name == "cogvideox" else (2, 4, frames, height, width)
    return inputs | {"hidden_states": torch.randn(size, generator=generator)}


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 6, 10), (5, 4, 14), (7, 2, 2)])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "hunyuan_video15", "mochi", "cogvideox", "ltx"])
def test_any_resolution_and_frame_count(name: str, size: tuple[int, int, int]) -> None:
    check_sites(name, sized(name, *size))


def test_a_mask_with_every_block_on_is_the_stock_model() -> None:
    """Of two frames each is the other's neighbour: sparse steps that leave nothing out."""
    for name in ("wan", "hunyuan_video", "hunyuan_video15", "mochi", "cogvideox", "ltx"):
        inputs = sized(name, 2, 6, 10)
        stock = run(shared(name), inputs)
        with diffctrl.apply(shared(name), RadialAttnProcessor(**{**SPARSE, "adjacent": "full"})) as handle:
            torch.testing.assert_close(run(shared(name), inputs), stock, rtol=0, atol=1e-5)
            (stats,) = handle.stats().values()
        assert (stats["masked_forwards"], stats["density"]) == (1, 1)


@pytest.mark.parametrize("rows", [(0,), (1, 0, 1)])
def test_batches_of_one_and_three_with_prompts_of_different_lengths(rows: tuple[int, ...]) -> None:
    for name in ("hunyuan_video", "hunyuan_video15", "mochi", "ltx", "cogvideox"):
        check_sites(name, rows_of(example(name), *rows))


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15", "mochi"])
def test_garbage_in_padded_text_changes_nothing(name: str) -> None:
    model, clean, dirty = shared(name), example(name), example(name)
    for prompt, mask in (("encoder_hidden_states", "encoder_attention_mask"),
                         ("encoder_hidden_states_2", "encoder_attention_mask_2")):  # fmt: skip
        if prompt in dirty:
            dirty[prompt] = torch.where(dirty[mask][..., None] > 0, dirty[prompt], 1e4)
    with diffctrl.apply(model, RadialAttnProcessor(**SPARSE)):
        torch.testing.assert_close(run(model, dirty), run(model, clean), rtol=0, atol=1e-5)


# --- 16 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cast", "loaded", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_16_bits_cost_no_more_than_in_the_stock_model(name: str, form: str, tmp_path: Path) -> None:
    """All weights cast; as checkpoints load (some classes keep norms in float32); float32 under autocast."""
    model, inputs = shared(name), example(name)
    wanted = run(model, inputs), run_sparse(model, inputs)
    in_16_bits: AbstractContextManager[Any] = nullcontext()
    if form == "autocast":
        in_16_bits = torch.autocast("cpu", torch.bfloat16)
    else:
        inputs = example(name, shared(name, torch.bfloat16))
        if form == "cast":
            model = shared(name, torch.bfloat16)
        else:
            model.save_pretrained(tmp_path)
            model = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    with in_16_bits:
        found = run(model, inputs), run_sparse(model, inputs)
    stock, radial = (
        float((one.float() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)
    )
    assert 1e-3 < stock < 6e-2
    assert radial < 1.5 * stock


# --- gradients ----------------------------------------------------------------------------------------------


class Written(RadialAttnProcessor):
    """The same attention by scaled_dot_product_attention, with the mask written out."""

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        info = site.context.info
        frames, rows, columns = site.context.grid()
        text = info.text_length if site.kind == "joint" else 0
        made, _ = self.resolved(site.family.name, frames)
        mask = written_out(made, Layout(frames=frames, tokens=rows * columns, text=text))
        return expected(call, mask, info.text_valid if site.kind == "joint" else None).to(output.dtype)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_gradients_are_those_of_the_mask_written_out(name: str) -> None:
    model = build(name)
    inputs = example(name)

    def gradients(processor: RadialAttnProcessor) -> dict[str, Tensor]:
        model.zero_grad()
        with diffctrl.apply(model, processor):
            model(**inputs, return_dict=False)[0].square().mean().backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(Written(**SPARSE))
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        found = gradients(RadialAttnProcessor(**SPARSE))
        assert found.keys() == wanted.keys()
        for path, grad in found.items():
            torch.testing.assert_close(grad, wanted[path], rtol=1e-4, atol=1e-5 * scale, msg=path)


# --- steps and blocks ---------------------------------------------------------------------------------------


def sparse_steps(
    model: nn.Module, inputs: dict[str, Any], steps: int, begin: int = 0, passes: int = 1, **settings: Any
) -> list[int]:
    """The steps of a run in which some attention had block lists."""
    scheduler = FixedScheduler(steps)
    scheduler.begin_index = begin
    processor = RadialAttnProcessor(block=4, adjacent="decay", **settings)
    found = []
    with diffctrl.apply(model, processor, scheduler=scheduler) as handle:
        (context,) = handle.contexts.values()
        for step in range(begin, steps):
            scheduler.step_index = step
            before = context.masked_forwards
            for _ in range(passes):
                run(model, inputs)
            assert (context.masked_forwards - before) in (0, passes)
            if context.masked_forwards > before:
                found.append(step)
        (stats,) = handle.stats().values()
    assert stats["masked_forwards"] == passes * len(found)
    return found


def test_the_first_and_last_steps_and_the_first_blocks_are_dense() -> None:
    model, inputs = shared("wan"), rows_of(example("wan"), 0)
    assert sparse_steps(model, inputs, 50) == list(range(12, 50))
    # Two passes of classifier-free guidance are one step.
    assert sparse_steps(model, inputs, 6, passes=2, dense_steps=3, dense_last_steps=2) == [3]
    assert sparse_steps(model, inputs, 4) == [1, 2]  # one first, one last
    assert sparse_steps(model, inputs, 8) == [2, 3, 4, 5, 6]
    assert sparse_steps(model, inputs, 20, dense_fraction=0.5, dense_last_steps=0) == list(range(10, 20))
    assert sparse_steps(model, inputs, 10, begin=4, dense_steps=2, dense_last_steps=0) == [6, 7, 8, 9]


def test_a_run_without_a_sparse_step_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with notes(caplog):
        assert sparse_steps(shared("wan"), rows_of(example("wan"), 0), 4, dense_steps=9) == []
    assert [record.getMessage() for record in caplog.records] == [
        "Radial Attention leaves all 4 steps of this run dense (4 first, 1 last): nothing is gained"
    ]


def test_calls_are_counted_for_each_pass_and_block() -> None:
    model, inputs = shared("wan"), example("wan")
    scheduler = FixedScheduler(50)
    blocks = 2
    with diffctrl.apply(model, RadialAttnProcessor(block=4, adjacent="decay"), scheduler=scheduler) as handle:
        for step in range(50):
            scheduler.step_index = step
            run(model, rows_of(inputs, 0))
        (stats,) = handle.stats().values()
    # 12 dense steps of both blocks; the first block is dense in the others too.
    assert (stats["dense_calls"], stats["sparse_calls"]) == (12 * blocks + 38, 38)
    assert stats["sparse_density"] < 1
    assert stats["density"] == pytest.approx((62 + 38 * stats["sparse_density"]) / 100)


def test_blocks_count_double_ones_first() -> None:
    model, inputs = shared("hunyuan_video"), example("hunyuan_video")
    processor = RadialAttnProcessor(**{**SPARSE, "dense_blocks": 3})
    with diffctrl.apply(model, processor) as handle:
        run(model, inputs)
        (context,) = handle.contexts.values()
        masked = [name for name, site in context.sites.items() if site.mask is not None]
    assert masked == ["single_transformer_blocks.1.attn"]
    with pytest.raises(ValueError, match="dense_blocks=4 leaves none of the 4 blocks"):
        diffctrl.apply(model, RadialAttnProcessor(dense_blocks=4))


def test_a_bare_model_without_a_scheduler_says_what_to_do() -> None:
    with (
        diffctrl.apply(shared("wan"), RadialAttnProcessor()),
        pytest.raises(RuntimeError, match=r"no scheduler is known; apply to the pipeline.*scheduler="),
    ):
        run(shared("wan"), example("wan"))


# --- which attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_only_the_videos_own_attention_is_touched(name: str) -> None:
    model = shared(name)
    before = {
        path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")
    }
    with diffctrl.apply(model, RadialAttnProcessor(**SPARSE)):
        changed = {
            path
            for path, module in model.named_modules()
            if hasattr(module, "processor") and module.processor is not before[path]
        }
    kept = set(before) - changed
    own = (".attn",) if "hunyuan" in name else (".attn1",)
    assert changed
    assert all(path.endswith(own) and "refiner" not in path and "vace_blocks" not in path for path in changed)
    assert all(path.endswith(".attn2") or "refiner" in path or "vace_blocks" in path for path in kept)


def test_other_models_are_refused() -> None:
    for name in ("sd3", "unet"):
        with pytest.raises(TypeError, match="radial does not support .*; it supports wan, "):
            diffctrl.apply(shared(name), RadialAttnProcessor())


def test_a_mask_of_the_caller_is_refused() -> None:
    inputs = example("cogvideox")
    inputs["attention_kwargs"] = {"attention_mask": torch.ones(2, 52)}
    with (
        diffctrl.apply(shared("cogvideox"), RadialAttnProcessor(**SPARSE)),
        pytest.raises(ValueError, match="attention mask of its caller"),
    ):
        run(shared("cogvideox"), inputs)


def test_a_grid_that_is_not_the_sequences_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """LTX-Video is told its grid beside the tokens; of the others a wrong layout is planted."""
    told = {**example("ltx"), "num_frames": 2}
    with (
        diffctrl.apply(shared("ltx"), RadialAttnProcessor(**SPARSE)),
        pytest.raises(RuntimeError, match="45"),
    ):
        run(shared("ltx"), told)
    layout_of = processor_module.layout_of
    monkeypatch.setattr(
        processor_module,
        "layout_of",
        lambda site, info, grid: replace(layout_of(site, info, grid), frames=grid[0] - 1),
    )
    for name in ("wan", "hunyuan_video", "mochi", "cogvideox"):
        refused = pytest.raises(ValueError, match=r"follows from lengths|accepted is 0 to Sk")
        with diffctrl.apply(shared(name), RadialAttnProcessor(**SPARSE)), refused:
            run(shared(name), example(name))


# --- sizes, models, methods side by side --------------------------------------------------------------------


def test_each_size_and_each_model_has_its_own_mask() -> None:
    """A mask kept for the class would be the first one's."""
    one, other = shared("wan"), build("wan", seed=3)
    small, large = example("wan"), example("wan")
    large["hidden_states"] = torch.randn(2, 4, 4, 8, 10, generator=torch.Generator().manual_seed(5))

    def alone(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> Tensor:
        with diffctrl.apply(model, RadialAttnProcessor(**{**SPARSE, **settings})):
            return run(model, inputs)

    wanted = [alone(one, small), alone(one, large), alone(other, small, decay_factor=0.3)]
    with (
        diffctrl.apply(one, RadialAttnProcessor(**SPARSE)),
        diffctrl.apply(other, RadialAttnProcessor(**SPARSE, decay_factor=0.3)),
    ):
        for _ in range(2):
            found = [run(one, small), run(one, large), run(other, small)]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
@pytest.mark.parametrize("mode", ["batched", "prefix"])
def test_it_composes_with_softpag(name: str, mode: str) -> None:
    """Both predictions of the guidance are sparse; their difference is the perturbation alone."""
    model, inputs = shared(name), example(name)
    radial = RadialAttnProcessor(**SPARSE)
    softpag = SoftPAGAttnProcessor("L1H1", u=0.7, w=2.0, mode=mode)
    with diffctrl.apply(model, radial):
        sparse = run(model, inputs)
    with diffctrl.apply(model, softpag):
        guided = run(model, inputs)
    results = []
    for order in ([radial, softpag], [softpag, radial]):
        with diffctrl.apply(model, order) as handle:
            results.append(run(model, inputs))
            (stats,) = handle.stats().values()
        assert stats["guided_forwards"] == 1
        assert stats["sparse_calls"]
        assert not stats["dense_calls"]
    assert torch.equal(*results)
    assert not torch.allclose(results[0], guided)
    with diffctrl.apply(model, [radial, SoftPAGAttnProcessor("L1H1", u=0.0, w=2.0)]):
        assert torch.equal(run(model, inputs), sparse)
    with pytest.raises(ValueError, match="cannot be combined"):
        diffctrl.apply(model, [radial, SoftPAGAttnProcessor("L1H1", kind="argmax")])


# --- notes --------------------------------------------------------------------------------------------------


@contextmanager
def notes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="diffctrl.radial"):
        yield


def test_one_frame_and_long_clips_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = shared("wan"), example("wan")
    generator = torch.Generator().manual_seed(2)
    with diffctrl.apply(model, RadialAttnProcessor(**SPARSE)), notes(caplog):
        for frames, said in ((3, None), (1, "one frame"), (32, "1.5 times what Wan 2.1 / 2.2 was made for")):
            caplog.clear()
            inputs["hidden_states"] = torch.randn(2, 4, frames, 4, 4, generator=generator)
            for _ in range(2):
                run(model, inputs)
            assert [record.getMessage() for record in caplog.records if said is None or said not in
                    record.getMessage()] == []  # fmt: skip
            assert len(caplog.records) == (0 if said is None else 1)


def test_settings_are_described() -> None:
    assert RadialAttnProcessor().describe() == "radial(preset)"
    described = RadialAttnProcessor(RadialConfig(sink=False), dense_steps=6).describe()
    assert described == "radial(sink=False, dense_steps=6)"


# --- memory and graphs --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_map_of_all_tokens_is_made() -> None:
    """HunyuanVideo 1.5 of diffusers makes one in each block, sparse or not."""
    inputs = rows_of(example("hunyuan_video15"), 0)
    inputs["hidden_states"] = torch.randn(1, 4, 4, 60, 60, generator=torch.Generator().manual_seed(2))
    sparse = RadialAttnProcessor(**{**SPARSE, "block": 32})
    for processor in (NeutralAttnProcessor(), sparse):
        with diffctrl.apply(shared("hunyuan_video15"), processor), Largest() as largest:
            run(shared("hunyuan_video15"), inputs)
        assert largest.elements < 3600 * 3600 / 2
    with Largest() as largest:
        run(shared("hunyuan_video15"), inputs)
    assert largest.elements >= 3600 * 3600


def test_a_run_compiles_to_two_graphs() -> None:
    """One for the dense steps, one for the sparse ones, with prompts of different lengths."""
    name, block = "hunyuan_video", "single_transformer_blocks.1"
    torch._dynamo.reset()
    model, scheduler, backend = build(name), FixedScheduler(6), Counting()
    inputs = example(name, model)
    processor = RadialAttnProcessor(**{**SPARSE, "dense_steps": 2, "dense_last_steps": 1})
    with diffctrl.apply(model, processor, scheduler=scheduler):
        outputs = []
        for compiled in (False, True):
            if compiled:
                model.get_submodule(block).compile(backend=backend, fullgraph=True)
            for step in range(6):
                scheduler.step_index = step
                outputs.append(run(model, inputs))
    torch._dynamo.reset()
    assert backend.graphs == 2
    for eager, one in zip(outputs[:6], outputs[6:], strict=True):
        torch.testing.assert_close(one, eager, rtol=1e-5, atol=1e-5)
    assert not torch.equal(outputs[0], outputs[3])
