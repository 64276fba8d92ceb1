"""Attention with its gradients, over the blocks of radial masks: each kernel that has a backward, and dense.

    python -m diffctrl.scripts.bench.backward --out docs/results/backward.json [--tiles]

One forward and one backward of a layer's attention, as a training has them. Each contender's gradients are
first compared with the fp32 kernel's on the same inputs; one that is wrong is not timed. Rates count useful
work, 14 * B * H * D * (attended pairs): two products forward, five backward. `--tiles` adds other tiles of
Triton's passes. `--dry-run`: tiny shapes, on a CPU.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.attention import BlockLists, EngineStats, attend, chain
from diffctrl.attention.kernels.base import Operands
from diffctrl.attention.kernels.triton_grad import GradTiles, gradients
from diffctrl.attention.kernels.triton_lists import TritonListsKernel, Variant
from diffctrl.radial import Layout, Pattern, block_lists
from diffctrl.scripts.bench.harness import (
    Figure,
    card_state,
    print_figures,
    time_rotation,
    write_report,
)

TOPIC = "backward"
BOUND = 4 * 8e-3  # relative error of a gradient, bf16; as in the self-test
_SEED = 20261


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one layer; a mask of full width with a sink, in blocks of each size."""

    name: str
    layout: Layout
    heads: int
    dim: int
    batch: int = 1
    blocks: tuple[int, ...] = (32, 64, 128)


SHAPES = (
    Shape("shapes-wan, 129 frames", Layout(frames=65, tokens=64), 6, 32, batch=16),
    Shape("480p, 81 frames, head dim 128", Layout(frames=21, tokens=1560), 12, 128),
    Shape("480p, 81 frames, head dim 64", Layout(frames=21, tokens=1560), 12, 64),
)
DRY_SHAPES = (Shape("tiny", Layout(frames=5, tokens=24), 2, 32, blocks=(16, 32)),)
TILES = (
    GradTiles(rows=64, tile=32), GradTiles(rows=64, tile=64), GradTiles(rows=64, tile=64, stages=3),
    GradTiles(rows=64, tile=32, warps=2), GradTiles(rows=128, tile=64, warps=8),
    GradTiles(rows=128, tile=32, warps=8), GradTiles(rows=32, tile=64, warps=2),
    GradTiles(rows=32, tile=32, warps=2), GradTiles(rows=32, tile=128, warps=2),
    GradTiles(rows=32, tile=64, warps=2, stages=3), GradTiles(rows=32, tile=64, warps=1),
    GradTiles(rows=32, tile=32, warps=1),
)  # fmt: skip
# Of the forward, with the table's tiles in the backward.
VARIANTS = (Variant(warps=2), Variant(tile=32, warps=2), Variant(tile=128, warps=2), Variant(tile=32))


