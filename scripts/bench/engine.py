"""Attention kernels against each other on one card: dense peers, and block lists at density 1, 0.25 and 0.1.

    python -m diffctrl.scripts.bench.engine --out docs/results/engine.json [--quick] [--variants
    flash4,triton,flex] [--shapes short,32k]

Random lists with equal counts per row and another set per head; useful work is 4 * B * H * D * (attended
pairs). Every contender is first compared with an fp32 reference on sampled rows, and a key outside a row's
list is changed: the row must not move by a bit. A contender that fails is not timed. The bars are taken of
`attend`, which is what a user gets. `--variants` adds other forms of kernels to the rotation, and ragged
lists; they count for no bar. The JSON is rewritten after each shape, so a run that is cut short leaves what
it has.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffctrl.attention import chain
from diffctrl.attention.api import attend
from diffctrl.attention.kernels.base import Operands
from diffctrl.attention.kernels.flash4 import Flash4Kernel
from diffctrl.attention.kernels.flex import FlexForm, FlexKernel
from diffctrl.attention.kernels.triton_lists import HOPPER_CANDIDATES, TritonListsKernel
from diffctrl.attention.stats import EngineStats
from diffctrl.scripts.bench.cases import SEED, Contender, Shape, fault, inputs, random_lists
from diffctrl.scripts.bench.harness import (
    Figure,
    Measured,
    card_state,
    print_table,
    time_rotation,
    write_report,
)

DENSITIES = (1.0, 0.25, 0.1)

SHAPES = (
    Shape("short", 4608, 24, bars=((0.25, 0.75), (0.1, 0.60))),
    Shape("32k", 32768, 12, bars=((0.25, 0.93),)),
    Shape("119k", 119056, 24, bars=((0.25, 0.93),)),
)
DRY_SHAPES = (Shape("tiny", 700, 2, 32, bars=((0.25, 0.1),)), Shape("small", 1030, 3, 32))


# --- contenders


def kernel_call(kernel: Any) -> Callable[[Operands], torch.Tensor]:
    """A kernel of ours, called as the chain calls it once it has chosen."""
    known: list[Any] = []

    def call(operands: Operands) -> torch.Tensor:
        if not known:
            known.append(chain.request_for(operands))
            reason = kernel.why_not(known[0])
            if reason is not None:
                raise RuntimeError(reason)
        return kernel.run(known[0], operands)[0]

    return call


def sdpa_call(backend: str) -> Callable[[Operands], torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def call(operands: Operands) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (operands.query, operands.key, operands.value))
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, scale=operands.scale).transpose(1, 2)

    return call


def public_flash4(operands: Operands) -> torch.Tensor:
    """The peer as its users call it."""
    from diffctrl.attention.kernels.flash4_library import library

    return library().flash_attn_func(
        operands.query, operands.key, operands.value, softmax_scale=operands.scale
    )[0]


def dense_calls(device: str, with_fa2: bool) -> dict[str, Callable[[Operands], torch.Tensor]]:
    if device == "cpu":
        return {"sdpa": sdpa_call("FLASH_ATTENTION")}
    from diffctrl.attention.kernels.flash4_library import installed_version

    calls: dict[str, Callable[[Operands], torch.Tensor]] = {"cudnn": sdpa_call("CUDNN_ATTENTION")}
    if installed_version() is None:
        print("flash-attn-4 is not installed: its rows are missing, and the bars are taken against cuDNN.")
    else:
        calls["flash-attn-4"] = public_flash4
    if with_fa2:
        calls["fa2"] = sdpa_call("FLASH_ATTENTION")
    return calls


def sparse_calls(
    device: str, shape: Shape, variants: list[str]
) -> dict[str, Callable[[Operands], torch.Tensor]]:
    calls: dict[str, Callable[[Operands], torch.Tensor]] = {"attend": whole_engine}
    for name in ("gathered",) if device == "cpu" else ("flash4", "triton", "flex"):
        kernel = chain.load(name)
        if isinstance(kernel, str):
            print(f"{name}: {kernel}")
        else:
            calls[name] = kernel_call(kernel)
    for family in variants if device == "cuda" else ():
        calls |= variant_calls(family, shape)
    return calls


def variant_calls(family: str, shape: Shape) -> dict[str, Callable[[Operands], torch.Tensor]]:
    """What could run instead; on the longest shape, those of them that could be for every length."""
    if family == "flash4":
        return {"flash4 of the library": kernel_call(Flash4Kernel(scheduled=False))}
    if family == "triton":
        variants = HOPPER_CANDIDATES if shape.tokens <= 8192 else HOPPER_CANDIDATES[:1]
        return {f"triton {v.label}": kernel_call(TritonListsKernel(v)) for v in variants}
    # Each is one step away from the default, so that a difference has one cause.
    flex = [FlexForm(warps=4), FlexForm(whole=True), FlexForm(dynamic=False)]
    if shape.tokens <= 8192:
        flex += [FlexForm(whole=True, tile=128, stages=2), FlexForm(whole=True, rows=64, warps=4, stages=2)]
        flex += [FlexForm(whole=True, descriptors=True)]
    return {form.label: kernel_call(FlexKernel(form)) for form in flex} if shape.tokens <= 65536 else {}


def whole_engine(operands: Operands) -> torch.Tensor:
    """What a processor calls: the checks, the choice and the kernel it falls on."""
    out = attend(operands.query, operands.key, operands.value, mask=operands.mask, scale=operands.scale)
    assert isinstance(out, torch.Tensor)
    return out


# --- one shape


def contenders_of(shape: Shape, device: str, args: argparse.Namespace) -> list[Contender]:
    q, k, v = inputs(shape, device)
    dense = Operands(q, k, v, 1.0 / math.sqrt(shape.dim))
    huge = shape.tokens > 65536
    found = [
        Contender(f"{name} dense", call, 1.0, dense, True)
        for name, call in dense_calls(device, args.fa2 and not huge).items()
    ]
    for density in DENSITIES[1:] if huge else DENSITIES:
        sparse = replace(dense, mask=random_lists(shape, density, device))
        for name, call in sparse_calls(device, shape, args.variants).items():
            found.append(Contender(f"{name} {density:g}", call, density, sparse))
    if args.variants and not huge:
        sparse = replace(dense, mask=random_lists(shape, 0.25, device, ragged=True))
        for name, call in sparse_calls(device, shape, args.variants).items():
            if not name.startswith("attend"):
                found.append(Contender(f"{name} 0.25 ragged", call, 0.25, sparse))
    right = []
    for contender in found:
        wrong = fault(contender, shape)
        print(f"  {contender.name}: {'right' if wrong is None else 'LEFT OUT: ' + wrong}", flush=True)
        if wrong is None:
            right.append(contender)
    return right


def flop(contender: Contender, shape: Shape) -> float:
    area = 1.0 if contender.operands.mask is None else contender.operands.mask.density()
    return 4.0 * shape.heads * shape.tokens**2 * area * shape.dim


def figures_of(shape: Shape, contenders: list[Contender], times: dict[str, Measured]) -> list[Figure]:
    figures, rate = [], {}
    for c in contenders:
        work = flop(c, shape)
        for kind, timing in (("device", times[c.name].device), ("call", times[c.name].call)):
            value, low, high = (work / ms / 1e9 for ms in (timing.median, timing.high, timing.low))
            rate[c.name, kind] = (value, low, high)
            note = f"{timing.median:.4f} ms, {timing.rounds} rounds, {timing.dropped} dropped"
            figures.append(Figure(f"{shape.name} {c.name} {kind}", value, low, high, "TFLOP/s", note=note))
    return figures + claims_of(shape, contenders, rate)


def claims_of(
    shape: Shape, contenders: list[Contender], rate: dict[tuple[str, str], tuple[float, float, float]]
) -> list[Figure]:
    """The rate of `attend` over the best dense kernel's. The bar is for the device; the call is shown."""
    figures = []
    for kind in ("device", "call"):
        peers = {c.name: rate[c.name, kind] for c in contenders if c.dense}
        for density, bar in shape.bars:
            ours = [c for c in contenders if c.name == f"attend {density:g}"]
            if not ours or not peers:
                continue
            mask = ours[0].operands.mask
            assert mask is not None
            peer = max(peers, key=lambda name: peers[name])
            top, (value, low, high) = peers[peer], rate[ours[0].name, kind]
            figures.append(
                Figure(
                    f"{shape.name} lists {density:g}, {kind} rate over best dense",
                    value / top[0],
                    low / top[2],
                    high / top[1],
                    "",
                    bar if kind == "device" else None,
                    note=f"density {mask.density():.4f} in whole blocks; {chosen(ours[0])} over {peer}",
                )  # fmt: skip
            )
    return figures


