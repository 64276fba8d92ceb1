"""What a capture costs: a forward of FLUX.1 in its real size at 1024 px, with and without it, on one card.

    python -m diffctrl.scripts.bench.capture --out docs/results/capture.json [--quick]

Weights are random (bf16, made on the card). Each contender is a forward under some controls; all of them
take turns. `stock` is the model by itself, `engine` the model with its attention run by the engine and
nothing kept: a capture is held against the faster one of the two. Checked besides: the output with a capture
is bit for bit that of the engine at the same blocks (others keep their stock processors, with a kernel of
torch's), and captured weights are the softmax in float32. On a CPU, or with --quick, a tiny model without
bars: does the script run?

`Contender` and `rotation` serve other forwards of the same model too (a whole grounding call).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import diffctrl
from diffctrl.attention.capture import CaptureResult, CaptureSpec
from diffctrl.control import ControlHandle
from diffctrl.families import Call, Site
from diffctrl.processors import CaptureAttnProcessor, ControlAttnProcessor, NeutralAttnProcessor
from diffctrl.scripts.bench.harness import (
    Figure,
    Timing,
    card_state,
    print_figures,
    summarise,
    write_report,
)

SEED = 20262
PHRASE = tuple(range(3, 23))  # 20 of the 512 text tokens
TEXT = 512
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """A FLUX of these sizes, and its picture in tokens of 16 pixels."""

    double: int
    single: int
    heads: int
    dim: int
    text_width: int
    side: int
    rope: tuple[int, int, int]


REAL = Shape(19, 38, 24, 128, 4096, 64, (16, 56, 56))
TINY = Shape(2, 2, 2, 16, 64, 12, (4, 6, 6))


def flux(shape: Shape, device: str) -> nn.Module:
    """The transformer with random weights, made where it runs: 24 GB need no host memory and no minutes."""
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(
            num_layers=shape.double,
            num_single_layers=shape.single,
            attention_head_dim=shape.dim,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.text_width,
            guidance_embeds=True,
            axes_dims_rope=shape.rope,
        )
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]), generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def flux_inputs(shape: Shape, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(SEED + 1)
    rows = torch.arange(shape.side, dtype=torch.float32)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(torch.bfloat16)

    return {
        "hidden_states": randn(1, shape.side**2, 64),
        "encoder_hidden_states": randn(1, TEXT, shape.text_width),
        "pooled_projections": randn(1, 768),
        "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=device, dtype=torch.bfloat16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), rows, rows).to(device),
        "txt_ids": torch.zeros(TEXT, 3, device=device),
    }


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@dataclass(slots=True)
class Contender:
    """Something that is timed, under controls that are put on before and taken off after each round.

    Attributes:
        call: what is timed; a forward of the model.
        handle: of the controls, removed; None for none.
        before: done before each round, untimed.
    """

    call: Callable[[], Any]
    handle: ControlHandle | None = None
    before: Callable[[], None] = lambda: None

    def __enter__(self) -> Contender:
        if self.handle is not None:
            self.handle.resume()
        self.before()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.handle is not None:
            self.handle.remove()


def under(model: nn.Module, inputs: dict[str, Tensor], processor: ControlAttnProcessor) -> Contender:
    """A forward of the model under a processor."""
    handle = diffctrl.apply(model, processor)
    handle.remove()
    before = processor.reset if isinstance(processor, CaptureAttnProcessor) else lambda: None
    return Contender(lambda: run(model, inputs), handle, before)


def rotation(
    contenders: dict[str, Contender], rounds: int, device: str
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Milliseconds of each contender, taking turns, and the most bytes that it had allocated on the card."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int] = {}
    for turn in range(rounds + 2):  # two rounds to warm up: kernels compile, and are tested
        for name, contender in contenders.items():
            with contender:
                if device == "cpu":
                    start = time.perf_counter()
                    contender.call()
                    spent = 1e3 * (time.perf_counter() - start)
                    peaks[name] = 0
                else:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    contender.call()
                    end.record()
                    end.synchronize()
                    spent = start.elapsed_time(end)
                    peaks[name] = torch.cuda.max_memory_allocated()
            if turn > 1:
                times[name].append(spent)
    return {name: summarise(made) for name, made in times.items()}, peaks


# --- what is captured ---------------------------------------------------------------------------------------


def captures() -> dict[str, CaptureAttnProcessor]:
    phrase = CaptureSpec(only_keys=PHRASE)
    grounding = {
        "map": CaptureSpec(only_keys=PHRASE, blocks="each", depth=(0.42, 0.95)),
        "image": CaptureSpec(quantity="column_mass", blocks="each", depth=(0.42, 0.95)),
        "even": CaptureSpec(quantity="column_entropy", blocks="each", depth=(0.42, 0.95)),
        "text": CaptureSpec(quantity="column_mass", queries="text", blocks="each", depth=(0.42, 0.95)),
    }
    return {
        "capture": CaptureAttnProcessor(phrase),
        "capture, all text and sinks, 30 blocks": CaptureAttnProcessor(grounding),
        "capture by second_call": CaptureAttnProcessor(phrase, route="second_call"),
        "capture by chunked": CaptureAttnProcessor(phrase, route="chunked"),
    }


BARS = {"capture": 1.10}


class _NeutralWhere(NeutralAttnProcessor):
    """The engine at the blocks where another processor acts."""

    def __init__(self, other: ControlAttnProcessor) -> None:
        super().__init__()
        self.other = other

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return self.other.select(sites)


class _Calls(ControlAttnProcessor):
    """Keeps some queries and all keys of some blocks, and leaves the others to their stock processors."""

    method = "calls"

    def __init__(self, names: Sequence[str], rows: Sequence[int]) -> None:
        super().__init__()
        self.names, self.rows, self.kept = names, list(rows), {}

    def acts_on(self, site: Site) -> bool:
        return site.name in self.names

    def transform_inputs(self, site: Site, call: Call) -> Call:
        rows = [call.image.start + row for row in self.rows]
        self.kept[site.name] = call.query[:, rows].float(), call.key.float()
        return call


def worst_error(model: nn.Module, inputs: dict[str, Tensor], blocks: tuple[int, ...]) -> tuple[float, float]:
    """Largest absolute and relative error of captured weights of 64 queries in some blocks."""
    count = inputs["hidden_states"].shape[1]
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))[:64].tolist()
    spec = CaptureSpec(
        only_keys=PHRASE, only_queries=tuple(rows), only_blocks=blocks, heads="each", blocks="each"
    )
    with diffctrl.capture(model, spec) as maps:
        run(model, inputs)
    result: CaptureResult = maps.result()
    calls = _Calls(result.sites, rows)
    with diffctrl.apply(model, calls):
        run(model, inputs)
    absolute = relative = 0.0
    for place, name in enumerate(result.sites):
        query, key = (part.transpose(1, 2) for part in calls.kept[name])
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        expected = torch.softmax(scores.double(), -1)[..., list(PHRASE)]  # text comes first
        error = (result.values[:, place] - expected).abs()
        absolute = max(absolute, float(error.max()))
        relative = max(relative, float((error / expected).max()))
    return absolute, relative


def figures_of(
    times: dict[str, Timing], peaks: dict[str, int], routes: dict[str, str], bars: bool
) -> list[Figure]:
    figures = [
        Figure(
            f"{name}, one forward",
            t.median,
            t.low,
            t.high,
            "ms",
            note=f"{t.rounds} rounds{routes.get(name, '')}",
        )
        for name, t in times.items()
    ]
    plain = min(("stock", "engine"), key=lambda name: times[name].median)
    base = times[plain]
    for name, t in times.items():
        if not name.startswith("capture"):
            continue
        bar = BARS.get(name) if bars else None
        value, low, high = t.median / base.median, t.low / base.high, t.high / base.low
        figures.append(
            Figure(f"{name}, over {plain}", value, low, high, "", bar, "<=", routes.get(name, "").strip(", "))
        )
        if peaks[name]:
            extra = (peaks[name] - peaks["engine"]) / MIB
            bar = 200.0 if bars and name == "capture" else None
            figures.append(
                Figure(f"{name}, peak memory beyond engine", extra, unit="MiB", bar=bar, compare="<=")
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = args.quick or device == "cpu"
    shape, rounds = (TINY, 2) if quick else (REAL, args.rounds)
    print(card_state())
    model, inputs = flux(shape, device), flux_inputs(shape, device)
    processors = captures()
    contenders = {
        "stock": Contender(lambda: run(model, inputs)),
        "engine": under(model, inputs, NeutralAttnProcessor()),
        **{name: under(model, inputs, processor) for name, processor in processors.items()},
    }
    outputs, routes = {}, {}
    for name, contender in contenders.items():
        with contender:
            outputs[name] = run(model, inputs)
            if name in processors and contender.handle is not None:
                (stats,) = contender.handle.stats().values()
                routes[name] = f", routes {stats['captures']}, kernels {stats['calls']}"
    if not bool(outputs["stock"].isfinite().all()):
        raise RuntimeError("the random model's output is not finite: its weights are badly scaled")
    figures = []
    for name, processor in processors.items():
        with diffctrl.apply(model, _NeutralWhere(processor)):
            equal = torch.equal(outputs[name], run(model, inputs))
        figures.append(Figure(f"{name}, output as without it", float(equal), bar=1.0, note="bit for bit"))
    last = shape.double + shape.single - 1
    absolute, relative = worst_error(model, inputs, (0, shape.double, last))
    figures.append(
        Figure("largest error of a weight", absolute, bar=1e-5, compare="<=", note="64 queries, 3 blocks")
    )
    figures.append(Figure("largest relative error of a weight", relative, bar=1e-3, compare="<="))
    times, peaks = rotation(contenders, rounds, device)
    figures += figures_of(times, peaks, routes, bars=not quick)
    print_figures(figures)
    write_report(args.out, "capture", figures, seeds=[SEED], card=card_state())


if __name__ == "__main__":
    main()
