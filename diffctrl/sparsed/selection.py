"""From block scores to the blocks that are kept: the selection rules of SparseD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.layout import RowBlocks
from diffctrl.sparsed.schedule import EPS


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept blocks of one row. counts int32 (H, n), indices int32 (H, n, W), ascending, -1 past the count."""

    counts: Tensor
    indices: Tensor


def quota(blocks: int, config: SparseDConfig) -> int:
    """How many of `blocks` blocks a query block keeps: ceil(select * blocks), at least one; authors one more.

    >>> quota(4, SparseDConfig(select=0.5)), quota(6, SparseDConfig(select=0.5, mode="authors"))
    (2, 4)
    """
    if blocks == 0:
        return 0
    if config.mode == "authors":
        # int(n rho) + 1, which asks for n + 1 blocks at rho = 1: cut to what there is.
        return min(blocks, max(1, int(blocks * config.select) + 1))
    return max(1, math.ceil(config.select * blocks - EPS))


def select(
    scores: Tensor, row: RowBlocks, config: SparseDConfig, generation_scores: Tensor | None = None
) -> Kept:
    """The blocks that one batch row keeps.

    Args:
        scores: W, float (H, n', n'), n' >= row.count: mean attention of query block I on key block J.
        row: how many blocks are real, and where the generation begins.
        config: select, mode, isolated.
        generation_scores: for mode "authors", W2 (H, n', m) of a softmax over the generation's keys alone, m
            >= count - split.

    Returns:
        kept blocks of the `row.count` real query blocks. No query block is without one; ties go to the
        earlier block.

    Source: paper, section 3 ("strict"); the authors' code ("authors"), whose first selection ranks all blocks
    and then drops those of the generation.
    """
    count, split = row.count, row.split
    real = scores[:, :count, :count]
    if config.mode == "authors":
        if generation_scores is None:
            raise ValueError("mode='authors' needs generation_scores")
        joint = _top(real, quota(count, config))
        prompt = torch.where(joint < split, joint, -1)
        own = generation_scores[:, :count, : count - split]
        generation = _top(own, quota(count - split, config)) + split
        parts = [prompt, generation]
    elif config.isolated:
        parts = [
            _top(real[..., :split], quota(split, config)),
            _top(real[..., split:], quota(count - split, config)) + split,
        ]
    else:
        parts = [_top(real, quota(count, config))]
    return _ascending(torch.cat(parts, -1))


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the largest scores; the first of equal ones."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :k]


def _ascending(blocks: Tensor) -> Kept:
    """Sorted with the dropped ones (-1) last."""
    last = torch.iinfo(torch.int32).max
    found = blocks.to(torch.int32)
    ordered = torch.where(found < 0, last, found).sort(-1).values
    counts = (ordered != last).sum(-1, dtype=torch.int32)
    return Kept(counts, torch.where(ordered == last, -1, ordered))


def retained_mass(scores: Tensor, kept: Kept) -> Tensor:
    """Share of the attention of the real queries that the kept blocks hold, float64 (H,).

    scores: W (H, n', n'). Rows of the last block may be fewer; their smaller sums weigh less.
    """
    count = kept.counts.shape[1]
    real = scores[:, :count, :count].double()
    index = kept.indices.clamp(min=0).long()
    held = real.gather(-1, index).masked_fill(kept.indices < 0, 0.0).sum((-1, -2))
    return held / real.sum((-1, -2)).clamp(min=1e-300)


def group_mean(scores: Tensor, groups: int) -> Tensor:
    """(H, n, m) -> (H / groups, n, m): one score for all queries that share keys and values."""
    return scores.unflatten(0, (-1, groups)).mean(1)


def stacked(rows: Sequence[Kept], blocks: int) -> tuple[Tensor, Tensor]:
    """Kept blocks of several rows -> counts int32 (B, H, n), indices int32 (B, H, n, W), 0 past the count.

    Query blocks past a row's real ones keep nothing.
    """
    heads = rows[0].counts.shape[0]
    width = max(row.indices.shape[-1] for row in rows)
    counts = rows[0].counts.new_zeros(len(rows), heads, blocks)
    indices = rows[0].indices.new_zeros(len(rows), heads, blocks, width)
    for b, row in enumerate(rows):
        used = row.counts.shape[1]
        counts[b, :, :used] = row.counts
        indices[b, :, :used, : row.indices.shape[-1]] = row.indices.clamp(min=0)
    return counts, indices
