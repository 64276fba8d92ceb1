"""Block-sparse attention by gathering: any device and float dtype, forward and backward, work as the density.

Per chunk of the plan the listed K and V blocks are copied into reused buffers and one dense attention runs
over them. The backward keeps only q, k, v, out and lse, and recomputes the probabilities chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..lists import BlockLists
from ..rules import Rule
from .base import Operands, Request
from .differentiable import differentiable
from .gathered_plan import Chunk, PlanKey, make_plan
from .inner import attention_with_lse

# Gathered bytes at a time. On a CPU the copies should stay in the cache of the cores that made them:
# measured, 64 MiB loses up to half of the speed. A GPU wants full launches instead: on an H200 the backward
# of 16 x 4160 tokens (6 heads of 32, blocks of 32) takes 40 ms with 64 MiB, 19 with 256, 18 with 1024.
CPU_BUDGET_PER_THREAD = 1 << 20
GPU_BUDGET = 256 << 20


class GatheredKernel:
    name = "gathered"

    def why_not(self, request: Request) -> str | None:
        if not request.sparse:
            return "needs block lists; dense calls have dense kernels"
        if not request.dtype.is_floating_point or request.dtype.itemsize < 2:
            return f"takes floating point of 16 bits and more, not {request.dtype}"
        return None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = differentiable(self, request, operands)
        return out, lse.float() if request.needs_lse else None

    def forward(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """Without gradients; lse in fp64 for fp64 inputs."""
        assert operands.mask is not None
        return gathered_forward(operands.query, operands.key, operands.value, operands.mask, operands.scale)

    def backward(
        self, operands: Operands, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key, value; `out` and `lse` as `run` gave them."""
        assert operands.mask is not None
        q, k, v = operands.query, operands.key, operands.value
        return gathered_backward(q, k, v, operands.mask, operands.scale, grad, out, lse)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Sizes of a call. Blocks of Q are rows (B * H * NQ, bq * D), of K and V rows (B * Hkv * NK, bk * D)."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    mask: BlockLists

    def q_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return _block_rows(tensor, self.mask.block[0], self.mask.n_q_blocks)

    def kv_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return _block_rows(tensor, self.mask.block[1], self.mask.n_k_blocks)

    def from_q_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(B * H * NQ, bq * D) -> (B, Sq, H, D), a view."""
        return rows.view(self.batch, self.heads, -1, self.dim)[:, :, : self.mask.lengths[0]].transpose(1, 2)

    def from_kv_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(self.batch, self.kv_heads, -1, self.dim)[:, :, : self.mask.lengths[1]].transpose(
            1, 2
        )


def _layout(query: torch.Tensor, key: torch.Tensor, mask: BlockLists) -> _Layout:
    return _Layout(query.shape[0], query.shape[2], key.shape[2], query.shape[3], mask)


def _block_rows(tensor: torch.Tensor, block: int, n_blocks: int) -> torch.Tensor:
    """(B, S, H, D) -> (B * H * n_blocks, block * D), zero padded; a copy unless it already lies so."""
    heads_first = tensor.transpose(1, 2)
    padding = n_blocks * block - tensor.shape[1]
    if padding:
        heads_first = F.pad(heads_first, (0, 0, 0, padding))
    return heads_first.reshape(-1, block * tensor.shape[3])


def _budget(device: torch.device) -> int:
    return torch.get_num_threads() * CPU_BUDGET_PER_THREAD if device.type == "cpu" else GPU_BUDGET


def _chunks(layout: _Layout, query: torch.Tensor, pair_bytes: int) -> tuple[Chunk, ...]:
    device = query.device
    row_bytes = layout.dim * query.element_size()
    key = PlanKey(layout.batch, layout.heads, layout.kv_heads, row_bytes, pair_bytes, _budget(device))
    return layout.mask.cached(
        device, f"gathered {key}", lambda: tuple(chunk.to(device) for chunk in make_plan(layout.mask, key))
    )


class _Gather:
    """Copies listed blocks into buffers that are kept from chunk to chunk: fresh ones cost page faults."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, rows: torch.Tensor, index: torch.Tensor, items: int, length: int, dim: int
    ) -> Any:
        """Rows `index` of `rows` as (items, length, dim): blocks joined, the last one cut."""
        needed = index.numel() * rows.shape[1]
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < needed:
            buffer = self.buffers[name] = rows.new_empty(needed)
        gathered = buffer[:needed].view(index.numel(), rows.shape[1])
        torch.index_select(rows, 0, index, out=gathered)
        return gathered.view(items, -1, dim)[:, :length]


def _take_kv(gather: _Gather, name: str, rows: torch.Tensor, chunk: Chunk, dim: int) -> torch.Tensor:
    if chunk.start is not None:
        return rows[chunk.start : chunk.start + chunk.kv_blocks].view(1, -1, dim)[:, : chunk.kv_rows]
    return gather.take(name, rows, chunk.kv_index, chunk.items, chunk.kv_rows, dim)


def _rule_on(mask: BlockLists, device: torch.device) -> Rule | None:
    lists = mask.on(device)
    return None if lists.rule_kind is None else Rule(lists.rule_kind, lists.rule_tensors)


