"""How far a query looks into a frame at each distance: the whole pattern, as one number per distance."""

from __future__ import annotations

import math

import numpy as np

from diffctrl.radial.config import Pattern

DROPPED = -1


def width_base(pattern: Pattern, tokens: int) -> int:
    """What band widths are fractions of: P, the smallest power of two strictly above S, or S itself.

    >>> width_base(Pattern(), 4095), width_base(Pattern(), 4096)
    (4096, 8192)
    """
    return 1 << tokens.bit_length() if pattern.width_base == "P" else tokens


def half_widths(pattern: Pattern, frames: int, tokens: int) -> np.ndarray:
    """The band's half-width for each distance d between the frames of query and key.

    Args:
        frames, tokens: F frames of S tokens each, in raster order.

    Returns:
        int64 (F,): a query at position k attends the keys at positions l with |k - l| <= width; S or more is
        the whole frame, -1 (`DROPPED`) nothing.

    Source: "paper" is equation 4 of arXiv 2506.19852. "reference" is the published code, with one departure:
    a frame is thinned where the undecayed width is below one block of the mask; the code compares with the
    literal 128 for blocks of 64 as well, which thins bands that fit. Neighbouring frames are never thinned.

    >>> half_widths(Pattern(block=4), 9, 8).tolist()
    [8, 8, 4, 4, 4, -1, 4, -1, 4]
    """
    return np.array([_half_width(pattern, d, tokens) for d in range(frames)], dtype=np.int64)


def _half_width(pattern: Pattern, distance: int, tokens: int) -> int:
    if distance == 0:
        return tokens
    if pattern.pattern == "paper":
        group = 1 << (distance.bit_length() - 1)
        if group <= tokens:
            return tokens // group - 1
        return 0 if distance % -(-group // tokens) == 0 else DROPPED
    if distance == 1 and pattern.adjacent != "decay":
        return tokens if pattern.adjacent == "full" else tokens // 2
    base, parts = width_base(pattern, tokens), 1 << distance.bit_length()
    # The undecayed width base / parts is thinner than a block: keep every floor(block / width)-th frame.
    if distance > 1 and base < pattern.block * parts and distance % (pattern.block * parts // base):
        return DROPPED
    return min(tokens, max(pattern.block, math.floor(pattern.decay_factor * base / parts)))
