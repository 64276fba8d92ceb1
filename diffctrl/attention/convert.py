"""`BlockLists` in the forms other kernels want: transposed, cut at n_valid, FlexAttention, flash-attn-4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .lists import BlockLists
from .rules import Rule


@dataclass(frozen=True, slots=True)
class FA4Lists:
    """Plain tensors for `flash_attn.cute`'s block-sparse call (on the CPU; the kernel moves and caches them).

    full_count int32 (Bm, Hm, NQ'), full_index int32 (Bm, Hm, NQ', W'): blocks attended in full.
    mask_count, mask_index: the partial ones; the call demands them, so without a rule they are zero, W' = 1.
    block: (bq', bk') to be passed as block_size.
    merged: query blocks were joined, and more pairs are attended than the mask asks for.
    kernel_density: listed over all blocks after the conversion.
    """

    full_count: torch.Tensor
    full_index: torch.Tensor
    mask_count: torch.Tensor
    mask_index: torch.Tensor
    block: tuple[int, int]
    merged: bool
    kernel_density: float


def transpose_lists(
    counts: torch.Tensor, indices: torch.Tensor, nk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists (Bm, Hm, NQ[, W]) by query block -> (Bm, Hm, NK[, W']) by key block, by a sort of the pairs."""
    bm, hm, nq, width = indices.shape
    used = torch.arange(width) < counts.unsqueeze(-1)
    head, q, slot = used.reshape(bm * hm, nq, width).nonzero(as_tuple=True)
    k = indices.reshape(bm * hm, nq, width)[head, q, slot].long()
    row = head * nk + k
    order = torch.argsort(row * nq + q)
    return _lists_from_pairs(row[order], q[order], (bm, hm, nk))


def _lists_from_pairs(
    row: torch.Tensor, entry: torch.Tensor, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted (row, entry) pairs -> counts of `shape` and compact indices (*shape, W)."""
    rows = shape[0] * shape[1] * shape[2]
    counts = torch.bincount(row, minlength=rows)
    starts = counts.cumsum(0) - counts
    indices = torch.zeros(rows, max(int(counts.max()), 1), dtype=torch.int32)
    indices[row, torch.arange(len(row)) - starts[row]] = entry.to(torch.int32)
    return counts.to(torch.int32).view(shape), indices.view(*shape, -1)


def transpose(lists: BlockLists) -> BlockLists:
    if lists.n_valid is not None or lists.rule is not None:
        raise ValueError(
            "transpose() takes masks without n_valid and without partial blocks. Use transpose_lists() on "
            "the block lists and keep the element rule in the kernel."
        )
    counts, indices = transpose_lists(lists.counts, lists.indices, lists.n_k_blocks)
    (bq, bk), (sq, sk) = lists.block, lists.lengths
    return BlockLists((bk, bq), (sk, sq), counts, indices, order=lists.order, allow_empty=True)


def clipped(lists: BlockLists) -> BlockLists:
    if lists.n_valid is None:
        return lists
    batch, bk = len(lists.n_valid), lists.block[1]
    fields: dict[str, Any] = {}
    for prefix in ("", "partial_"):
        counts, indices = getattr(lists, f"{prefix}counts"), getattr(lists, f"{prefix}indices")
        if counts is not None:
            indices = indices.expand(batch, *indices.shape[1:])
            used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
            used = used & (indices * bk < lists.n_valid.view(-1, 1, 1, 1))  # ascending: a prefix stays
            fields |= {f"{prefix}counts": used.sum(-1, dtype=torch.int32), f"{prefix}indices": indices}
    return replace(lists, **fields, allow_empty=True)


# --- flash-attn-4 -------------------------------------------------------------------------------------------


def to_fa4(lists: BlockLists, arch: int, head_dim: int, *, allow_merge: bool = False) -> FA4Lists:
    """Splits key blocks to the kernel's tile and, on sm100, merges query blocks in pairs if `allow_merge`.

    Raises ValueError with the reason where no exact conversion exists. n_valid is not folded in: call
    `clipped()` first and pass seqused_k, or refuse.
    """
    bq, bk = fa4_block(lists.block, arch, head_dim, merge=allow_merge)
    parts = []
    for counts, indices in ((lists.counts, lists.indices), (lists.partial_counts, lists.partial_indices)):
        if counts is None or indices is None:
            counts = torch.zeros_like(lists.counts)
            indices = torch.zeros(*lists.counts.shape, 1, dtype=torch.int32)
        else:
            counts, indices = _split_keys(counts, indices, lists, bk)
        parts.append((counts, indices))
    merged = bq > lists.block[0]
    if merged:
        if lists.rule is not None:
            raise ValueError(
                "Query blocks of a mask with partial blocks cannot be merged: rebuild it with bq = 256."
            )
        parts = [_merge_queries(c, i, bq // lists.block[0]) for c, i in parts]
    nk = -(-lists.lengths[1] // bk)
    listed = sum(int(c.sum(dtype=torch.int64)) for c, _ in parts)
    return FA4Lists(*parts[0], *parts[1], (bq, bk), merged, listed / (parts[0][0].numel() * nk))


def fa4_block(block: tuple[int, int], arch: int, head_dim: int, *, merge: bool = False) -> tuple[int, int]:
    """The (bq, bk) in which flash-attn-4 4.0.0b36 takes lists of `block`; ValueError if there is none."""
    bq, bk = block
    if arch // 10 == 9:
        sizes = (64, 128, 192, 256, 384)
        if bq not in sizes:
            raise ValueError(f"flash-attn-4 on sm90 takes query blocks of {sizes}, the mask has {bq}.")
        limit = 128 if head_dim <= 128 else 112 if head_dim <= 192 else 80
        return bq, _tile(bk, limit)
    if arch // 10 == 10:
        if bk % 128:
            raise ValueError(
                f"flash-attn-4 on sm100 takes key blocks that are multiples of 128, the mask has {bk}."
            )
        multiple = 128 if head_dim > 192 else 256
        if bq % multiple == 0:
            return bq, bk
        if merge and multiple % bq == 0:
            return multiple, bk
        raise ValueError(
            f"flash-attn-4 on sm100 takes query blocks that are multiples of {multiple}, the mask has {bq}."
        )
    raise ValueError(f"flash-attn-4 takes block lists on sm90 and sm100 only, not on sm{arch}.")


def _tile(bk: int, limit: int) -> int:
    """The largest divisor of bk that is a multiple of 16 and at most `limit`."""
    tiles = [t for t in range(16, limit + 1, 16) if bk % t == 0]
    if not tiles:
        raise ValueError(
            f"flash-attn-4 needs a key block with a divisor in 16, 32, ..., {limit}; the mask has {bk}."
        )
    return tiles[-1]


def _split_keys(
    counts: torch.Tensor, indices: torch.Tensor, lists: BlockLists, bk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = lists.block[1] // bk
    if parts == 1:
        return counts, indices
    finer = (indices.unsqueeze(-1) * parts + torch.arange(parts, dtype=torch.int32)).flatten(-2)
    nk = -(-lists.lengths[1] // bk)
    # The cut block may cover fewer small blocks than `parts`; being last in its list, it loses its end only.
    used = (torch.arange(finer.shape[-1]) < (counts * parts).unsqueeze(-1)) & (finer < nk)
    # The package refuses lists that are wider than there are blocks.
    return used.sum(-1, dtype=torch.int32), finer.masked_fill(~used, 0)[..., :nk].contiguous()


def _merge_queries(
    counts: torch.Tensor, indices: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of the lists of `group` neighbouring query blocks."""
    bm, hm, nq, width = indices.shape
    used = torch.arange(width) < counts.unsqueeze(-1)
    b, h, q, slot = used.nonzero(as_tuple=True)
    k = indices[b, h, q, slot].long()
    shape = (bm, hm, -(-nq // group))
    row = (b * hm + h) * shape[2] + q // group
    span = int(indices.max()) + 1
    pairs = torch.unique(row * span + k)
    return _lists_from_pairs(pairs // span, pairs % span, shape)


# --- FlexAttention ------------------------------------------------------------------------------------------


def to_flex(lists: BlockLists, device: torch.device, *, backward: bool = True) -> Any:
    """The lists as a `BlockMask` whose `mask_mod` is never trivial, with transposed lists for a backward.

    FlexAttention evaluates `mask_mod` in partial blocks only. So with n_valid every block that is cut in some
    batch row is passed as partial. Index tensors are as wide as there are blocks: the CPU's lowering insists
    on it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    full, partial = _flex_parts(lists)
    nq, nk = lists.n_q_blocks, lists.n_k_blocks
    fields: dict[str, Any] = {}
    for prefix, (counts, indices) in (("", partial), ("full_", full)):
        fields[f"{prefix}kv_num_blocks"] = counts.to(device, copy=True)
        fields[f"{prefix}kv_indices"] = _widened(indices.to(device), nk)
        q_counts, q_indices = transpose_lists(counts, indices, nk) if backward else (None, None)
        fields[f"{prefix}q_num_blocks"] = None if q_counts is None else q_counts.to(device)
        fields[f"{prefix}q_indices"] = None if q_indices is None else _widened(q_indices.to(device), nq)
    return BlockMask(
        seq_lengths=lists.lengths, BLOCK_SIZE=lists.block, mask_mod=_mask_mod(lists, device), **fields
    )


def _widened(indices: torch.Tensor, width: int) -> torch.Tensor:
    """Contiguous, full and partial lists alike: in places flex reads one with the strides of the other."""
    return torch.nn.functional.pad(indices, (0, width - indices.shape[-1])).contiguous()


def _flex_parts(
    lists: BlockLists,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """((full counts, indices), (partial counts, indices)); blocks cut by n_valid are partial ones."""
    lists = lists.clipped()
    if lists.partial_counts is not None and lists.partial_indices is not None:
        if lists.n_valid is None:
            return (lists.counts, lists.indices), (lists.partial_counts, lists.partial_indices)
        raise ValueError(
            "FlexAttention lists hold one element rule: n_valid beside partial blocks is not convertible."
        )
    empty = (torch.zeros_like(lists.counts), torch.zeros(*lists.counts.shape, 1, dtype=torch.int32))
    if lists.n_valid is None:
        return (lists.counts, lists.indices), empty
    # After clipping only the last entry of a list can be cut by n_valid: move that one to the partial list.
    limit = lists.n_valid.view(-1, 1, 1)
    last = lists.indices.gather(-1, (lists.counts - 1).clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    cut = (lists.counts > 0) & ((last + 1) * lists.block[1] > limit)
    partial = (cut.to(torch.int32), torch.where(cut, last, 0).to(torch.int32).unsqueeze(-1))
    return ((lists.counts - partial[0]), lists.indices), partial


def _mask_mod(lists: BlockLists, device: torch.device) -> Any:
    """Captures tensors only, each by its own name: a captured number would compile one kernel per value."""
    if lists.rule is None:
        limit = (
            torch.tensor([lists.lengths[1]], dtype=torch.int32) if lists.n_valid is None else lists.n_valid
        )
        limit = limit.to(device)
        if len(limit) == 1:
            return lambda b, h, q, k: k < limit[0]
        return lambda b, h, q, k: k < limit[b]
    rule: Rule = lists.rule.to(device)
    first = rule.tensors[0]
    if rule.kind == "causal":
        return lambda b, h, q, k: k <= q + first[0]
    if rule.kind == "kv_validity":
        if len(first) == 1:
            return lambda b, h, q, k: first[0, k]
        return lambda b, h, q, k: first[b, k]
    if rule.kind == "frame_bands":
        place, widths, sink = rule.tensors[1:]

        def in_bands(b: Any, h: Any, q: Any, k: Any) -> Any:
            band = (place[q] - place[k]).abs() <= widths[(first[q] - first[k]).abs()]
            return band | (first[q] < 0) | (first[k] < 0) | (sink[0] & (first[k] == 0))

        return in_bands
    k_frame, window = rule.tensors[1:]
    return lambda b, h, q, k: (first[q] - k_frame[k]).abs() <= window[0]
