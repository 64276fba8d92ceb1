"""The device code of `fused`: one program scores a strip of query rows against all key blocks.

Imports triton at its top, so only `fused` imports it, and lazily. BM query rows of a program, BLOCK tokens
of a block, BN key tokens of a tile (BLOCK = SPLIT * BN), DP = D padded to a power of two. The dense
attention of the step gave the log-sum-exp, so a tile of probabilities is exp(scale q k - lse): no maximum,
no rescaling, and only its sum is kept.
"""

# A constexpr condition decides at compile time which names exist; pyright sees a plain branch.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that vary from call to call: specialising on them would compile again for every length.
_RUNTIME = ["scale_log2", "s_qb", "s_qs", "s_qh", "s_kb", "s_ks", "s_kh", "q_len", "k_len", "heads"]


@triton.jit
def _row_sums(q_tile, k_tile, norm, cols, limit, scale_log2, MASKED: tl.constexpr):
    """(BM,) sums over one tile of keys (BN, DP); `norm` is the log-sum-exp in base 2, inf for rows that are
    none."""
    scores = tl.dot(q_tile, tl.trans(k_tile)) * scale_log2 - norm[:, None]
    if MASKED:
        scores = tl.where((cols < limit)[None, :], scores, float("-inf"))
    return tl.sum(tl.exp2(scores), 1)


@triton.jit
def _store(w, rows, BM: tl.constexpr, BLOCK: tl.constexpr, at, n_q, n_k, first):
    """Adds up the rows of each query block and writes its score at `at`."""
    blocks: tl.constexpr = BM // BLOCK
    sums = tl.sum(tl.reshape(rows, [blocks, BLOCK]), 1) * (1.0 / (BLOCK * BLOCK))
    block = first + tl.arange(0, blocks)
    tl.store(w + block.to(tl.int64) * n_k + at, sums, mask=block < n_q)


@triton.jit(do_not_specialize=_RUNTIME)
def pool(
    q, k, lse, q_valid, k_valid, w, scale_log2,
    s_qb, s_qs, s_qh, s_kb, s_ks, s_kh, q_len, k_len, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """w (B, H, n_q, n_k) fp32 from q (B, Sq, H, D), k (B, Sk, Hkv, D), lse (B, H, Sq) natural, valid (B,)."""
    SPLIT: tl.constexpr = BLOCK // BN
    LOG2E: tl.constexpr = 1.4426950408889634
    s_qb, s_qs, s_qh = s_qb * UNIT, s_qs * UNIT, s_qh * UNIT
    s_kb, s_ks, s_kh = s_kb * UNIT, s_ks * UNIT, s_kh * UNIT
    strip, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_q, n_k = tl.cdiv(q_len, BLOCK), tl.cdiv(k_len, BLOCK)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    rows = strip * BM + tl.arange(0, BM)
    cols = tl.arange(0, DP)
    tile = tl.arange(0, BN)
    real = rows < tl.load(q_valid + b)
    limit = tl.load(k_valid + b)
    q_ptrs = q + b64 * s_qb + h64 * s_qh + rows.to(tl.int64)[:, None] * s_qs + cols[None, :]
    q_tile = tl.load(q_ptrs, mask=real[:, None] & (cols < D)[None, :], other=0.0)
    norm = tl.load(lse + (b64 * heads + h64) * q_len + rows, mask=real, other=float("inf")) * LOG2E
    k_base = k + b64 * s_kb + (h64 // GROUP) * s_kh
    k_off = tile[:, None] * s_ks + cols[None, :]
    w_base = w + (b64 * heads + h64) * n_q * n_k
    first = strip * (BM // BLOCK)
    if DESCRIPTOR:
        desc = tl.make_tensor_descriptor(k_base, [k_len, D], [s_ks, 1], [BN, DP])

    whole = limit // BLOCK
    for j in tl.range(0, whole):
        sums = tl.zeros([BM], tl.float32)
        for t in tl.static_range(SPLIT):
            start = j * BLOCK + t * BN
            if DESCRIPTOR:
                k_tile = desc.load([start, 0])
            elif D == DP:
                k_tile = tl.load(k_base + start.to(tl.int64) * s_ks + k_off)
            else:
                k_tile = tl.load(
                    k_base + start.to(tl.int64) * s_ks + k_off, mask=(cols < D)[None, :], other=0.0
                )
            sums += _row_sums(q_tile, k_tile, norm, tile, limit, scale_log2, False)
        _store(w_base, sums, BM, BLOCK, j, n_q, n_k, first)
    if whole * BLOCK < limit:
        sums = tl.zeros([BM], tl.float32)
        for t in tl.static_range(SPLIT):
            token = whole * BLOCK + t * BN + tile
            k_ptrs = k_base + token.to(tl.int64)[:, None] * s_ks + cols[None, :]
            k_tile = tl.load(k_ptrs, mask=(token < limit)[:, None] & (cols < D)[None, :], other=0.0)
            sums += _row_sums(q_tile, k_tile, norm, token, limit, scale_log2, True)
        _store(w_base, sums, BM, BLOCK, whole, n_q, n_k, first)
