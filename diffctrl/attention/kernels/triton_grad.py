"""Gradients of `triton_lists`: which tiles, and the launches. The device code is in `triton_grad_jit`.

Three kernels: what each query needs of the forward, then dQ over its lists, then dK and dV over the
transposed lists. Each gradient is written by one program, in a fixed order: deterministic, with no memory but
the gradients and two numbers for each query and head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..convert import transpose_lists
from ..lists import BlockLists
from .base import Operands
from .triton_runtime import on_device, power_of_two_divisor

_LOG2E = math.log2(math.e)
_ROWS = 64  # queries of a program of `grad_rows`
LARGEST_HEAD_DIM = 128  # two sums of this width fill the registers


@dataclass(frozen=True, slots=True)
class GradTiles:
    """rows: that a program owns, at most. tile: tokens that it passes over at a time. warps, stages: as
    Triton's num_warps, num_stages."""

    rows: int = 64
    tile: int = 64
    warps: int = 4
    stages: int = 2


def table_tiles(head_dim: int, block: tuple[int, int]) -> GradTiles:
    """For every card: no registers spill and 99 KB of shared memory are enough, read from the assembler for
    sm80 and sm90 (tests/attention/test_triton_grad.py). Of these, by time at head dim 32 on an H200
    (`scripts/bench/backward.py --tiles`): over blocks of 32 four warps take 1.7 times as long as two, which
    have too few registers for larger ones."""
    if head_dim > 64:
        return GradTiles(tile=32)
    return GradTiles(warps=2 if max(block) <= 32 else 4)


def gradients(
    operands: Operands,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: GradTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV, contiguous, in the dtypes of query, key and value.

    Args:
        operands: of the forward, with lists and without an element rule.
        grad: of `out`, (B, Sq, H, D).
        out, lse: as the forward gave them; lse fp32 (B, H, Sq), natural log.
        tiles: other than the table's, for benchmarks.
    """
    mask = operands.mask
    assert mask is not None
    query, key, value = (
        t.detach() if t.stride(3) == 1 else t.detach().contiguous()
        for t in (operands.query, operands.key, operands.value)
    )
    grad, out, lse = grad.contiguous(), out.detach().contiguous(), lse.contiguous()
    batch, q_len, heads, dim = query.shape
    k_len, kv_heads = key.shape[1], key.shape[2]
    dq = torch.empty_like(out)
    dk, dv = (t.new_empty((batch, k_len, kv_heads, dim)) for t in (key, value))
    if out.numel() == 0 or k_len == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    from . import triton_grad_jit

    device_code: Any = triton_grad_jit
    tiles = tiles or table_tiles(dim, mask.block)
    bq, bk = mask.block
    q_rows, k_rows = (power_of_two_divisor(size, tiles.rows) for size in mask.block)
    padded = max(16, 1 << (dim - 1).bit_length())
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    unit = 8 if not any(stride % 8 for stride in strides) else 1
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    inputs = (query, key, value, grad, lse2, delta)
    scalars = (operands.scale, operands.scale * _LOG2E, *(stride // unit for stride in strides))
    lists, transposed, n_valid = _lists(mask, query.device)
    # kernel, its lists, what it writes, rows of a program on either side, programs for tokens and heads
    parts = (
        (device_code.grad_query, lists, (dq,), q_rows, tiles.tile, -(-q_len // q_rows), heads),
        (device_code.grad_key_value, transposed, (dk, dv), tiles.tile, k_rows, -(-k_len // k_rows), kv_heads),
    )
    with on_device(query.device):
        device_code.grad_rows[(-(-q_len // _ROWS), heads, batch)](
            grad, out, lse, delta, lse2, q_len, heads, dim, padded, _ROWS
        )
        for kernel, (counts, indices), outputs, bm, bn, programs, turns in parts:
            kernel[(programs, turns, batch)](
                *inputs, *outputs, counts, indices, counts if n_valid is None else n_valid, *scalars,
                indices.shape[3], q_len, k_len, heads, heads // kv_heads, dim, padded, bq, bm, bk, bn,
                counts.shape[0] > 1, counts.shape[1] > 1, n_valid is not None, unit,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return dq, dk, dv


_Side = tuple[torch.Tensor, torch.Tensor]


def _lists(mask: BlockLists, device: torch.device) -> tuple[_Side, _Side, torch.Tensor | None]:
    """(counts, indices) by query block and by key block, int32, and n_valid (B,) where rows end early."""
    if mask.n_valid is not None:
        mask = mask.cached("cpu", "triton clipped", mask.clipped)
    lists = mask.on(device)

    def make() -> _Side:
        counts, indices = transpose_lists(mask.counts, mask.indices, mask.n_k_blocks)
        return counts.to(device), indices.to(device)

    return (lists.counts, lists.indices), mask.cached(device, "triton transposed", make), lists.n_valid
