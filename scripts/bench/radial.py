"""Radial Attention on one card: attention, whole forwards and runs against the best dense kernel and stock.

    python -m diffctrl.scripts.bench.radial --out docs/results/radial.json [--part hunyuan,wan] [--quick]

Parts: mask, hunyuan, wan, long, profile, compile. Each can run in a call of its own; the figures of the
others stay in the file. Real sizes, random weights that all blocks of a kind share (see `video_models`),
bf16, one row. Dense is the best dense kernel of the card (what `attend` takes), which the same processor runs
in its dense steps; stock is diffusers without diffctrl. Sparse forwards have those blocks sparse that the
preset has; runs of 50 steps are put together from measured steps with the preset's dense ones. `--quick`
dry-runs all of it on tiny models, on a CPU as well.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffctrl
from diffctrl.attention import BlockLists, EngineStats, attend
from diffctrl.processors import RadialAttnProcessor
from diffctrl.radial import Layout, block_lists
from diffctrl.scripts.bench.forwards import Bench, BlockTimes, Times, forward, ratio, rotate
from diffctrl.scripts.bench.harness import Figure, card_state, print_figures, time_rotation, write_report
from diffctrl.scripts.bench.video_models import HUNYUAN, HUNYUAN_LONG, WAN, VideoModel

PARTS = ("mask", "hunyuan", "wan", "long", "profile", "compile")
STEPS = 50


# --- attention ----------------------------------------------------------------------------------------------


def attention_figures(bench: Bench, subject: VideoModel, short: str) -> list[Figure]:
    """One layer's attention, dense with each kernel and over the lists."""
    frames, tokens = subject.tokens
    layout = Layout(frames=frames, tokens=tokens, text=subject.text)
    family = "hunyuan_video" if subject.text else "wan"
    pattern, _ = bench.sparse().resolved(family, frames)
    lists = block_lists(pattern, layout)
    if subject.text:
        valid = frames * tokens + subject.text // 3
        lists = replace(lists, n_valid=torch.tensor([valid], dtype=torch.int32))
    generator = torch.Generator(bench.device).manual_seed(1)
    size = (1, layout.length, subject.heads, subject.head_dim)
    query, key, value = (
        torch.randn(size, generator=generator, device=bench.device).to(bench.dtype) for _ in range(3)
    )
    wrong = fault(query, key, value, lists)
    if wrong is not None:
        raise RuntimeError(f"sparse attention is wrong: {wrong}")
    calls: dict[str, Callable[[], Any]] = {"sparse": lambda: attend(query, key, value, mask=lists)}
    if bench.device == "cuda":
        for kernel in ("flash4", "cudnn"):
            calls[kernel] = lambda kernel=kernel: attend(query, key, value, kernel=kernel)
    else:
        calls["sdpa"] = lambda: attend(query, key, value)
    for name, call in list(calls.items()):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            print(f"  attention {name}: left out, {str(error).splitlines()[0]}")
            del calls[name]
    measured = time_rotation(calls, device=bench.device, rounds=3 if bench.quick else 7)
    stats = EngineStats()
    attend(query, key, value, mask=lists, stats=stats)
    figures = []
    for name, times in measured.items():
        one, area = times.call, lists.density() if name == "sparse" else 1.0
        rate = 4.0 * layout.length**2 * subject.heads * subject.head_dim * area / one.median / 1e9
        note = f"{rate:.0f} TFLOP/s" + (
            f", {', '.join(stats.calls)}, density {area:.4f}" if name == "sparse" else ""
        )
        figures.append(Figure(f"{short}: attention {name}", one.median, one.low, one.high, "ms", note=note))
    dense = min((n for n in measured if n != "sparse"), key=lambda n: measured[n].call.median)
    gain = measured[dense].call.median / measured["sparse"].call.median
    figures.append(Figure(f"{short}: attention, speed-up over {dense}", gain, unit="x"))
    return figures


