"""The twin in the same batch, as a second forward, and from the first perturbed block on: one result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffctrl
from diffctrl.families import family_of
from diffctrl.processors import SoftPAGAttnProcessor
from tests.helpers import CASES, FixedScheduler, build, example, run, shared
from tests.pipelines import flux_pipeline, generate, sd3_pipeline, sd_pipeline, wan_pipeline

torch.set_num_threads(1)

# A head of a block in the middle, or of the second stack.
HEADS = {
    "sd3": "L1H0,L2",
    "sd3.5": "attn2:L1,L2",
    "flux": "L1H1",
    "flux-fused": "L3H0",
    "flux-single": "L1",
    "wan": "L1H0",
    "wan-i2v": "L1",
    "wan-ends-fused": "L1",
    "wan-ti2v": "L1",
    "hunyuan_video": "L1H0",
    "hunyuan_video-i2v": "L3",
    "hunyuan_video15": "L1H0",
    "mochi": "L1",
    "cogvideox": "L1H1",
    "cogvideox-1.5": "L1",
    "ltx": "L1H0",
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Blocks:
    """Counts how often each block of a model's lists runs."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[int] = Counter()
        self._handles = [
            block.register_forward_pre_hook(self._note(f"{chain}.{index}"), with_kwargs=True)
            for chain in family_of(model).chains
            for index, block in enumerate(getattr(model, chain))
        ]
        self._handles.append(model.register_forward_pre_hook(self._note("model"), with_kwargs=True))

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.calls[name] += 1

        return note

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def guided(name: str, mode: Any, **settings: Any) -> tuple[Tensor, Counter[str], dict[str, Any]]:
    model, inputs = shared(name), example(name)
    with diffctrl.apply(model, SoftPAGAttnProcessor(HEADS[name], mode=mode, **settings)) as handle:
        blocks = Blocks(model)
        result = run(model, inputs)
        blocks.close()
        stats = next(iter(handle.stats().values()))
    return result, blocks.calls, stats


@pytest.mark.parametrize("name", HEADS)
def test_modes_give_one_result_and_prefix_skips_blocks(name: str) -> None:
    modules = [type(module) for module in shared(name).modules()]
    batched, once, stats = guided(name, "batched")
    assert set(once.values()) == {1}
    assert (stats["forwards"], stats["guided_forwards"]) == (1, 1)
    sequential, twice, stats = guided(name, "sequential")
    assert set(twice.values()) == {2}
    assert (stats["forwards"], stats["guided_forwards"]) == (1, 1)
    prefix, cut, stats = guided(name, "prefix")
    assert not torch.equal(batched, run(shared(name), example(name)))
    torch.testing.assert_close(sequential, batched, rtol=1e-5, atol=1e-5)  # batches of two sizes: rounding
    torch.testing.assert_close(prefix, sequential, rtol=0, atol=1e-6)
    assert [type(module) for module in shared(name).modules()] == modules
    # Blocks before the first perturbed one ran once, the others twice.
    handle = diffctrl.apply(shared(name), SoftPAGAttnProcessor(HEADS[name]))
    chosen = [site.name for site in handle.contexts[type(shared(name)).__name__].sites.values()
              if site.installed is not None]  # fmt: skip
    handle.remove()
    order = [block for block in cut if block != "model"]
    first = min(order.index(".".join(site.split(".")[:2])) for site in chosen)
    assert [cut[block] for block in order] == [1] * first + [2] * (len(order) - first)
    assert first > 0


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline, wan_pipeline])
@pytest.mark.parametrize("mode", ["sequential", "prefix"])
def test_whole_runs_are_the_same_in_every_mode(make: Any, mode: Any) -> None:
    pipe = make()
    arguments = {"true_cfg_scale": 3.0} if make is flux_pipeline else {"guidance_scale": 4.0}

    def latents(mode: Any) -> Tensor:
        processor = SoftPAGAttnProcessor("L1H0", mode=mode, stop_fraction=0.5)
        with diffctrl.apply(pipe, processor) as handle:
            result = generate(pipe, batch=2, **arguments)
            counts = next(iter(handle.stats().values()))
        assert counts["guided_forwards"] == 2
        return result

    torch.testing.assert_close(latents(mode), latents("batched"), rtol=1e-4, atol=1e-4)


def test_a_unet_runs_sequentially_and_refuses_a_prefix() -> None:
    pipe = sd_pipeline()
    latents = []
    for mode in ("batched", "sequential"):
        with diffctrl.apply(pipe, SoftPAGAttnProcessor(mode=mode)):
            latents.append(generate(pipe, guidance_scale=4.0))
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"mode='prefix'.*skip connections.*mode='sequential'"):
        diffctrl.apply(pipe, SoftPAGAttnProcessor(mode="prefix"))


