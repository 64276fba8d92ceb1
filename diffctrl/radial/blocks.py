"""The pattern as blocks, in closed form: no frame pair is ever written down token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffctrl.radial.config import Pattern
from diffctrl.radial.layout import Layout, Strips
from diffctrl.radial.pattern import half_widths

# Strips of queries that are compared with all strips of keys at once: some MB of integers.
_ROWS = 256


def block_grid(pattern: Pattern, layout: Layout) -> np.ndarray:
    """Which blocks are attended.

    Args:
        pattern: what a video's tokens attend; with the block rule "exact", the blocks in which its pairs lie.
        layout: of the sequence. Every query attends all text, every text query everything. Where the text
            comes first, blocks are counted from it, so that no token has to move; frames then begin elsewhere
            in their blocks.

    Returns:
        bool (NB, NB) with NB = ceil(N / block); rows are queries.

    Source: the published code's conversion is a vote: a column of a block is touched if the band has a pair
    in it, heavy if it has more than a third of the block's rows; a block is kept if more than 0.6 of the
    touched columns are heavy. Here both are counted in closed form. "hybrid" departs from the vote for the
    own, adjacent and sink frames: voting on frame pairs that fill a block in part leaves out their borders.
    "reference" votes on all and, as the published code, loses the last block of a frame that touches one more
    than its size needs; what that code cannot do is done: lengths that are no multiple of the block, whose
    last block is attended by all and attends all.
    """
    widths = half_widths(pattern, layout.frames, layout.tokens).astype(np.int32)
    tokens = layout.tokens
    kept = _by_blocks(
        pattern, layout, lambda strips, rows: _kept(pattern, tokens, widths, strips, rows), np.logical_or
    )
    text = layout.text_blocks(pattern.block)
    kept[text], kept[:, text] = True, True
    if pattern.block_rule == "reference" and layout.length % pattern.block:
        kept[-1], kept[:, -1] = True, True
    return kept


def whole_blocks(pattern: Pattern, layout: Layout) -> np.ndarray:
    """The blocks, as `block_grid` has them, of which every pair is attended."""
    widths = half_widths(pattern, layout.frames, layout.tokens).astype(np.int32)
    return _by_blocks(
        pattern,
        layout,
        lambda strips, rows: _whole(pattern, layout.tokens, widths, strips, rows),
        np.logical_and,
        elsewhere=True,
    )


def _by_blocks(
    pattern: Pattern,
    layout: Layout,
    compare: Callable[[Strips, slice], np.ndarray],
    joined: np.ufunc,
    elsewhere: bool = False,
) -> np.ndarray:
    """`compare` of all pairs of strips, (rows, M) at a time, joined where they lie in one block."""
    strips = Strips.of(layout, pattern.block)
    blocks = -(-layout.length // pattern.block)
    grid = np.full((blocks, blocks), elsewhere)
    columns = strips.block[strips.firsts]
    grid[np.ix_(columns, columns)] = joined is np.logical_and
    for first in range(0, len(strips.block), _ROWS):
        rows = slice(first, first + _ROWS)
        of_rows = strips.block[rows]
        firsts = np.flatnonzero(np.diff(of_rows, prepend=-1))
        found = joined.reduceat(compare(strips, rows), strips.firsts, axis=1)
        found = joined.reduceat(found, firsts, axis=0)
        place = np.ix_(of_rows[firsts], columns)
        grid[place] = joined(grid[place], found)  # a block may begin in the chunk before
    return grid


def _bands(
    pattern: Pattern, tokens: int, widths: np.ndarray, strips: Strips, rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    """(half-width, whether the frames are own, adjacent or sink) of pairs of strips, (rows, M) each."""
    distance = np.abs(strips.frame[rows, None] - strips.frame)
    width, near = widths[distance], distance <= 1
    if pattern.sink:
        sink = strips.frame == 0
        width, near = np.where(sink, np.int32(tokens), width), near | sink
    return width, near


def _kept(pattern: Pattern, tokens: int, widths: np.ndarray, strips: Strips, rows: slice) -> np.ndarray:
    """bool (rows, M): the strips of keys whose blocks each strip of queries attends."""
    width, near = _bands(pattern, tokens, widths, strips, rows)
    start, stop = strips.start[rows, None], strips.stop[rows, None]

    def columns_with(pairs: int) -> np.ndarray:
        """How many key positions l have at least `pairs` queries k in [start, stop) with |k - l| <= width."""
        low = np.maximum(strips.start, start - width + (pairs - 1))
        high = np.minimum(strips.stop, stop + width - (pairs - 1))
        possible = (stop - start >= pairs) & (2 * width + 1 >= pairs)
        return np.where(possible, np.maximum(high - low, 0), 0)

    touched = columns_with(1)
    if pattern.block_rule in ("cover", "exact"):
        return touched > 0
    voted = 5 * columns_with(pattern.block // 3 + 1) > 3 * touched
    if pattern.block_rule == "hybrid":
        return np.where(near, touched > 0, voted)
    size = -(-tokens // pattern.block)
    return voted & (strips.ordinal[rows, None] < size) & (strips.ordinal < size)


def _whole(pattern: Pattern, tokens: int, widths: np.ndarray, strips: Strips, rows: slice) -> np.ndarray:
    """bool (rows, M): pairs of strips of which every pair of tokens is attended."""
    width, _ = _bands(pattern, tokens, widths, strips, rows)
    start, stop = strips.start[rows, None], strips.stop[rows, None]
    return np.maximum(stop - 1 - strips.start, strips.stop - 1 - start) <= width
