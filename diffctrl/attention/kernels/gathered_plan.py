"""The work plan of the gathered kernel: which rows of Q, K and V each call of the inner attention takes.

An item is one (batch row, head, run of query blocks with one common key list). Items of equal shape form a
chunk, which is one call; a chunk is bounded in bytes, so that gathered copies stay in cache and memory stays
bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lists import BlockLists

# Query rows that neighbouring blocks with one list may be merged into: fewer gathers and larger tiles.
MERGED_ROWS = 1024
# From this many keys on, a list of consecutive blocks is read in place, one item a call, instead of gathered.
IN_PLACE_KEYS = 2048


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that a plan depends on beside the lists."""

    batch: int
    heads: int
    kv_heads: int
    row_bytes: int  # of one token of K, of V and of Q: head_dim * itemsize
    pair_bytes: (
        int  # extra bytes per (query, key) pair held at a time: score matrices of the backward, rule masks
    )
    budget: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One call: `items` attentions of q_rows queries by kv_rows keys.

    q_index: int64 (items * q_blocks,), rows of Q as (B * H * NQ, bq * D). The last one may be cut.
    kv_index: int64 (items * kv_blocks,), rows of K as (B * Hkv * NK, bk * D). The last one may be cut.
    start: first row of K of a single item whose key blocks are consecutive, else None.
    rows, partial: int64 (items, 2), batch row and first query block; bool (items, kv_blocks), which blocks an
        element rule applies to. None where there is no rule.
    """

    items: int
    q_blocks: int
    kv_blocks: int
    q_rows: int
    kv_rows: int
    q_index: torch.Tensor
    kv_index: torch.Tensor
    start: int | None = None
    rows: torch.Tensor | None = None
    partial: torch.Tensor | None = None

    def to(self, device: torch.device) -> Chunk:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Chunk(
            self.items, self.q_blocks, self.kv_blocks, self.q_rows, self.kv_rows,
            self.q_index.to(device), self.kv_index.to(device), self.start, move(self.rows),
        move(self.partial), )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rows:
    """Key lists per query block, one for every (batch row, head) that differs: full and partial ones united.

    indices (Bm, Hm, NQ, W), counts and kv_rows (Bm, Hm, NQ), partial bool like indices or None.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    kv_rows: torch.Tensor
    partial: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Items:
    """Columns of the item table, int64 (N,): batch row, head, first query block, ...; `row` is the list."""

    batch: torch.Tensor
    head: torch.Tensor
    first: torch.Tensor
    q_blocks: torch.Tensor
    q_rows: torch.Tensor
    row: torch.Tensor

    def take(self, index: torch.Tensor) -> _Items:
        return _Items(*(getattr(self, name)[index] for name in self.__slots__))


def make_plan(lists: BlockLists, key: PlanKey) -> tuple[Chunk, ...]:
    """Chunks in an order fixed by the lists and the key alone; rows without keys are in none."""
    rows = _united_rows(lists)
    items = _items(lists, rows, key)
    counts, kv_rows = rows.counts.flatten()[items.row], rows.kv_rows.flatten()[items.row]
    masked = torch.zeros_like(counts)
    if rows.partial is not None:
        masked = rows.partial.flatten(0, 2).any(-1).long()[items.row]
    shape = torch.stack([masked, items.q_blocks, items.q_rows, counts, kv_rows], 1)
    shapes, group = torch.unique(shape, dim=0, return_inverse=True)
    order = torch.argsort(group, stable=True)
    chunks: list[Chunk] = []
    for part, values in zip(order.split(torch.bincount(group).tolist()), shapes.tolist(), strict=True):
        chunks += _chunks_of_shape(lists, rows, items.take(part), values, key)
    return tuple(chunks)


