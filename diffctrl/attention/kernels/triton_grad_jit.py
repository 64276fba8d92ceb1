"""The device code of `triton_grad`: gradients of attention over block lists, each written by one program.

Imports triton at its top, so only `triton_grad` imports it, and lazily. Axis letters as in `base`. A program
owns rows of one side and passes over the listed tokens of the other in tiles, blocks end to end: small blocks
fill a tile together. Nothing is added up in memory, so that the gradients are the same bits in every run.
"""

# A constexpr condition decides at compile time which names there are; pyright sees a plain branch.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_lists_jit import list_row

# Launch arguments that vary from call to call; see `triton_lists_jit`, for UNIT as well.
_RUNTIME = [
    "scale", "scale_log2", "s_qb", "s_qs", "s_qh", "s_kb", "s_ks", "s_kh", "s_vb", "s_vs", "s_vh",
    "width", "q_len", "k_len", "heads",
]  # fmt: skip


@triton.jit
def _listed(idx, count, first, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(tokens at places first .. first + TILE of the listed blocks end to end, which of the places there
    are)."""
    place = first + tl.arange(0, TILE)
    if BLOCK % TILE == 0:
        entry = tl.load(idx + first // BLOCK)
        return entry * BLOCK + first % BLOCK + tl.arange(0, TILE), place >= 0
    there = place < count * BLOCK
    entry = tl.load(idx + place // BLOCK, mask=there, other=0)
    return entry * BLOCK + place % BLOCK, there


@triton.jit
def _rows(base, token, there, stride, D: tl.constexpr, DP: tl.constexpr):
    """The rows `token` of one head, (TILE, DP); rows that are not there and columns past D are 0."""
    cols = tl.arange(0, DP)
    mask = there[:, None] & (cols < D)[None, :] if D != DP else there[:, None]
    return tl.load(base + token.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _put(base, tile, token, there, stride, D: tl.constexpr, DP: tl.constexpr):
    cols = tl.arange(0, DP)
    mask = there[:, None] & (cols < D)[None, :] if D != DP else there[:, None]
    at = base + token.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["q_len", "heads"])
def grad_rows(go, out, lse, delta, lse2, q_len, heads, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """Per query: delta = rowsum(dO * O), and the log-sum-exp in base 2. go and out (B, Sq, H, D) contiguous;
    the others (B, H, Sq). Rows without keys have -inf: no list leads to them."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    there = token < q_len
    at = b * q_len * heads * D + h * D
    product = _rows(go + at, token, there, heads * D, D, DP).to(tl.float32)
    product *= _rows(out + at, token, there, heads * D, D, DP).to(tl.float32)
    row = (b * heads + h) * q_len + token
    log2e: tl.constexpr = 1.4426950408889634
    tl.store(delta + row, tl.sum(product, 1), mask=there)
    tl.store(lse2 + row, tl.load(lse + row, mask=there, other=0.0) * log2e, mask=there)


@triton.jit(do_not_specialize=_RUNTIME)
def grad_query(
    q, k, v, go, lse2, delta, dq, counts, indices, n_valid, scale, scale_log2,
    s_qb, s_qs, s_qh, s_kb, s_ks, s_kh, s_vb, s_vs, s_vh, width, q_len, k_len, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BATCH_LISTS: tl.constexpr, HEAD_LISTS: tl.constexpr,
    HAS_VALID: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries: dS = P (dO V^T - delta), dQ = scale dS K, over the lists of the forward.

    BM rows of a block of BQ; tiles of BN keys, blocks of BK.
    """
    s_qb, s_qs, s_qh = s_qb * UNIT, s_qs * UNIT, s_qh * UNIT
    s_kb, s_ks, s_kh = s_kb * UNIT, s_ks * UNIT, s_kh * UNIT
    s_vb, s_vs, s_vh = s_vb * UNIT, s_vs * UNIT, s_vh * UNIT
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = list_row(block // (BQ // BM), b, h, heads, tl.cdiv(q_len, BQ), BATCH_LISTS, HEAD_LISTS)
    count = tl.load(counts + row)
    idx = indices + row.to(tl.int64) * width
    limit = k_len
    if HAS_VALID:
        limit = tl.minimum(k_len, tl.load(n_valid + b))
    b64, kv_head = b.to(tl.int64), (h // GROUP).to(tl.int64)
    token = block * BM + tl.arange(0, BM)
    inside = token < q_len
    q_tile = _rows(q + b64 * s_qb + h.to(tl.int64) * s_qh, token, inside, s_qs, D, DP)
    at = b64 * q_len * heads * D + h * D
    go_tile = _rows(go + at, token, inside, heads * D, D, DP)
    stat = (b64 * heads + h) * q_len + token
    row_lse = tl.load(lse2 + stat, mask=inside, other=0.0)
    row_delta = tl.load(delta + stat, mask=inside, other=0.0)
    k_base = k + b64 * s_kb + kv_head * s_kh
    v_base = v + b64 * s_vb + kv_head * s_vh

    acc = tl.zeros([BM, DP], tl.float32)
    for t in range(0, tl.cdiv(count * BK, BN)):
        key, there = _listed(idx, count, t * BN, BK, BN)
        there = there & (key < limit)
        k_tile = _rows(k_base, key, there, s_ks, D, DP)
        v_tile = _rows(v_base, key, there, s_vs, D, DP)
        p = tl.exp2(tl.dot(q_tile, tl.trans(k_tile)) * scale_log2 - row_lse[:, None])
        p = tl.where(there[None, :], p, 0.0)  # a key that is not there is 0, but P may be infinite
        ds = p * (tl.dot(go_tile, tl.trans(v_tile)) - row_delta[:, None])
        acc = tl.dot(ds.to(k.dtype.element_ty), k_tile, acc)
    _put(dq + at, acc * scale, token, inside, heads * D, D, DP)


@triton.jit(do_not_specialize=_RUNTIME)
def grad_key_value(
    q, k, v, go, lse2, delta, dk, dv, counts, indices, n_valid, scale, scale_log2,
    s_qb, s_qs, s_qh, s_kb, s_ks, s_kh, s_vb, s_vs, s_vh, width, q_len, k_len, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BATCH_LISTS: tl.constexpr, HEAD_LISTS: tl.constexpr,
    HAS_VALID: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T dO of BN keys, summed over the heads of their group, over the transposed
    lists: for each key block the query blocks that list it.

    BN rows of a block of BK; tiles of BM queries, blocks of BQ.
    """
    s_qb, s_qs, s_qh = s_qb * UNIT, s_qs * UNIT, s_qh * UNIT
    s_kb, s_ks, s_kh = s_kb * UNIT, s_ks * UNIT, s_kh * UNIT
    s_vb, s_vs, s_vh = s_vb * UNIT, s_vs * UNIT, s_vh * UNIT
    block, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b64, kv64 = b.to(tl.int64), kv_head.to(tl.int64)
    key = block * BN + tl.arange(0, BN)
    inside = key < k_len
    attended = inside
    if HAS_VALID:
        attended = inside & (key < tl.load(n_valid + b))
    k_tile = _rows(k + b64 * s_kb + kv64 * s_kh, key, inside, s_ks, D, DP)
    v_tile = _rows(v + b64 * s_vb + kv64 * s_vh, key, inside, s_vs, D, DP)

    acc_k = tl.zeros([BN, DP], tl.float32)
    acc_v = tl.zeros([BN, DP], tl.float32)
    for g in range(0, GROUP):
        h = kv_head * GROUP + g
        row = list_row(block // (BK // BN), b, h, heads, tl.cdiv(k_len, BK), BATCH_LISTS, HEAD_LISTS)
        count = tl.load(counts + row)
        idx = indices + row.to(tl.int64) * width
        q_base = q + b64 * s_qb + h.to(tl.int64) * s_qh
        go_base = go + b64 * q_len * heads * D + h * D
        stat = (b64 * heads + h) * q_len
        for t in range(0, tl.cdiv(count * BQ, BM)):
            token, there = _listed(idx, count, t * BM, BQ, BM)
            there = there & (token < q_len)
            q_tile = _rows(q_base, token, there, s_qs, D, DP)
            go_tile = _rows(go_base, token, there, heads * D, D, DP)
            row_lse = tl.load(lse2 + stat + token, mask=there, other=0.0)
            row_delta = tl.load(delta + stat + token, mask=there, other=0.0)
            p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile)) * scale_log2 - row_lse[None, :])
            if HAS_VALID:
                p = tl.where(attended[:, None], p, 0.0)
            acc_v = tl.dot(p.to(go.dtype.element_ty), go_tile, acc_v)
            ds = p * (tl.dot(v_tile, tl.trans(go_tile)) - row_delta[None, :])
            acc_k = tl.dot(ds.to(q.dtype.element_ty), q_tile, acc_k)
    kv_heads = heads // GROUP
    at = b64 * k_len * kv_heads * D + kv_head * D
    _put(dk + at, acc_k * scale, key, inside, kv_heads * D, D, DP)
    _put(dv + at, acc_v, key, inside, kv_heads * D, D, DP)
