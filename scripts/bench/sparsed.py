"""SparseD on whole models of LLaDA-8B's and Dream-7B's shape with random weights: steps, patterns,
generations.

    python -m diffctrl.scripts.bench.sparsed --out docs/results/sparsed_speed.json [--quick] [--variants]
    python -m diffctrl.scripts.bench.sparsed --out docs/results/sparsed_speed_compiled.json --compile

Per context: a dense step (the faster of the stock model and of the engine's dense kernel), the step that
takes the pattern, a sparse step, the memory beyond a dense step; and the same of one layer's attention
alone. Generations of 128 and 1024 steps are computed from these three steps and the step rule, not run. At
4k tokens the processor is timed as a user gets it, which is dense. A model runs without its language head,
as a sampler needs few of its rows. The JSON is rewritten after each context, so a run that is cut short
leaves what it has. On a CPU, tiny shapes without bars: does the script run?
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffctrl
from diffctrl.attention import attend
from diffctrl.processors import SparseDAttnProcessor, SparseDConfig
from diffctrl.scripts.bench.harness import (
    Figure,
    Timing,
    card_state,
    print_table,
    summarise,
    time_rotation,
    write_report,
)
from diffctrl.sparsed import Builder, Layout, Phase, Schedule, fused

SEED = 20260
GENERATED = 128
TOTALS = (128, 1024)
# Steps of a generation that is timed: one warms up, one takes the pattern, the rest are sparse.
TIMED = SparseDConfig(skip=0.4, auto_dense=False)
TIMED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint's sizes."""

    name: str
    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    contexts: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    barred: bool = True

    def build(self, device: str) -> Any:
        """Random weights, bf16 on a GPU."""
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(
            vocab_size=1024, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(self.contexts), use_cache=False,
        )  # fmt: skip
        config.is_causal = False
        torch.manual_seed(SEED)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        try:
            with torch.device(device):
                return getattr(transformers, f"{self.kind}Model")(config).eval()
        finally:
            torch.set_default_dtype(before)

    @property
    def dim(self) -> int:
        return self.hidden // self.heads


MODELS = (
    Model("LLaDA-8B", "Llama", 4096, 12288, 32, 32, 32),
    Model("Dream-7B", "Qwen2", 3584, 18944, 28, 28, 4),
)
TINY = (
    Model("tiny LLaDA", "Llama", 64, 96, 2, 4, 4, (512, 1024), barred=False),
    Model("tiny Dream", "Qwen2", 112, 96, 2, 14, 2, (512,), barred=False),
)


@dataclass(slots=True)
class Steps:
    """Milliseconds of the steps of one context, and what the control said."""

    stock: list[float] = field(default_factory=list)
    phases: dict[Phase, list[float]] = field(default_factory=lambda: {phase: [] for phase in Phase})
    default: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> tuple[str, Timing]:
        """The faster dense step, and whose it is."""
        stock, engine = summarise(self.stock), summarise(self.phases[Phase.DENSE])
        return ("stock", stock) if stock.median <= engine.median else ("engine", engine)


# --- whole models -------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], device: str) -> tuple[float, int]:
    """(milliseconds, peak bytes) of one call."""
    import time

    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start), 0
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated()


