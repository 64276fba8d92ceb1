"""Slow and readable: the pattern pair by pair, and the published conversion to blocks, frame pair by frame
pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffctrl.radial.config import Pattern
from diffctrl.radial.layout import Layout


def attended(pattern: Pattern, distance: int, k: int, position: int, tokens: int) -> bool:
    """Whether a query at position k attends the key at `position` of a frame at this distance; no sink."""
    offset = abs(k - position)
    if pattern.pattern == "paper":  # equation 4
        group = 2 ** math.floor(math.log2(max(distance, 1)))
        band = group <= tokens and offset + 1 <= tokens / group
        return band or (distance % math.ceil(group / tokens) == 0 and offset == 0)
    if distance == 0 or (distance == 1 and pattern.adjacent == "full"):
        return True
    if distance == 1 and pattern.adjacent == "half":
        return offset <= tokens // 2
    base = 2 ** len(f"{tokens:b}") if pattern.width_base == "P" else tokens
    undecayed = base / 2 ** len(f"{distance:b}")
    thinned = undecayed < pattern.block and distance % math.floor(pattern.block / undecayed) != 0
    if distance > 1 and thinned:
        return False
    return offset <= max(pattern.block, pattern.decay_factor * undecayed)


def pair_mask(pattern: Pattern, distance: int, tokens: int) -> Tensor:
    """bool (S, S): the pairs of two frames, rows are queries."""
    return torch.tensor(
        [
            [attended(pattern, distance, k, position, tokens) for position in range(tokens)]
            for k in range(tokens)
        ]
    )


def token_mask(pattern: Pattern, layout: Layout) -> Tensor:
    """bool (N, N): every pair of the sequence, text included; before any conversion to blocks."""
    tokens, offset = layout.tokens, layout.offset
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    bands = [pair_mask(pattern, d, tokens) for d in range(layout.frames)]
    for i in range(layout.frames):
        for j in range(layout.frames):
            rows, columns = (slice(offset + f * tokens, offset + (f + 1) * tokens) for f in (i, j))
            mask[rows, columns] = True if pattern.sink and j == 0 else bands[abs(i - j)]
    return mask


def block_mask(pattern: Pattern, layout: Layout) -> Tensor:
    """bool (NB, NB): each frame pair on a canvas of its own, cut into blocks, voted on; then all joined.

    For videos alone; with the rules "hybrid", "cover" and "reference".
    """
    tokens, block, frames = layout.tokens, pattern.block, layout.frames
    count = -(-layout.length // block)
    grid = torch.zeros(count, count, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            sink = pattern.sink and j == 0
            near = sink or abs(i - j) <= 1
            band = torch.ones(tokens, tokens).bool() if sink else pair_mask(pattern, abs(i - j), tokens)
            tile = _tile(pattern, band, i * tokens % block, j * tokens % block, near)
            rows = slice(i * tokens // block, i * tokens // block + tile.shape[0])
            columns = slice(j * tokens // block, j * tokens // block + tile.shape[1])
            grid[rows, columns] |= tile
    if pattern.block_rule == "reference" and layout.length % block:
        grid[-1], grid[:, -1] = True, True
    return grid


def _tile(pattern: Pattern, band: Tensor, top: int, left: int, near: bool) -> Tensor:
    block, tokens = pattern.block, len(band)
    rows, columns = (-(-(start + tokens) // block) for start in (top, left))
    canvas = torch.zeros(rows * block, columns * block, dtype=torch.bool)
    canvas[top : top + tokens, left : left + tokens] = band
    blocks = canvas.unflatten(0, (rows, block)).unflatten(2, (columns, block)).transpose(1, 2)
    in_column = blocks.sum(2)  # (rows, columns, block)
    touched = (in_column > 0).sum(-1)
    if pattern.block_rule == "cover" or (near and pattern.block_rule == "hybrid"):
        return touched > 0
    heavy = (in_column / block > 1 / 3).sum(-1)
    kept = (touched > 0) & (heavy / touched.clamp(min=1) > 0.6)
    if pattern.block_rule == "reference":  # the published canvas has the size of a frame that is aligned
        kept[-(-tokens // block) :], kept[:, -(-tokens // block) :] = False, False
    return kept
