"""The device code of `triton_lists`: one program attends one query block to its list of key blocks.

Imports triton at its top, so only `triton_lists` imports it, and lazily. Axis letters as in `base`; BM = bq
rows of a program, BN key tokens of a tile, bk = SPLIT * BN tokens of a list entry, DP = D padded to a power
of two.

S = Q K^T, softmax, O += P V, tile after tile; the tensor cores wait during each softmax. Running P V during
the next tile's softmax (P carried as bits) was tried: wrong on an H100 where the tail is masked, and no
faster.
"""

# A constexpr condition decides at compile time which names a loop carries; pyright sees a plain branch.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

# Launch arguments that vary from call to call: specialising on them (== 1, divisible by 16) would compile
# again for every length. Strides come in units of UNIT = 8 elements where they can: from the product the
# compiler sees that 16-byte loads are aligned (tl.multiple_of does nothing on a scalar argument).
_RUNTIME = [
    "scale_log2", "s_qb", "s_qs", "s_qh", "s_kb", "s_ks", "s_kh", "s_vb", "s_vs", "s_vh",
    "width", "q_len", "k_len", "heads",
]  # fmt: skip


@triton.jit
def list_row(block, b, h, heads, n_lists, BATCH_LISTS: tl.constexpr, HEAD_LISTS: tl.constexpr):
    """Which list: of block `block`, of this batch row and head where they have their own."""
    row = block
    if HEAD_LISTS:
        row += h * n_lists
    if BATCH_LISTS:
        row += b * n_lists * (heads if HEAD_LISTS else 1)
    return row


