"""Attention kernels against each other on one card: dense peers, and block lists at density 1, 0.25 and 0.1.

    python -m diffctrl.scripts.bench.engine --out docs/results/engine.json [--quick] [--variants] [--shapes
    short,32k]

Random lists with equal counts per row and another set per head; useful work is 4 * B * H * D * (attended
pairs). Every contender is first compared with an fp32 reference on sampled rows, and a key outside a row's
list is changed: the row must not move by a bit. A contender that fails is not timed. The bars are taken of
`attend`, which is what a user gets. `--variants` adds other forms of our kernels to the rotation; they count
for no bar. The JSON is rewritten after each shape, so a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffctrl.attention import chain
from diffctrl.attention.api import attend
from diffctrl.attention.kernels.base import Operands
from diffctrl.attention.kernels.flash4 import Flash4Kernel, Form
from diffctrl.attention.kernels.triton_lists import TritonListsKernel, Variant
from diffctrl.attention.lists import BlockLists
from diffctrl.attention.stats import EngineStats
from diffctrl.scripts.bench.harness import (
    Figure,
    Measured,
    card_state,
    print_table,
    time_rotation,
    write_report,
)

SEED = 20260
BLOCK = (128, 128)
BOUND = 8e-3  # relative Frobenius error of the sampled rows, bf16
DENSITIES = (1.0, 0.25, 0.1)


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    tokens: int
    heads: int
    dim: int = 128
    bars: tuple[tuple[float, float], ...] = ()  # density -> share of the best dense kernel's rate


SHAPES = (
    Shape("short", 4608, 24, bars=((0.25, 0.75), (0.1, 0.60))),
    Shape("32k", 32768, 12, bars=((0.25, 0.93),)),
    Shape("119k", 119056, 24, bars=((0.25, 0.93),)),
)
DRY_SHAPES = (Shape("tiny", 700, 2, 32, bars=((0.25, 0.1),)), Shape("small", 1030, 3, 32))


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    call: Callable[[Operands], torch.Tensor]
    density: float  # nominal
    operands: Operands
    dense: bool = False

    def run(self) -> torch.Tensor:
        return self.call(self.operands)


# --- inputs and lists


def inputs(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(SEED)
    size = (1, shape.tokens, shape.heads, shape.dim)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3))
    return q, k, v


def random_lists(shape: Shape, density: float, device: str) -> BlockLists:
    """Per head and query block the same number of key blocks, drawn without repetition."""
    nq, nk = (-(-shape.tokens // size) for size in BLOCK)
    count = max(1, round(density * nk))
    generator = torch.Generator(device).manual_seed(SEED + 1)
    rows = []
    for _ in range(shape.heads):
        noise = torch.rand(nq, nk, generator=generator, device=device)
        rows.append(noise.topk(count, dim=-1).indices.sort(dim=-1).values.to("cpu", torch.int32))
    indices = torch.stack(rows).unsqueeze(0)
    counts = torch.full(indices.shape[:3], count, dtype=torch.int32)
    return BlockLists(BLOCK, (shape.tokens, shape.tokens), counts, indices)


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


def sparse_calls(device: str, shape: Shape, variants: bool) -> dict[str, Callable[[Operands], torch.Tensor]]:
    calls = {"attend": whole_engine}
    for name in ("gathered",) if device == "cpu" else ("flash4", "triton", "flex"):
        kernel = chain.load(name)
        if isinstance(kernel, str):
            print(f"{name}: {kernel}")
        else:
            calls[name] = kernel_call(kernel)
    if variants and device == "cuda":
        calls |= variant_calls(shape)
    return calls


def variant_calls(shape: Shape) -> dict[str, Callable[[Operands], torch.Tensor]]:
    """What the short shape could run instead; on long ones, those of them that could be for every length."""
    triton = [Variant(descriptor=True, specialize=True, tile=128), Variant(descriptor=True, specialize=True)]
    flash4 = [Form(persistent=True)]
    if shape.tokens <= 8192:
        triton += [Variant(descriptor=True, rows=64, stages=1)]
        flash4 += [Form(overlap=False), Form(persistent=True, overlap=False)]
    calls = {f"triton {v.label}": kernel_call(TritonListsKernel(v)) for v in triton}
    return calls | {form.label: kernel_call(Flash4Kernel(form)) for form in flash4}


def whole_engine(operands: Operands) -> torch.Tensor:
    """What a processor calls: the checks, the choice and the kernel it falls on."""
    out = attend(operands.query, operands.key, operands.value, mask=operands.mask, scale=operands.scale)
    assert isinstance(out, torch.Tensor)
    return out


# --- correctness


@functools.cache
def sampled_blocks(shape: Shape) -> tuple[tuple[int, int], ...]:
    """(head, query block) pairs: the first, the last, and some between."""
    nq = -(-shape.tokens // BLOCK[0])
    generator = torch.Generator().manual_seed(SEED + 2)
    heads = torch.randint(shape.heads, (4,), generator=generator).tolist()
    blocks = torch.randint(nq, (4,), generator=generator).tolist()
    return ((0, 0), (shape.heads - 1, nq - 1), *zip(heads, blocks, strict=True))


def reference_rows(operands: Operands, head: int, block: int) -> torch.Tensor:
    """fp32 attention of one query block of one head, (rows, D)."""
    tokens = listed_tokens(operands, head, block)
    rows = slice(block * BLOCK[0], (block + 1) * BLOCK[0])
    q = operands.query[0, rows, head].float()
    k, v = operands.key[0, :, head], operands.value[0, :, head]
    if tokens is not None:
        k, v = k[tokens], v[tokens]
    return torch.softmax(q @ k.float().T * operands.scale, -1) @ v.float()


def listed_tokens(operands: Operands, head: int, block: int) -> torch.Tensor | None:
    mask = operands.mask
    if mask is None:
        return None
    listed = mask.indices[0, head, block, : int(mask.counts[0, head, block])].to(operands.key.device)
    tokens = (listed.long()[:, None] * BLOCK[1] + torch.arange(BLOCK[1], device=listed.device)).flatten()
    return tokens[tokens < operands.key.shape[1]]


def fault(contender: Contender, shape: Shape) -> str | None:
    """None if the contender computes the right thing, else what is wrong."""
    operands = contender.operands
    try:
        out = contender.run()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:160]}"
    for head, block in sampled_blocks(shape):
        expected = reference_rows(operands, head, block)
        got = out[0, block * BLOCK[0] : (block + 1) * BLOCK[0], head].float()
        error = float((got - expected).norm() / expected.norm())
        if not error <= BOUND:
            return f"relative error {error:.1e} at head {head}, query block {block}"
    return None if contender.dense else _moved_by_outside_key(contender, out)


def _moved_by_outside_key(contender: Contender, out: torch.Tensor) -> str | None:
    operands, (head, block) = contender.operands, (0, 1)
    assert operands.mask is not None
    listed = set(operands.mask.indices[0, head, block, : int(operands.mask.counts[0, head, block])].tolist())
    outside = [b for b in range(operands.mask.n_k_blocks) if b not in listed]
    if not outside:
        return None
    at, rows = outside[0] * BLOCK[1], slice(block * BLOCK[0], (block + 1) * BLOCK[0])
    key, value = operands.key.clone(), operands.value.clone()
    key[:, at] += 3
    value[:, at] += 3
    moved = contender.call(replace(operands, key=key, value=value))
    if not torch.equal(moved[0, rows, head], out[0, rows, head]):
        return "a key outside the list changed the row: the lists are ignored"
    return "no row changed with a changed key" if torch.equal(moved, out) else None


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
        "--variants", action="store_true", help="also time other forms of our kernels, for no bar"
    )
    parser.add_argument("--fa2", action="store_true", help="also time FlashAttention-2 through torch")
    parser.add_argument("--shapes", default="short,32k,119k")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does the script run?")
    return parser.parse_args()


if __name__ == "__main__":
    main()
