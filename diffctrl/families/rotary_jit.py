"""The device code of `rotary`: one program norms and turns all heads of one token.

Imports triton at its top, so only `rotary` imports it, and lazily. A token's heads are read as one tile of
FIRST heads and one of REST, each a power of two, so that 24 or 40 heads leave no lane idle; D channels, DP if
padded to a power of two. All heads of a token share its row of the tables, which then is read once.

Every product that eager code rounds is rounded here too, and the launch forbids to fuse products with sums:
the result is that of the separate passes up to the order in which the squares are added.
"""

# A constexpr condition decides at compile time which names exist; pyright sees a plain branch, and numbers
# where Triton sees constexprs.
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that vary from call to call: specialising on them would compile again for every length.
_RUNTIME = ["s_xb", "s_xs", "s_xh", "s_tb", "s_ts", "s_th", "tokens", "first", "count"]
# Strides come in units of this many elements, which says that every head starts at 16 bytes.
UNIT = tl.constexpr(8)


@triton.jit
def _read(base, stride, start: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr):  # fmt: skip
    """(ROWS, DP) of the heads from `start` on, with zeros where there is no head or channel."""
    heads = start + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, DP)[None, :]
    at = base + heads * (stride * UNIT) + cols
    return tl.load(at, mask=(heads < HEADS) & (cols < D), other=0.0)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, DP: tl.constexpr):
    """Even and odd channels of (ROWS, DP), each (ROWS, DP / 2)."""
    return tl.split(tl.reshape(tile, [ROWS, DP // 2, 2]))


@triton.jit
def _scaled(values, scale, weight, start: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr,
            TWICE: tl.constexpr, WHOLE: tl.constexpr, WEIGHTED: tl.constexpr, HEADS: tl.constexpr,
            D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """The normed rows as TYPE holds them, in fp32. TWICE: rounded before the weight too."""
    values = values * scale
    if WEIGHTED:
        if TWICE:
            values = values.to(TYPE).to(tl.float32)
        if WHOLE:
            by = _read(weight, D // UNIT, start, ROWS, HEADS, D, DP)
        else:
            by = _read(weight, 0, 0, 1, HEADS, D, DP)
        values = values * by.to(tl.float32)
    return values.to(TYPE).to(tl.float32)


@triton.jit
def _turned(values, cos, sin, stride, here, start: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
            PER_HEAD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """The rows, turned if `here`. PAIRS: a pair has the cosine of its even, the sine of its odd channel."""
    SHOWN: tl.constexpr = ROWS if PER_HEAD else 1
    FROM: tl.constexpr = start if PER_HEAD else 0
    # A token outside of the range has no row in the tables: it reads the first one and keeps its values.
    cos_even, cos_odd = _halves(_read(cos, stride, FROM, SHOWN, HEADS, D, DP), SHOWN, DP)
    sin_even, sin_odd = _halves(_read(sin, stride, FROM, SHOWN, HEADS, D, DP), SHOWN, DP)
    if PAIRS:
        cos_odd, sin_even = cos_even, sin_odd
    even, odd = _halves(values, ROWS, DP)
    turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
    return tl.where(here, tl.reshape(turned, [ROWS, DP]), values)


@triton.jit
def _write(base, values, start: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr):  # fmt: skip
    heads = start + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, DP)[None, :]
    tl.store(base + heads * D + cols, values.to(base.dtype.element_ty), mask=(heads < HEADS) & (cols < D))


@triton.jit(do_not_specialize=_RUNTIME)
def norm_rotate(
    x, out, weight, cos, sin, eps,
    s_xb, s_xs, s_xh, s_tb, s_ts, s_th, tokens, first, count,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    NORM: tl.constexpr, TWICE: tl.constexpr, WHOLE: tl.constexpr, WEIGHTED: tl.constexpr,
    ROTATE: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """out (B, S, H, D), contiguous, from x (B, S, H, D), weight (D,) or (H * D,), cos, sin (B, count, H, D).

    WHOLE: one norm over all heads, else one for each. Program b * tokens + s works on token s of row b.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    b, s = (program // tokens).to(tl.int64), program % tokens
    x += b * (s_xb * UNIT) + s.to(tl.int64) * (s_xs * UNIT)
    out += program.to(tl.int64) * (HEADS * D)
    head = _read(x, s_xh, 0, FIRST, HEADS, D, DP).to(tl.float32)
    if REST > 0:
        rest = _read(x, s_xh, FIRST, REST, HEADS, D, DP).to(tl.float32)

    if NORM:
        squares = tl.sum(head * head, 1)[:, None]
        if REST > 0:
            squares_rest = tl.sum(rest * rest, 1)[:, None]
        if WHOLE:
            squares = tl.sum(squares)
            if REST > 0:
                squares += tl.sum(squares_rest)
                squares_rest = squares
        MEAN: tl.constexpr = 1.0 / (HEADS * D if WHOLE else D)
        scale = tl.rsqrt(squares * MEAN + eps)
        head = _scaled(head, scale, weight, 0, FIRST, TYPE, TWICE, WHOLE, WEIGHTED, HEADS, D, DP)
        if REST > 0:
            scale = tl.rsqrt(squares_rest * MEAN + eps)
            rest = _scaled(rest, scale, weight, FIRST, REST, TYPE, TWICE, WHOLE, WEIGHTED, HEADS, D, DP)

    if ROTATE:
        row = s - first
        here = (row >= 0) & (row < count)
        at = b * (s_tb * UNIT) + tl.where(here, row, 0).to(tl.int64) * (s_ts * UNIT)
        head = _turned(head, cos + at, sin + at, s_th, here, 0, FIRST, PAIRS, PER_HEAD, HEADS, D, DP)
        if REST > 0:
            rest = _turned(rest, cos + at, sin + at, s_th, here, FIRST, REST, PAIRS, PER_HEAD, HEADS, D, DP)

    _write(out, head, 0, FIRST, HEADS, D, DP)
    if REST > 0:
        _write(out, rest, FIRST, REST, HEADS, D, DP)