@triton.jit
def _place(
    order, heads, n_lists, QSUB: tl.constexpr, BATCH_LISTS: tl.constexpr, HEAD_LISTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """(b, h, row block of BM, list row) of this program; with an order, lists are taken in it, QSUB programs
    each."""
    b = tl.program_id(2)
    if HAS_ORDER:
        turn = tl.program_id(0)
        pair = tl.load(order + (b * heads * n_lists if BATCH_LISTS else 0) + turn // QSUB)
        h = pair // n_lists
        row = pair % n_lists
        block = row * QSUB + turn % QSUB
    else:
        block = tl.program_id(0)
        h = tl.program_id(1)
        row = block // QSUB
    return b, h, block, list_row(row, b, h, heads, n_lists, BATCH_LISTS, HEAD_LISTS)


@triton.jit
def _masked(s, start, at, limit, BN: tl.constexpr, TAIL: tl.constexpr, STRAIGHT: tl.constexpr):
    """Scores of the tile that covers tokens start .. start + BN, loaded from token `at`.

    The mask sits in a branch that is rarely taken; STRAIGHT: without the branch (the specialisation pass
    takes none).
    """
    if TAIL:
        if STRAIGHT:
            s = tl.where((start + tl.arange(0, BN) < limit)[None, :], s, float("-inf"))
        elif start + BN > limit:
            token = at + tl.arange(0, BN)
            s = tl.where(((token >= start) & (token < limit))[None, :], s, float("-inf"))
    return s


@triton.jit
def _softmax(s, l_i, m_i, scale_log2):
    """One step of the online softmax, base 2: (P, rescale of what was summed before, new sum, new
    maximum)."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])  # one fused multiply-add per score
    alpha = tl.exp2(m_i - m_new)
    return p, alpha, l_i * alpha + tl.sum(p, 1), m_new


@triton.jit
def _store(
    out, lse, acc, l_i, m_i, b, h, heads, rows, q_len,
    D: tl.constexpr, DP: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Normalises and writes the block; rows without keys (l = 0) get out 0 and lse -inf."""
    acc = acc * (1.0 / tl.where(l_i == 0, 1.0, l_i))[:, None]
    cols = tl.arange(0, DP)
    base = out + b.to(tl.int64) * q_len * heads * D + h * D
    inside = rows < q_len
    offsets = rows.to(tl.int64)[:, None] * (heads * D) + cols[None, :]
    mask = inside[:, None] & (cols < D)[None, :] if D != DP else inside[:, None]
    tl.store(base + offsets, acc.to(out.dtype.element_ty), mask=mask)
    if HAS_LSE:
        ln2: tl.constexpr = 0.6931471805599453
        tl.store(lse + (b.to(tl.int64) * heads + h) * q_len + rows, (m_i + tl.log2(l_i)) * ln2, mask=inside)


@triton.jit
def _rows_at(base, offsets, start, stride, cols, D: tl.constexpr, DP: tl.constexpr):
    """Rows start .. start + BN of one head, (BN, DP); columns past D are 0."""
    if D != DP:
        return tl.load(base + start.to(tl.int64) * stride + offsets, mask=(cols < D)[None, :], other=0.0)
    return tl.load(base + start.to(tl.int64) * stride + offsets)


@triton.jit(do_not_specialize=_RUNTIME)
def lists_pointer(
    q, k, v, out, lse, counts, indices, n_valid, order, scale_log2,
    s_qb, s_qs, s_qh, s_kb, s_ks, s_kh, s_vb, s_vs, s_vh, width, q_len, k_len, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, QSUB: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, BATCH_LISTS: tl.constexpr, HEAD_LISTS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_VALID: tl.constexpr, TAIL: tl.constexpr, HAS_ORDER: tl.constexpr,
    UNIT: tl.constexpr, SAME_KV: tl.constexpr,
):  # fmt: skip
    """Pointer loads; any arch from sm80.

    TAIL: the last list entry may reach past k_len or n_valid. The tile that does is loaded from k_len - BN,
    so that no load needs a mask (the launcher sees to k_len >= BN), and its scores are masked.
    """
    BK: tl.constexpr = BN * SPLIT
    s_qb, s_qs, s_qh = s_qb * UNIT, s_qs * UNIT, s_qh * UNIT
    s_kb, s_ks, s_kh = s_kb * UNIT, s_ks * UNIT, s_kh * UNIT
    s_vb, s_vs, s_vh = s_vb * UNIT, s_vs * UNIT, s_vh * UNIT
    b, h, block, row = _place(
        order, heads, tl.cdiv(q_len, BM * QSUB), QSUB, BATCH_LISTS, HEAD_LISTS, HAS_ORDER
    )
    idx = indices + row.to(tl.int64) * width
    # The first loads do not wait for each other: entry 0 exists in every list, be its count 0.
    entry = tl.load(idx)
    count = tl.load(counts + row)
    limit = k_len
    if HAS_VALID:
        limit = tl.minimum(k_len, tl.load(n_valid + b))
    rows = block * BM + tl.arange(0, BM)
    cols = tl.arange(0, DP)
    b64, kv_head = b.to(tl.int64), (h // GROUP).to(tl.int64)
    q_ptrs = q + b64 * s_qb + h.to(tl.int64) * s_qh + rows.to(tl.int64)[:, None] * s_qs + cols[None, :]
    q_mask = (rows < q_len)[:, None] & (cols < D)[None, :] if D != DP else (rows < q_len)[:, None]
    q_tile = tl.load(q_ptrs, mask=q_mask, other=0.0)
    k_base = k + b64 * s_kb + kv_head * s_kh
    v_base = v + b64 * s_vb + kv_head * s_vh
    tile = tl.arange(0, BN)
    k_off = tile[:, None] * s_ks + cols[None, :]
    v_off = (
        k_off if SAME_KV else tile[:, None] * s_vs + cols[None, :]
    )  # one set of registers where it will do
    room = k_len - BN

    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for t in range(0, count * SPLIT):
        start = entry * BK + (t % SPLIT) * BN
        at = tl.minimum(start, room) if TAIL else start
        # One iteration ahead of its use, and never past the list.
        entry = tl.load(idx + tl.minimum((t + 1) // SPLIT, count - 1))
        k_tile = _rows_at(k_base, k_off, at, s_ks, cols, D, DP)
        v_tile = _rows_at(v_base, v_off, at, s_vs, cols, D, DP)
        s = _masked(tl.dot(q_tile, tl.trans(k_tile)), start, at, limit, BN, TAIL, False)
        p, alpha, l_i, m_i = _softmax(s, l_i, m_i, scale_log2)
        acc = tl.dot(p.to(v.dtype.element_ty), v_tile, acc * alpha[:, None])
    _store(out, lse, acc, l_i, m_i, b, h, heads, rows, q_len, D, DP, HAS_LSE)


@triton.jit(do_not_specialize=_RUNTIME)
def lists_descriptor(
    q, k, v, out, lse, counts, indices, n_valid, order, scale_log2,
    s_qb, s_qs, s_qh, s_kb, s_ks, s_kh, s_vb, s_vs, s_vh, width, q_len, k_len, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, QSUB: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, BATCH_LISTS: tl.constexpr, HEAD_LISTS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_VALID: tl.constexpr, TAIL: tl.constexpr, HAS_ORDER: tl.constexpr,
    UNIT: tl.constexpr, SAME_KV: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Q, K and V through the bulk copy engine (sm90 on): descriptors of one head each, made here, so that
    rows and columns outside arrive as zeros. SPECIALIZE hands the loads to a warp group of their own and
    splits the rows between two others (BM = 128 and 4 warps only)."""
    BK: tl.constexpr = BN * SPLIT
    s_qb, s_qs, s_qh = s_qb * UNIT, s_qs * UNIT, s_qh * UNIT
    s_kb, s_ks, s_kh = s_kb * UNIT, s_ks * UNIT, s_kh * UNIT
    s_vb, s_vs, s_vh = s_vb * UNIT, s_vs * UNIT, s_vh * UNIT
    b, h, block, row = _place(
        order, heads, tl.cdiv(q_len, BM * QSUB), QSUB, BATCH_LISTS, HEAD_LISTS, HAS_ORDER
    )
    idx = indices + row.to(tl.int64) * width
    entry = tl.load(idx)
    count = tl.load(counts + row)
    limit = k_len
    if HAS_VALID:
        limit = tl.minimum(k_len, tl.load(n_valid + b))
    # Not block * BM: Triton 3.6 splits the rows of Q by adding 64 to the scalar that its load starts at, in
    # every place that shares the scalar, and the second group would store 64 rows too far.
    rows = tl.arange(0, BM) - (0 - block) * BM
    b64, kv_head = b.to(tl.int64), (h // GROUP).to(tl.int64)
    k_desc = tl.make_tensor_descriptor(k + b64 * s_kb + kv_head * s_kh, [k_len, D], [s_ks, 1], [BN, DP])
    v_desc = tl.make_tensor_descriptor(v + b64 * s_vb + kv_head * s_vh, [k_len, D], [s_vs, 1], [BN, DP])
    # Q too: a pointer load of a tensor before the loop makes the specialisation pass fail.
    q_desc = tl.make_tensor_descriptor(
        q + b64 * s_qb + h.to(tl.int64) * s_qh, [q_len, D], [s_qs, 1], [BM, DP]
    )
    q_tile = q_desc.load([block * BM, 0])

    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for t in tl.range(0, count * SPLIT, warp_specialize=SPECIALIZE):
        if SPECIALIZE:  # the pass takes no carried scalar and no branch
            start = tl.load(idx + t // SPLIT) * BK + (t % SPLIT) * BN
        else:
            start = entry * BK + (t % SPLIT) * BN
            entry = tl.load(idx + tl.minimum((t + 1) // SPLIT, count - 1))
        k_tile = k_desc.load([start, 0])
        v_tile = v_desc.load([start, 0])
        s = tl.dot(q_tile, k_tile.T)
        s = _masked(s, start, start, limit, BN, TAIL, SPECIALIZE)
        p, alpha, l_i, m_i = _softmax(s, l_i, m_i, scale_log2)
        acc = tl.dot(p.to(v.dtype.element_ty), v_tile, acc * alpha[:, None])
    _store(out, lse, acc, l_i, m_i, b, h, heads, rows, q_len, D, DP, HAS_LSE)