def _united_rows(lists: BlockLists) -> _Rows:
    lists = lists.clipped()
    indices, counts, partial = lists.indices.long(), lists.counts.long(), None
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    if lists.partial_counts is not None and lists.partial_indices is not None:
        p_indices, p_counts = lists.partial_indices.long(), lists.partial_counts.long()
        p_used = torch.arange(p_indices.shape[-1]) < p_counts.unsqueeze(-1)
        beyond = lists.n_k_blocks
        joined = torch.cat([indices.masked_fill(~used, beyond), p_indices.masked_fill(~p_used, beyond)], -1)
        indices, source = joined.sort(-1)
        counts = counts + p_counts
        used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        partial = (source >= used.shape[-1] - p_indices.shape[-1]) & used
        indices = indices.masked_fill(~used, 0)
    bk = lists.block[1]
    limit = torch.tensor(lists.lengths[1]) if lists.n_valid is None else lists.n_valid.long().view(-1, 1, 1)
    last = indices.gather(-1, (counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    # Ascending lists: only the last block can be cut, by the end of the keys or by n_valid.
    kv_rows = (counts - 1) * bk + torch.minimum(torch.tensor(bk), limit - last * bk)
    return _Rows(indices, counts, kv_rows, partial)


def _items(lists: BlockLists, rows: _Rows, key: PlanKey) -> _Items:
    """Merges neighbours with one list, drops empty rows, spreads shared lists over batch and heads."""
    bm, hm, nq = rows.counts.shape
    bq, sq = lists.block[0], lists.lengths[0]
    same = torch.zeros(bm, hm, nq, dtype=torch.bool)
    same[..., 1:] = (rows.counts[..., 1:] == rows.counts[..., :-1]) & (
        (rows.indices[..., 1:, :] == rows.indices[..., :-1, :]).all(-1)
    )
    if rows.partial is not None:  # the rule sees absolute positions: such blocks stay single
        some = rows.partial.any(-1)
        same[..., 1:] &= ~(some[..., 1:] | some[..., :-1])
    block = torch.arange(nq).expand(bm, hm, nq)
    run_start = torch.where(same, 0, block).cummax(-1).values
    is_first = (block - run_start) % max(MERGED_ROWS // bq, 1) == 0
    row = is_first.flatten().nonzero().squeeze(-1)
    following = torch.cat([row[1:], torch.tensor([bm * hm * nq])])
    # A run ends with its (batch row, head) too: block 0 of the next one always starts an item.
    q_blocks = following - row
    kept = rows.counts.flatten()[row] > 0
    row, q_blocks = row[kept], q_blocks[kept]
    first = row % nq
    q_rows = torch.minimum(q_blocks * bq, sq - first * bq)
    batch, head = row // (hm * nq), row // nq % hm
    repeats_b, repeats_h = key.batch // bm, key.heads // hm
    spread = torch.arange(repeats_b * repeats_h).repeat_interleave(len(row))
    again = torch.arange(len(row)).repeat(repeats_b * repeats_h)
    return _Items(
        batch[again] + spread // repeats_h,
        head[again] + spread % repeats_h,
        first[again],
        q_blocks[again],
        q_rows[again],
        row[again],
    )


def _chunks_of_shape(
    lists: BlockLists, rows: _Rows, items: _Items, shape: list[int], key: PlanKey
) -> list[Chunk]:
    masked, q_blocks, q_rows, kv_blocks, kv_rows = shape
    (_, bk), nq, nk = lists.block, lists.n_q_blocks, lists.n_k_blocks
    keys = rows.indices.flatten(0, 2)[items.row, :kv_blocks]  # (N, kv_blocks)
    kv_base = (items.batch * key.kv_heads + items.head // (key.heads // key.kv_heads)) * nk
    kv_index = kv_base.unsqueeze(1) + keys
    q_base = (items.batch * key.heads + items.head) * nq + items.first
    q_index = q_base.unsqueeze(1) + torch.arange(q_blocks)
    partial = (
        rows.partial.flatten(0, 2)[items.row, :kv_blocks] if masked and rows.partial is not None else None
    )
    where = torch.stack([items.batch, items.first], 1) if masked else None

    pair_bytes = key.pair_bytes + (9 if masked else 0)  # a rule's bool mask and its additive form
    item_bytes = 2 * key.row_bytes * (kv_blocks * bk + q_rows) + pair_bytes * q_rows * kv_rows
    in_place = keys[:, -1] - keys[:, 0] == kv_blocks - 1
    in_place &= torch.tensor(kv_rows >= IN_PLACE_KEYS)
    chunks = []
    for consecutive in (True, False):
        chosen = (in_place == consecutive).nonzero().squeeze(-1)
        size = 1 if consecutive else max(key.budget // item_bytes, 1)
        for part in chosen.split(size) if len(chosen) else ():
            chunks.append(
                Chunk(
                    len(part),
                    q_blocks,
                    kv_blocks,
                    q_rows,
                    kv_rows,
                    q_index[part].flatten(),
                    kv_index[part].flatten(),
                    int(kv_index[part[0], 0]) if consecutive else None,
                    None if where is None else where[part],
                    None if partial is None else partial[part],
                )  # fmt: skip
            )
    return chunks
