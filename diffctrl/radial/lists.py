"""The pattern as block lists for the engine, made once and kept in bounds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from diffctrl.attention import BlockLists, Rule
from diffctrl.radial.blocks import block_grid, whole_blocks
from diffctrl.radial.config import Pattern
from diffctrl.radial.layout import Layout
from diffctrl.radial.pattern import DROPPED, half_widths

# Masks that live at a time, over all models of the process; with one, its tensors on each device go too.
_KEPT = 8


@lru_cache(maxsize=_KEPT)
def block_lists(pattern: Pattern, layout: Layout) -> BlockLists:
    """What is attended in a sequence, as lists shared by all heads and batch rows.

    How much of the text is valid differs from row to row and is no part of this: see `n_valid` of
    `BlockLists`.

    >>> lists = block_lists(Pattern(block=4, sink=True), Layout(frames=4, tokens=16))
    >>> lists.density() * 256
    248.0
    """
    block, lengths = (pattern.block, pattern.block), (layout.length, layout.length)
    kept = block_grid(pattern, layout)
    if pattern.block_rule != "exact":
        return BlockLists.from_dense_blocks(_shared(kept), block, lengths)
    whole = whole_blocks(pattern, layout)
    partial = BlockLists.from_dense_blocks(_shared(kept & ~whole), block, lengths, allow_empty=True)
    if not int(partial.counts.sum()):
        return BlockLists.from_dense_blocks(_shared(whole), block, lengths)
    fields: dict[str, Any] = {
        "partial_counts": partial.counts,
        "partial_indices": partial.indices,
        "rule": _rule(pattern, layout),
    }
    return BlockLists.from_dense_blocks(_shared(whole), block, lengths, **fields)


def density(pattern: Pattern, layout: Layout) -> float:
    """Attended share of all pairs of tokens, in whole blocks; a block that is cut counts with its size."""
    return block_lists(pattern, layout).density()


def _shared(grid: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(grid)[None, None]


def _rule(pattern: Pattern, layout: Layout) -> Rule:
    frame = torch.full((layout.length,), -1, dtype=torch.int32)
    place = torch.zeros(layout.length, dtype=torch.int32)
    video = slice(layout.offset, layout.offset + layout.frames * layout.tokens)
    frame[video] = torch.arange(layout.frames, dtype=torch.int32).repeat_interleave(layout.tokens)
    place[video] = torch.arange(layout.tokens, dtype=torch.int32).repeat(layout.frames)
    widths = torch.from_numpy(half_widths(pattern, layout.frames, layout.tokens)).to(torch.int32)
    widths = torch.nn.functional.pad(widths, (0, 1), value=DROPPED)  # of text to the last frame; not used
    return Rule("frame_bands", (frame, place, widths, torch.tensor([pattern.sink])))