def chosen(contender: Contender) -> str:
    """The kernel that `attend` took."""
    stats = EngineStats()
    o = contender.operands
    attend(o.query, o.key, o.value, mask=o.mask, scale=o.scale, stats=stats)
    return ", ".join(stats.calls)


def rows_of(shape: Shape, contenders: list[Contender], times: dict[str, Measured]) -> list[list[str]]:
    rows = []
    for c in contenders:
        device, call = times[c.name].device, times[c.name].call
        work = flop(c, shape)
        cells = [f"{device.median:.3f}", f"{work / device.median / 1e9:.0f}"]
        cells += [f"{call.median:.3f}", f"{work / call.median / 1e9:.0f}"]
        rows.append([shape.name, c.name, *cells])
    return rows


def main() -> None:
    args = parse()
    device = "cpu" if args.dry_run else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = DRY_SHAPES if args.dry_run else [s for s in SHAPES if s.name in args.shapes.split(",")]
    figures: list[Figure] = []
    rows: list[list[str]] = []
    states = [card_state()]
    for shape in shapes:
        print(f"{shape.name}: {shape.tokens} tokens, {shape.heads} heads", flush=True)
        with torch.no_grad():
            contenders = contenders_of(shape, device, args)
            calls = {c.name: c.run for c in contenders}
            times = time_rotation(calls, device=device, rounds=8 if args.quick else args.rounds)
        figures += figures_of(shape, contenders, times)
        rows += rows_of(shape, contenders, times)
        states.append(card_state())
        write_report(args.out, "engine", figures, seeds=[SEED], card=states)
        print_table(
            ["shape", "contender", "device ms", "TFLOP/s", "call ms", "TFLOP/s"], rows[-len(contenders) :]
        )
        del contenders, calls
        if device == "cuda":
            torch.cuda.empty_cache()
    claims = [f for f in figures if f.bar is not None]
    table = [[f.name, f"{f.value:.3f}", str(f.bar), str(f.as_dict()["holds"]), f.note] for f in claims]
    print("card:", " | ".join(states))
    print_table(["claim", "value", "bar", "holds", "note"], table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="8 rounds")
    parser.add_argument(
        "--variants",
        nargs="?",
        const="flash4,triton,flex",
        default="",
        help="also time other forms of these kernels, and ragged lists, for no bar (all: no value)",
    )
    parser.add_argument("--fa2", action="store_true", help="also time FlashAttention-2 through torch")
    parser.add_argument("--shapes", default="short,32k,119k")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does the script run?")
    args = parser.parse_args()
    args.variants = [family for family in args.variants.split(",") if family]
    if unknown := sorted(set(args.variants) - {"flash4", "triton", "flex"}):
        parser.error(f"--variants takes flash4, triton and flex, not {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    main()