def fault(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists) -> str | None:
    """None if sampled rows are right, else what is wrong."""
    out: Any = attend(query, key, value, mask=lists)
    (rows, width), counts = lists.block, lists.counts[0, 0]
    limit = lists.lengths[1] if lists.n_valid is None else int(lists.n_valid[0])
    for block in (0, len(counts) // 3, len(counts) - 1):
        listed = lists.indices[0, 0, block, : int(counts[block])].long()
        tokens = (listed[:, None] * width + torch.arange(width)).flatten()
        tokens = tokens[tokens < limit].to(query.device)
        for head in (0, query.shape[2] - 1):
            part = slice(block * rows, (block + 1) * rows)
            q, k, v = (
                query[0, part, head].float(),
                key[0, tokens, head].float(),
                value[0, tokens, head].float(),
            )
            wanted = torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v
            error = float((out[0, part, head].float() - wanted).norm() / wanted.norm())
            if not error < 1e-2:
                return f"relative error {error:.1e} at block {block}, head {head}"
    return None


# --- parts --------------------------------------------------------------------------------------------------


def mask_part(bench: Bench) -> list[Figure]:
    subject = HUNYUAN
    frames, tokens = subject.tokens
    pattern, _ = RadialAttnProcessor().resolved("hunyuan_video", frames)
    taken = []
    for _ in range(3):
        block_lists.cache_clear()
        start = time.perf_counter()
        block_lists(pattern, Layout(frames=frames, tokens=tokens, text=subject.text)).density()
        taken.append(time.perf_counter() - start)
    note = "lists of the whole sequence and their density, on the CPU, once for each size"
    return [
        Figure("mask: build", statistics.median(taken), min(taken), max(taken), "s", 1.0, "<=", note=note)
    ]


def model_part(
    bench: Bench, model: VideoModel, short: str, bars: tuple[float, float | None, float], stock: bool
) -> list[Figure]:
    """Attention, forwards, and runs of 50 steps.

    Args:
        bars: of a forward over dense, of a forward over stock, of a run over dense.
    """
    subject = bench.subject(model)
    figures = attention_figures(bench, subject, short)
    network = subject.make(bench.device, bench.dtype)
    inputs = subject.inputs(network, bench.device, bench.dtype, subject.latents)
    contenders = {"dense": bench.dense(), "sparse": bench.sparse()} | ({"stock": None} if stock else {})
    wiring = disagreement(bench, network, inputs) if stock else None
    times = rotate(bench, contenders, network, inputs, 1 if bench.quick else 2)
    for name, found in times.items():
        note = f"peak {found.memory:.1f} GB" if found.memory else ""
        figures.append(found.figure(f"{short}: forward {name}", note))
    bars_of = {"dense": bars[0], "stock": bars[1]}
    for name in contenders:
        if name != "sparse":
            over = ratio(
                f"{short}: forward, speed-up over {name}", times[name], times["sparse"], bars_of[name]
            )
            over.note = wiring if name == "stock" and wiring else ""
            figures.append(over)
    figures.append(whole_run(bench, subject, short, times["dense"], times["sparse"], bars[2]))
    return figures


def disagreement(bench: Bench, network: nn.Module, inputs: dict[str, Any]) -> str:
    """How far dense attention under the control is from stock, on two frames: the wiring of the benchmark."""
    small = {**inputs, "hidden_states": inputs["hidden_states"][:, :, :2].contiguous()}
    expected = forward(network, small).float()
    with diffctrl.apply(network, bench.dense()):
        found = forward(network, small).float()
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.2:  # random weights amplify what 16 bits round; a wrong wiring gives 1
        raise RuntimeError(f"dense attention under the control is {error:.1e} away from stock diffusers")
    return f"dense under the control is {error:.1e} from stock in a forward of two frames"


def whole_run(
    bench: Bench, subject: VideoModel, short: str, dense: Times, sparse: Times, bar: float
) -> Figure:
    """A run of 50 steps, from measured ones."""
    family = "hunyuan_video" if subject.text else "wan"
    _, parts = RadialAttnProcessor().resolved(family, 33 if family == "hunyuan_video" else 21)
    first = parts.first(STEPS)

    def seconds(pick: Callable[[list[float]], float]) -> float:
        return first * pick(dense.seconds) + (STEPS - first) * pick(sparse.seconds)

    return Figure(
        f"{short}: run of {STEPS} steps, speed-up over dense",
        STEPS * dense.median / seconds(statistics.median),
        STEPS * min(dense.seconds) / seconds(max),
        STEPS * max(dense.seconds) / seconds(min),
        "x",
        bar,
        note=f"{first} dense steps; denoiser alone, put together from measured forwards",
    )


def long_part(bench: Bench) -> list[Figure]:
    """Four times the length: one block of each kind, measured, times their number."""
    subject = bench.subject(HUNYUAN_LONG)
    figures = attention_figures(bench, subject, "long") if bench.quick else []
    network = subject.make(bench.device, bench.dtype, only_one=True)
    inputs = subject.inputs(network, bench.device, bench.dtype, subject.latents)
    blocks = BlockTimes(bench, network, tuple(subject.blocks))
    found: dict[str, Times] = {}
    for name, processor in (("sparse", bench.sparse(dense_blocks=0)), ("dense", bench.dense())):
        with diffctrl.apply(network, processor):
            scaled = blocks.scaled(lambda: forward(network, inputs), subject.blocks, rounds=2)
        found[name] = scaled.times
        figures.append(found[name].figure(f"long: forward {name}", str(scaled)))
        print(f"  {name}: {found[name].median:.2f} s ({scaled})", flush=True)
    blocks.remove()
    figures.append(ratio("long: forward, speed-up over dense", found["dense"], found["sparse"], 4.0))
    return figures


# --- where the rest of the time is --------------------------------------------------------------------------

# Words in the names of GPU kernels -> what they belong to; the first that fits.
_KINDS = (
    ("attention", ("flash", "fmha", "attention", "lists_", "cudnn_generated", "cutedsl")),
    ("matrix products", ("gemm", "cublas", "cutlass", "nvjet", "matmul", "mm_")),
    ("norms", ("norm", "reduce", "welford")),
    ("copies", ("copy", "cat", "memcpy", "memset")),
)


def profile_part(bench: Bench) -> list[Figure]:
    """GPU time of one sparse forward of HunyuanVideo, by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    subject = bench.subject(HUNYUAN)
    network = subject.make(bench.device, bench.dtype, only_one=True)
    inputs = subject.inputs(network, bench.device, bench.dtype, subject.latents)
    activity = ProfilerActivity.CPU if bench.device == "cpu" else ProfilerActivity.CUDA
    with diffctrl.apply(network, bench.sparse()):
        forward(network, inputs)
        with profile(activities=[activity]) as taken:
            forward(network, inputs)
            if bench.device == "cuda":
                torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    for event in taken.key_averages():
        spent = event.self_cpu_time_total if bench.device == "cpu" else event.self_device_time_total
        name = event.key.lower()
        kind = next(
            (kind for kind, words in _KINDS if any(w in name for w in words)), "elementwise and others"
        )
        kinds[kind] = kinds.get(kind, 0.0) + spent / 1e6
    total = sum(kinds.values())
    return [
        Figure(
            f"profile: {kind}",
            spent / total,
            unit="of GPU time",
            note=f"{1e3 * spent:.1f} ms in one double and one single block of a sparse forward",
        )  # fmt: skip
        for kind, spent in sorted(kinds.items(), key=lambda item: -item[1])
    ]


def compile_part(bench: Bench) -> list[Figure]:
    """What torch.compile of the blocks gives to dense and to sparse forwards, on one block of each kind."""
    figures = []
    for model, short in ((HUNYUAN, "hunyuan"), (WAN, "wan")):
        found = compiled_and_eager(bench, bench.subject(model))
        for name in ("dense", "sparse"):
            eager, compiled = found[name, False], found[name, True]
            note = f"{eager:.2f} s eager, {compiled:.2f} s compiled; blocks times their number"
            title = f"compile: {short} {name}, speed-up over eager"
            figures.append(Figure(title, eager / compiled, unit="x", note=note))
        both = found["dense", True] / found["sparse", True]
        figures.append(Figure(f"compile: {short} sparse over dense, both compiled", both, unit="x"))
    return figures


def compiled_and_eager(bench: Bench, subject: VideoModel) -> dict[tuple[str, bool], float]:
    """Seconds of a forward by (dense or sparse, whether compiled)."""
    network = subject.make(bench.device, bench.dtype, only_one=True)
    inputs = subject.inputs(network, bench.device, bench.dtype, subject.latents)
    blocks = BlockTimes(bench, network, tuple(subject.blocks))
    found: dict[tuple[str, bool], float] = {}
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            for block in [block for stack in subject.blocks for block in getattr(network, stack)]:
                # Its forward alone: the hooks that take the time stay outside.
                backend = "eager" if bench.quick else "inductor"
                block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
        for name, processor in (("dense", bench.dense()), ("sparse", bench.sparse(dense_blocks=0))):
            with diffctrl.apply(network, processor):
                # The first round compiles.
                scaled = blocks.scaled(lambda: forward(network, inputs), subject.blocks, rounds=2)
            found[name, compiled] = scaled.times.median
    torch._dynamo.reset()
    return found


RUN: dict[str, Callable[[Bench], list[Figure]]] = {
    "mask": mask_part,
    "hunyuan": lambda bench: model_part(bench, HUNYUAN, "hunyuan", (2.3, 3.8, 1.7), stock=True),
    "wan": lambda bench: model_part(bench, WAN, "wan", (1.8, None, 1.45), stock=True),
    "long": long_part,
    "profile": profile_part,
    "compile": compile_part,
}


def kept_figures(path: Path | None, parts: list[str]) -> list[Figure]:
    """Figures of an earlier call, of the parts that do not run now."""
    if path is None or not path.is_file():
        return []
    known = json.loads(path.read_text())["figures"]
    fields = ("name", "value", "low", "high", "unit", "bar", "compare", "note")
    return [
        Figure(**{f: entry[f] for f in fields if entry.get(f) is not None})
        for entry in known
        if entry["name"].split(":")[0] not in parts
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--part", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny models, on a CPU where there is no GPU")
    options = parser.parse_args(arguments)
    parts = options.part.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--part {unknown[0]} is not one of {', '.join(PARTS)}")
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        parser.error("there is no GPU here; --quick dry-runs tiny models on a CPU")
    bench = Bench("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32, options.quick)
    figures, states = kept_figures(options.out, parts), [card_state()]
    for part in parts:
        print(f"{part}:", flush=True)
        start = time.perf_counter()
        with torch.no_grad():
            figures += RUN[part](bench)
        if cuda:
            torch.cuda.empty_cache()
        states.append(card_state())
        write_report(options.out, "radial", figures, seeds=[0, 1], card=states)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    print_figures(figures)


if __name__ == "__main__":
    main()