def test_a_first_block_that_is_perturbed_leaves_nothing_to_skip() -> None:
    model, inputs = shared("sd3"), example("sd3")
    results = []
    for mode in ("sequential", "prefix"):
        with diffctrl.apply(model, SoftPAGAttnProcessor("L0", mode=mode)):
            results.append(run(model, inputs))
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["sequential", "prefix"])
def test_control_residuals_are_kept(mode: Any) -> None:
    """ControlNet's residuals reach the blocks of both forwards."""
    generator = torch.Generator().manual_seed(5)
    for name, argument in (("sd3", "block_controlnet_hidden_states"), ("flux", "controlnet_block_samples")):
        model, inputs = shared(name), example(name)
        inputs[argument] = tuple(torch.randn(2, 35, 32, generator=generator) for _ in range(2))
        stock = run(model, inputs)
        assert (stock - run(model, example(name))).abs().max() > 1e-3
        with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0"), batch_layout="perturbed"):
            p = run(model, inputs)
        for each in ("batched", mode):
            with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", w=1.0, mode=each)):
                torch.testing.assert_close(run(model, inputs), stock + (stock - p), rtol=1e-5, atol=1e-5)
        with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", mode=mode, u=0.0)):
            assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize("mode", ["sequential", "prefix"])
def test_an_exception_in_either_forward_leaves_nothing_behind(mode: Any) -> None:
    model, inputs = build("sd3"), example("sd3")
    blocks, stock = list(model.transformer_blocks), run(model, inputs)
    calls, failing = 0, 0

    def fail(module: nn.Module, args: tuple) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise FloatingPointError("planted")

    for which in (1, 2):
        failing = which
        calls = 0
        with diffctrl.apply(model, SoftPAGAttnProcessor("L1", mode=mode)):
            guided = run(model, inputs)
            hook = blocks[2].register_forward_pre_hook(fail)
            with pytest.raises(FloatingPointError):
                run(model, inputs)
            hook.remove()
            assert torch.equal(run(model, inputs), guided)
            hook = blocks[2].register_forward_pre_hook(fail)
            calls = 0
            with pytest.raises(FloatingPointError):
                run(model, inputs)
            hook.remove()
        assert list(model.transformer_blocks) == blocks
        assert torch.equal(run(model, inputs), stock)


def test_a_step_cache_keeps_its_own_state_for_the_twin_or_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    plain, cached = wan_pipeline(), wan_pipeline()
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # never close enough to skip
    results = []
    for pipe in (plain, cached):
        with diffctrl.apply(pipe, SoftPAGAttnProcessor("L1", mode="sequential")):
            results.append(generate(pipe, guidance_scale=4.0))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    with (
        diffctrl.apply(cached, SoftPAGAttnProcessor("L1", mode="prefix")),
        pytest.raises(RuntimeError, match=r"mode='prefix' skips blocks.*step cache"),
    ):
        generate(cached)
    # Turned off, it leaves registries without hooks behind, which count on no block.
    cached.transformer.disable_cache()
    assert hasattr(cached.transformer.blocks[0], "_diffusers_hook")
    with diffctrl.apply(cached, SoftPAGAttnProcessor("L1", mode="prefix")):
        torch.testing.assert_close(generate(cached, guidance_scale=4.0), results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sequential", "prefix"])
def test_the_twin_gets_the_positive_prompt(mode: Any) -> None:
    pipe = sd3_pipeline()
    taken: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: taken.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with diffctrl.apply(pipe, SoftPAGAttnProcessor("L1", mode=mode)):
        generate(pipe, steps=1, batch=2, guidance_scale=4.0)
    together, twin = taken
    assert twin.shape[0] == 2
    assert torch.equal(twin, together[2:])


def test_every_case_with_chains_is_tested() -> None:
    chained = {case.name for case in CASES.values() if family_of(shared(case.name)).chains}
    assert {CASES[name].family for name in HEADS} == {CASES[name].family for name in chained}


def test_compiled_blocks_are_kept_as_they_are() -> None:
    torch._dynamo.reset()
    model, scheduler = build("sd3"), FixedScheduler(4)
    inputs = example("sd3", model)
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in list(model.transformer_blocks)[:2]:
        block.compile(backend=counting, fullgraph=True)
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1", mode="prefix"), scheduler=scheduler):
        counts = []
        for step in range(3):
            scheduler.step_index = step
            result = run(model, inputs)
            counts.append(graphs)
    torch._dynamo.reset()
    with diffctrl.apply(shared("sd3"), SoftPAGAttnProcessor("L1", mode="prefix")):
        torch.testing.assert_close(result, run(shared("sd3"), inputs), rtol=1e-5, atol=1e-5)
    assert counts[0] == counts[-1]