class _Tiled(TritonListsKernel):
    """The Triton kernel with another variant in its forward, or other tiles in its backward."""

    def __init__(self, variant: Variant | None = None, tiles: GradTiles | None = None) -> None:
        super().__init__(variant)
        self.tiles = tiles

    def backward(
        self, operands: Operands, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return gradients(operands, grad, out, lse, self.tiles)


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    attention: Callable[..., Any]
    area: float  # attended share

    def run(self, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs, forward included."""
        return torch.autograd.grad(self.attention(*inputs), inputs, grad)


def contenders_of(shape: Shape, device: str, tiles: bool) -> dict[BlockLists | None, list[Contender]]:
    """Mask -> who computes attention over it; None is dense."""
    names = ("sdpa",) if device == "cpu" else ("flash4", "cudnn", "sdpa")
    dense = [Contender(f"{name} dense", functools.partial(attend, kernel=name), 1.0) for name in names]
    found: dict[BlockLists | None, list[Contender]] = {None: dense}
    for block in shape.blocks:
        mask = block_lists(Pattern(block=block, sink=True), shape.layout)
        area = mask.density()
        own = [Contender(f"attend, blocks of {block}", functools.partial(attend, mask=mask), area)]
        for name in ("gathered",) if device == "cpu" else ("flash4", "flex", "triton", "gathered"):
            call = functools.partial(attend, mask=mask, kernel=name)
            own.append(Contender(f"{name}, blocks of {block}", call, area))
        kernels: dict[str, TritonListsKernel] = {}
        if tiles and device == "cuda":
            kernels = {f"r{t.rows}-t{t.tile}-w{t.warps}-s{t.stages}": _Tiled(tiles=t) for t in TILES}
            kernels |= {f"forward {variant.label}": _Tiled(variant) for variant in VARIANTS}
        for name, kernel in kernels.items():
            call = functools.partial(_run, kernel, mask)
            own.append(Contender(f"triton {name}, blocks of {block}", call, area))
        found[mask] = own
    return found


def _run(kernel: TritonListsKernel, mask: BlockLists, *inputs: Tensor) -> Tensor:
    operands = Operands(*inputs, scale=inputs[0].shape[-1] ** -0.5, mask=mask)
    return kernel.run(chain.request_for(operands, needs_grad=True), operands)[0]


def fault(
    contender: Contender, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor, expected: tuple[Tensor, ...]
) -> str | None:
    """None if the gradients are right, else what is wrong."""
    try:
        found = contender.run(inputs, grad)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    for name, one, other in zip(("query", "key", "value"), found, expected, strict=True):
        error = float((one.float() - other).norm() / other.norm())
        if not error <= BOUND:
            return f"the gradient of {name} is off by {error:.1e}"
    return None


def figures_of(shape: Shape, device: str, rounds: int, tiles: bool) -> list[Figure]:
    """Time and rate of each contender, and the gain of `attend` over the best dense kernel."""
    generator = torch.Generator(device).manual_seed(_SEED)
    size = (shape.batch, shape.layout.length, shape.heads, shape.dim)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, grad = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    right: dict[str, Contender] = {}
    for mask, found in contenders_of(shape, device, tiles).items():
        expected = exact_gradients(inputs, grad, mask)
        for one in found:
            wrong = fault(one, inputs, grad, expected)
            print(f"  {one.name}: {'right' if wrong is None else 'LEFT OUT: ' + wrong}", flush=True)
            if wrong is None:
                right[one.name] = one
    calls = {name: functools.partial(one.run, inputs, grad) for name, one in right.items()}
    times = time_rotation(calls, device=device, rounds=rounds)
    pairs = shape.batch * shape.heads * shape.dim * shape.layout.length**2
    figures = []
    for name, one in right.items():
        timing = times[name].device
        rate = 14.0 * pairs * one.area / timing.median / 1e9
        note = f"{rate:.0f} TFLOP/s of useful work, {timing.rounds} rounds"
        note += f"; {chosen(one, inputs)}" if name.startswith("attend") else ""
        label = f"{shape.name}: {name}"
        figures.append(Figure(label, timing.median, timing.low, timing.high, "ms", note=note))
    best = min((name for name in right if name.endswith("dense")), key=lambda name: times[name].device.median)
    for name, one in right.items():
        if name.startswith("attend"):
            gain = times[best].device.median / times[name].device.median
            note = f"density {one.area:.3f}; over {best}"
            figures.append(Figure(f"{shape.name}: gain of {name}", gain, note=note))
    return figures


def exact_gradients(
    inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor, mask: BlockLists | None
) -> tuple[Tensor, ...]:
    """In fp32, by gathering; over all blocks where nothing is masked."""
    if mask is None:
        length = inputs[0].shape[1]
        mask = BlockLists.full((128, 128), (length, length))
    exact = tuple(t.detach().float().requires_grad_() for t in inputs)
    out = attend(*exact, mask=mask, kernel="gathered")
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out, exact, grad.float())


def chosen(contender: Contender, inputs: tuple[Tensor, Tensor, Tensor]) -> str:
    """The kernel that `attend` took."""
    stats = EngineStats()
    contender.attention(*inputs, stats=stats)
    return ", ".join(stats.calls)


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes whose name contains this")
    parser.add_argument("--tiles", action="store_true", help="also time other tiles of the Triton passes")
    parser.add_argument(
        "--quick",
        "--dry-run",
        dest="dry_run",
        action="store_true",
        help="tiny shapes on a CPU: does the script run?",
    )
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available() and not options.dry_run
    if not cuda and not options.dry_run:
        parser.error("there is no GPU here; --dry-run times tiny shapes on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False  # what is compared with is exact
    figures: list[Figure] = []
    states = [card_state()]
    shapes = [shape for shape in (SHAPES if cuda else DRY_SHAPES) if options.only in shape.name]
    if not shapes:
        parser.error(f"--only {options.only}: no shape has that in its name")
    for shape in shapes:
        print(f"{shape.name}: {shape.layout.length} tokens, {shape.heads} heads", flush=True)
        figures += figures_of(shape, "cuda" if cuda else "cpu", options.rounds, options.tiles)
        states.append(card_state())
        write_report(options.out, TOPIC, figures, seeds=[_SEED], card=states)
        if cuda:
            torch.cuda.empty_cache()
    print_figures(figures)
    return figures


if __name__ == "__main__":
    main()
