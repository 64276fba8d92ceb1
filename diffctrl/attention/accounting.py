"""What a `BlockLists` amounts to: its hash, its densities, whether it is full or leaves rows without keys."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .lists import BlockLists


def digest_of(lists: BlockLists) -> str:
    digest = hashlib.blake2b(digest_size=16)
    rule = lists.rule
    digest.update(repr((lists.block, lists.lengths, lists.order, rule and rule.kind)).encode())
    tensors = [lists.counts, lists.indices, lists.n_valid, lists.partial_counts, lists.partial_indices]
    for tensor in tensors + list(rule.tensors if rule else ()):
        digest.update(b"-" if tensor is None else repr((tensor.dtype, tuple(tensor.shape))).encode())
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_full(lists: BlockLists) -> bool:
    all_blocks = bool((lists.counts == lists.n_k_blocks).all())
    return all_blocks and (lists.n_valid is None or bool((lists.n_valid == lists.lengths[1]).all()))


def has_empty_rows(lists: BlockLists) -> bool:
    if lists.partial_counts is not None:  # what a rule leaves of a block is not known block-wise
        return not bool((lists.counts > 0).all()) or lists.n_valid is not None
    if lists.n_valid is None:
        return not bool((lists.counts > 0).all())
    reached = lists.n_valid.view(-1, 1, 1) > lists.indices[..., 0] * lists.block[1]
    return not bool(((lists.counts > 0) & reached).all())


def areas(lists: BlockLists) -> tuple[float, float]:
    """(density, kernel_density)."""
    (bq, _), (sq, sk) = lists.block, lists.lengths
    heights = (sq - torch.arange(lists.n_q_blocks) * bq).clamp(max=bq)
    parts = [(lists.counts, lists.indices)]
    if lists.partial_counts is not None and lists.partial_indices is not None:
        parts.append((lists.partial_counts, lists.partial_indices))
    if lists.n_valid is None:
        possible = lists.counts.shape[0] * lists.heads * sq * sk
        area = sum(int((_covered(lists, *part) * heights).sum()) for part in parts)
    else:
        possible = area = 0
        for b, limit in enumerate(lists.n_valid.tolist()):
            row = b % lists.counts.shape[0]
            possible += lists.heads * sq * limit
            for counts, indices in parts:
                covered = _covered_below(lists, counts[row], indices[row], limit)
                area += int((covered * heights).sum())
    listed = sum(int(counts.sum(dtype=torch.int64)) for counts, _ in parts)
    blocks = lists.counts.numel() * lists.n_k_blocks
    return (area / possible if possible else 0.0), listed / blocks


def _covered(lists: BlockLists, counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Keys of each list. Lists ascend, so that the cut block can only be the last entry."""
    bk, sk = lists.block[1], lists.lengths[1]
    last = indices.gather(-1, (counts - 1).clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    cut = (counts > 0) & (last == lists.n_k_blocks - 1)
    return counts.long() * bk - cut * (lists.n_k_blocks * bk - sk)


def _covered_below(
    lists: BlockLists, counts: torch.Tensor, indices: torch.Tensor, limit: int
) -> torch.Tensor:
    """Keys of each list that lie before `limit`."""
    bk = lists.block[1]
    widths = (limit - torch.arange(lists.n_k_blocks) * bk).clamp(0, bk)
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return (widths[indices.long()] * used).sum(-1)
