"""What the benchmark of the engine runs on: shapes, random lists, a contender, the check of its output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffctrl.attention.kernels.base import Operands
from diffctrl.attention.lists import BlockLists

SEED = 20260
BLOCK = (128, 128)
BOUND = 8e-3  # relative Frobenius error of the sampled rows, bf16


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    tokens: int
    heads: int
    dim: int = 128
    bars: tuple[tuple[float, float], ...] = ()  # density -> share of the best dense kernel's rate


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


def random_lists(shape: Shape, density: float, device: str, *, ragged: bool = False) -> BlockLists:
    """Per head and query block the same number of key blocks, drawn without repetition.

    ragged: any number from 1 to about twice that instead.
    """
    nq, nk = (-(-shape.tokens // size) for size in BLOCK)
    count = max(1, round(density * nk))
    generator = torch.Generator(device).manual_seed(SEED + 1)
    longest = min(nk, 2 * count - 1) if ragged else count
    rows, counts = [], torch.full((1, shape.heads, nq), count, dtype=torch.int32)
    if ragged:
        counts = torch.randint(1, longest + 1, counts.shape, generator=torch.Generator().manual_seed(SEED))
    for head in range(shape.heads):
        noise = torch.rand(nq, nk, generator=generator, device=device)
        drawn = noise.topk(longest, dim=-1).indices
        unused = torch.arange(longest, device=device) >= counts[0, head].to(device)[:, None]
        rows.append(drawn.masked_fill(unused, nk).sort(dim=-1).values.to("cpu", torch.int32))
    return BlockLists(BLOCK, (shape.tokens, shape.tokens), counts, torch.stack(rows).unsqueeze(0))


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
