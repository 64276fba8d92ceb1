"""Blocks under a control compile in full, and a run costs no graph beyond the first of each of its phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffctrl
from diffctrl.processors import ControlAttnProcessor, NeutralAttnProcessor, SoftPAGAttnProcessor
from tests.helpers import FixedScheduler, build, example, run

torch.set_num_threads(1)

STEPS = 6
# (case, block, head set of SoftPAG on that block)
BLOCKS = [
    ("sd3.5", "transformer_blocks.1", "L1H0,attn2:L1"),
    ("flux", "transformer_blocks.1", "L1H1"),
    ("flux", "single_transformer_blocks.0", "L2"),
    ("unet", "mid_block.attentions.0.transformer_blocks.0", "down:L0"),
    ("sdxl", "mid_block.attentions.0.transformer_blocks.0", "mid:L0H1"),
    ("wan-i2v", "blocks.1", "L1H0"),
    ("hunyuan_video", "transformer_blocks.0", "L0"),
    ("hunyuan_video", "single_transformer_blocks.1", "L3H0"),
    ("mochi", "transformer_blocks.1", "L1H1"),
    ("cogvideox-1.5", "transformer_blocks.0", "L0H1"),
    ("ltx", "transformer_blocks.1", "L1"),
]


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(blocks: list[nn.Module]) -> Counting:
    backend = Counting()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    return backend


def run_steps(model: nn.Module, inputs: dict[str, Any], scheduler: FixedScheduler) -> list[Tensor]:
    outputs = []
    for step in range(STEPS):
        scheduler.step_index = step
        outputs.append(run(model, {**inputs, "timestep": inputs["timestep"] * (STEPS - step) / STEPS}))
    return outputs


def check_run(name: str, block: str, processor: ControlAttnProcessor) -> tuple[int, int]:
    """(graphs, guided steps) of a run with one block compiled, whose outputs equal those of the eager run."""
    model, scheduler = build(name), FixedScheduler(STEPS)
    inputs = example(name, model)
    with diffctrl.apply(model, processor, scheduler=scheduler) as handle:
        eager = run_steps(model, inputs, scheduler)
        backend = compiled([model.get_submodule(block)])
        for _ in range(2):
            for one, other in zip(run_steps(model, inputs, scheduler), eager, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        guided = next(iter(handle.stats().values()))["guided_forwards"]
    return backend.graphs, guided // 3


@pytest.mark.parametrize(("name", "block", "heads"), BLOCKS)
def test_one_graph_without_phases(name: str, block: str, heads: str) -> None:
    assert check_run(name, block, NeutralAttnProcessor()) == (1, 0)


@pytest.mark.parametrize(("name", "block", "heads"), BLOCKS)
def test_two_graphs_where_guided_steps_run_twins(name: str, block: str, heads: str) -> None:
    processor = SoftPAGAttnProcessor(heads, u=0.5, start_fraction=0.3, stop_fraction=0.7)
    assert check_run(name, block, processor) == (2, 3)


def test_layers_share_a_graph_as_in_the_stock_model() -> None:
    """A layer's name or number that got into compiled code would cost a graph per layer."""

    def graphs(processor: ControlAttnProcessor | None) -> int:
        torch._dynamo.reset()
        model = build("wan")
        model.blocks.extend([build("wan", seed).blocks[1] for seed in (1, 2)])
        backend = compiled(list(model.blocks))
        inputs, scheduler = example("wan", model), FixedScheduler(STEPS)
        if processor is None:
            run_steps(model, inputs, scheduler)
        else:
            with diffctrl.apply(model, processor, scheduler=scheduler):
                run_steps(model, inputs, scheduler)
        return backend.graphs

    stock = graphs(None)
    assert graphs(NeutralAttnProcessor()) == stock
    everywhere = SoftPAGAttnProcessor("L0,L1,L2,L3", stop_fraction=0.5)
    assert graphs(everywhere) == 2 * stock


def test_applying_again_with_other_settings_costs_no_graph() -> None:
    model, scheduler = build("wan"), FixedScheduler(STEPS)
    inputs = example("wan", model)
    backend = compiled([model.blocks[1]])
    for u in (0.25, 0.5, 0.75, 1.0):
        processor = SoftPAGAttnProcessor("L1H0", u=u, stop_fraction=0.5)
        with diffctrl.apply(model, processor, scheduler=scheduler):
            run_steps(model, inputs, scheduler)
    assert backend.graphs == 2


def test_the_whole_model_compiles_around_the_hooks() -> None:
    model, scheduler = build("wan"), FixedScheduler(STEPS)
    inputs = example("wan", model)
    with diffctrl.apply(model, SoftPAGAttnProcessor(), scheduler=scheduler):
        eager = run_steps(model, inputs, scheduler)
        whole = torch.compile(model, backend="eager")
        for one, other in zip(run_steps(whole, inputs, scheduler), eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