def _allowed(chunk: Chunk, mask: BlockLists, rule: Rule | None) -> torch.Tensor | None:
    """Bool (items, q_rows, kv_rows) of a chunk with partial blocks, None for all others."""
    if chunk.partial is None or chunk.rows is None or rule is None:
        return None
    bq, bk = mask.block
    device = chunk.partial.device
    blocks = chunk.kv_index.view(chunk.items, -1) % mask.n_k_blocks
    offsets = torch.arange(bk, device=device)
    k = (blocks.unsqueeze(-1) * bk + offsets).flatten(1)[:, None, : chunk.kv_rows]
    q = (chunk.rows[:, 1:] * bq + torch.arange(chunk.q_rows, device=device)).unsqueeze(-1)
    in_full_block = ~chunk.partial.repeat_interleave(bk, 1)[:, None, : chunk.kv_rows]
    return in_full_block | rule.allowed(chunk.rows[:, 0].view(-1, 1, 1), q, k)


def gathered_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockLists, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Sq, H, D); lse (B, H, Sq), fp32, or fp64 for fp64 inputs (whose backward wants it exact)."""
    layout = _layout(query, key, mask)
    dim, bq = layout.dim, mask.block[0]
    q, k, v = layout.q_rows(query), layout.kv_rows(key), layout.kv_rows(value)
    rule = _rule_on(mask, query.device)
    # Rows that no chunk covers have no keys: out 0, lse -inf.
    out = torch.zeros_like(q)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.full((len(q), bq), float("-inf"), dtype=lse_dtype, device=q.device)
    gather = _Gather()
    for chunk in _chunks(layout, query, 0):
        part, part_lse = attention_with_lse(
            gather.take("q", q, chunk.q_index, chunk.items, chunk.q_rows, dim),
            _take_kv(gather, "k", k, chunk, dim),
            _take_kv(gather, "v", v, chunk, dim),
            scale,
            _allowed(chunk, mask, rule),
        )
        _put(out, chunk, part, bq)
        _put(lse, chunk, part_lse.unsqueeze(-1), bq)
    return layout.from_q_rows(out), lse.view(layout.batch, layout.heads, -1)[
        ..., : mask.lengths[0]
    ].contiguous()


def _put(rows: torch.Tensor, chunk: Chunk, values: torch.Tensor, bq: int) -> None:
    """Writes (items, q_rows, n) over the rows `chunk.q_index` of (B * H * NQ, bq * n)."""
    if chunk.q_rows < chunk.q_blocks * bq:
        values = F.pad(values, (0, 0, 0, chunk.q_blocks * bq - chunk.q_rows))
    rows.index_copy_(0, chunk.q_index, values.reshape(len(chunk.q_index), -1))


def gathered_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockLists,
    scale: float,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their dtypes; dK and dV are summed in fp32 (fp64 for fp64)."""
    layout = _layout(query, key, mask)
    dim, bq = layout.dim, mask.block[0]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = layout.q_rows(query), layout.kv_rows(key), layout.kv_rows(value)
    go = layout.q_rows(grad)
    # rowsum(dO * O) of every query: what the softmax subtracts from dP.
    delta = layout.q_rows((grad.to(work) * out.to(work)).sum(-1, keepdim=True))
    lse_rows = layout.q_rows(lse.to(work).transpose(1, 2).unsqueeze(-1))
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=work), torch.zeros_like(v, dtype=work)
    rule = _rule_on(mask, query.device)
    gather = _Gather()
    for chunk in _chunks(layout, query, 3 * work.itemsize):
        qs, gos, deltas, lses = (
            gather.take(name, rows, chunk.q_index, chunk.items, chunk.q_rows, width).to(work)
            for name, rows, width in (
                ("q", q, dim),
                ("go", go, dim),
                ("delta", delta, 1),
                ("lse", lse_rows, 1),
            )
        )
        ks = _take_kv(gather, "k", k, chunk, dim).to(work)
        vs = _take_kv(gather, "v", v, chunk, dim).to(work)
        probs = torch.bmm(qs, ks.transpose(1, 2)).mul_(scale).sub_(lses).exp_()
        allowed = _allowed(chunk, mask, rule)
        if allowed is not None:
            probs.masked_fill_(~allowed, 0.0)
        _add(dv, chunk, torch.bmm(probs.transpose(1, 2), gos), mask)
        scores_grad = torch.bmm(gos, vs.transpose(1, 2)).sub_(deltas).mul_(probs).mul_(scale)
        _put(dq, chunk, torch.bmm(scores_grad, ks).to(dq.dtype), bq)
        _add(dk, chunk, torch.bmm(scores_grad.transpose(1, 2), qs), mask)
    return (
        layout.from_q_rows(dq),
        layout.from_kv_rows(dk).to(key.dtype),
        layout.from_kv_rows(dv).to(value.dtype),
    )


def _add(rows: torch.Tensor, chunk: Chunk, values: torch.Tensor, mask: BlockLists) -> None:
    """Adds (items, kv_rows, D) to the rows `chunk.kv_index` of (B * Hkv * NK, bk * D)."""
    missing = chunk.kv_blocks * mask.block[1] - chunk.kv_rows
    if missing:
        values = F.pad(values, (0, 0, 0, missing))
    rows.index_add_(0, chunk.kv_index, values.reshape(len(chunk.kv_index), -1))


def iter_chunk_shapes(chunks: tuple[Chunk, ...]) -> Iterator[tuple[int, int, int]]:
    """(items, q_rows, kv_rows) of each call: what a benchmark or a test of the work done looks at."""
    return ((chunk.items, chunk.q_rows, chunk.kv_rows) for chunk in chunks)


KERNEL = GatheredKernel()