@contextmanager
def fast_stock(device: str) -> Iterator[None]:
    """The stock model with torch's fastest dense kernels allowed, cuDNN first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device == "cpu":
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(order, set_priority=True):
        yield


def measure(model: Any, tokens: int, device: str, rounds: int, with_default: bool, compiled: bool) -> Steps:
    """Stock and controlled steps in turn.

    After one warm-up of each; long contexts go without, as every kernel has then run on shorter ones, unless
    their code is compiled for each length.
    """
    ids = torch.randint(0, 1024, (1, tokens), device=device)
    found = Steps()
    torch.compiler.reset()  # each length gets code of its own, and all of them together are more than is kept

    def forward() -> Any:
        return model(input_ids=ids)

    warm = compiled or tokens <= 16384
    control, default = controlled(model, TIMED), controlled(model, SparseDConfig())
    for turn in range(rounds + warm):
        with fast_stock(device):
            found.stock.append(timed(forward, device)[0])
        generation(control, forward, tokens, device, found)
        if with_default:
            found.default.append(default_step(default, forward, tokens, device))
        if warm and not turn:
            found.stock.clear()
            found.default.clear()
            for times in found.phases.values():
                times.clear()
    return found


def controlled(model: Any, config: SparseDConfig) -> Any:
    """Off until `at_work`; one object for all rounds, since compiled code is made for it."""
    control: Any = diffctrl.apply(model, SparseDAttnProcessor(config))
    control.remove()
    return control


@contextmanager
def at_work(control: Any) -> Iterator[None]:
    control.resume()
    try:
        yield
    finally:
        control.remove()


def generation(control: Any, forward: Callable[[], Any], tokens: int, device: str, found: Steps) -> None:
    with at_work(control):
        control.begin(torch.tensor([tokens - GENERATED]), GENERATED, TIMED_STEPS)
        for step in range(TIMED_STEPS):
            control.set_step(step)
            milliseconds, peak = timed(forward, device)
            phase = control.controller.phase
            found.phases[phase].append(milliseconds)
            found.memory[phase.value] = max(found.memory.get(phase.value, 0), peak)
        found.stats = control.controller.stats()


def default_step(control: Any, forward: Callable[[], Any], tokens: int, device: str) -> float:
    """The last step of a generation of 8 with the default settings."""
    with at_work(control):
        control.begin(torch.tensor([tokens - GENERATED]), GENERATED, 8)
        control.set_step(0)
        forward()
        control.set_step(1)
        return timed(forward, device)[0]


# --- one layer's attention alone ----------------------------------------------------------------------------


def attention_figures(model: Model, tokens: int, device: str, rounds: int, variants: bool) -> list[Figure]:
    """One layer, random queries and keys: dense, sparse, block scores, the pattern with its lists."""
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, model.dim, generator=generator, device=device).to(dtype)

    query, key, value = draw(model.heads), draw(model.kv_heads), draw(model.kv_heads)
    scale = 1 / math.sqrt(model.dim)
    layout = Layout.of(torch.tensor([tokens - GENERATED]), GENERATED, TIMED.block_size)
    builder = Builder.of(TIMED, query, key, scale, None)
    lse: Any = None
    if builder.wants_lse(scale):
        lse = attend(query, key, value, scale=scale, return_lse=True)[1]
    pattern = builder.build(query, key, layout, lse)
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: attend(query, key, value, scale=scale),
        "sparse": lambda: attend(query, key, value, mask=pattern.lists, scale=scale),
        "pattern": lambda: builder.build(query, key, layout, lse),
    }
    if lse is not None:
        sizes = ([tokens], [tokens], scale, TIMED.block_size, lse)
        forms = fused.CANDIDATES if variants else (fused.table_form(90, model.dim),)
        calls |= {
            f"scores {form.label}": lambda form=form: fused.fused_scores(query, key, *sizes, form)
            for form in forms
        }
    times = time_rotation(calls, device=device, rounds=rounds, warm_seconds=0.2)
    place = f"{model.name} {tokens} attention"
    figures = [
        Figure(f"{place}, {name}", t.call.median, t.call.low, t.call.high, "ms") for name, t in times.items()
    ]
    dense = times["dense"].call
    for name, timing in times.items():
        if name != "dense":
            ratio_name, share = f"{place}, {name} over dense", timing.call.median / dense.median
            note = f"density {pattern.lists.density():.4f}, builder {pattern.builder}"
            figures.append(Figure(ratio_name, share, unit="x", note=note))
    return figures


# --- figures ------------------------------------------------------------------------------------------------


def figures_of(model: Model, tokens: int, steps: Steps) -> list[Figure]:
    whose, dense = steps.dense
    build, sparse = summarise(steps.phases[Phase.BUILD]), summarise(steps.phases[Phase.SPARSE])
    engine = summarise(steps.phases[Phase.DENSE])
    place = f"{model.name} {tokens}"
    kernels = ", ".join(f"{name} {count}" for name, count in steps.stats["calls"].items())
    figures = [
        Figure(f"{place} dense step", dense.median, dense.low, dense.high, "ms", note=f"{whose}; {kernels}"),
        Figure(f"{place} dense step of the control", engine.median, engine.low, engine.high, "ms"),
        Figure(f"{place} step that takes the pattern", build.median, build.low, build.high, "ms"),
        Figure(f"{place} sparse step", sparse.median, sparse.low, sparse.high, "ms"),
    ]
    long = tokens == 65536 and model.barred
    density = f"pattern density {steps.stats['pattern_density']:.4f} by counts"
    figures.append(
        ratio(f"{place} dense step over sparse step", dense, sparse, 1.6 if long else None, note=density)
    )
    cost = (build.median - engine.median) / dense.median
    builders = "".join(steps.stats["builders"])
    figures.append(
        Figure(
            f"{place} cost of the pattern in dense steps",
            cost,
            unit="",
            bar=1.0 if long else None,
            compare="<=",
            note=f"{builders}, lists for the kernels included; beside the dense step that takes it",
        )  # fmt: skip
    )
    for total in TOTALS:
        bar = {128: 1.45, 1024: 1.6}[total] if long else None
        figures.append(
            generation_figure(place, total, dense.median, engine.median, build.median, sparse.median, bar)
        )
    if steps.memory.get("dense"):
        extra = max(steps.memory["build"], steps.memory["sparse"]) - steps.memory["dense"]
        figures.append(
            Figure(
                f"{place} peak memory beyond a dense step",
                extra / 2**30,
                unit="GiB",
                bar=1.5 if long else None,
                compare="<=",
                note=f"lists {steps.stats['list_bytes'] / 2**20:.0f} MiB of it, packed "
                f"{steps.stats['pattern_bytes'] / 2**20:.0f} MiB",
            )  # fmt: skip
        )
    if steps.default:
        bar = 1.02 if tokens == 4096 and model.barred else None
        name = f"{place} step with default settings over dense step"
        figures.append(
            ratio(name, summarise(steps.default), dense, bar, "<=", note="auto_dense keeps short rows dense")
        )
    return figures


def ratio(
    name: str, over: Timing, under: Timing, bar: float | None, compare: str = ">=", note: str = ""
) -> Figure:
    return Figure(
        name,
        over.median / under.median,
        over.low / under.high,
        over.high / under.low,
        "x",
        bar,
        compare,
        note,
    )


def generation_figure(
    place: str, total: int, dense: float, engine: float, build: float, sparse: float, bar: float | None
) -> Figure:
    """A dense generation over one with default settings, from the times of the steps."""
    count = Schedule.of(SparseDConfig(), total).count()
    run = count[Phase.DENSE] * engine + count[Phase.BUILD] * build + count[Phase.SPARSE] * sparse
    parts = ", ".join(f"{number} {phase.value}" for phase, number in count.items())
    return Figure(
        f"{place} generation of {total} steps, dense over SparseD", total * dense / run, unit="x", bar=bar,
        note=f"computed from the measured steps: {parts}",
    )  # fmt: skip


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() and not args.dry_run else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    models = MODELS if device == "cuda" else TINY
    figures: list[Figure] = []
    states = [card_state()]
    topic = "sparsed_speed_compiled" if args.compile else "sparsed_speed"
    for model in models:
        print(f"{model.name}: {model.layers} layers, {model.heads}/{model.kv_heads} heads", flush=True)
        with torch.no_grad():
            net = model.build(device)
            if args.compile:
                for layer in net.layers:
                    layer.compile(dynamic=False)
            contexts = model.contexts[-1:] if args.longest else model.contexts
            for tokens in contexts[:2] if args.quick and device == "cuda" else contexts:
                rounds = args.rounds or (8 if tokens <= 4096 else 3 if tokens <= 16384 else 2)
                steps = measure(net, tokens, device, rounds, tokens <= 4096, args.compile)
                figures += figures_of(model, tokens, steps)
                states.append(card_state())
                write_report(args.out, topic, figures, seeds=[SEED], card=states)
                print_table(["figure", "value"], [[f.name, f"{f.value:.3f} {f.unit}"] for f in figures[-9:]])
            del net
            if device == "cuda":
                torch.cuda.empty_cache()
            alone = model.contexts[-1:] if device == "cpu" else (16384, 65536)
            for tokens in alone[:1] if args.quick else alone:
                figures += attention_figures(model, tokens, device, 5, args.variants)
                write_report(args.out, topic, figures, seeds=[SEED], card=states)
    claims = [f for f in figures if f.bar is not None]
    print("card:", " | ".join(states))
    shown = claims or figures
    rows = [[f.name, f"{f.value:.3f}", str(f.bar), str(f.as_dict()["holds"]), f.note] for f in shown]
    print_table(["claim" if claims else "figure", "value", "bar", "holds", "note"], rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="4k and 8k tokens only; tiny shapes on a CPU")
    parser.add_argument("--variants", action="store_true", help="also time other forms of the fused scores")
    parser.add_argument("--rounds", type=int, default=0, help="of every context, instead of 8 to 1")
    parser.add_argument("--compile", action="store_true", help="the layers, for dense and sparse alike")
    parser.add_argument("--longest", action="store_true", help="only the longest context")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
