"""xformers, where its binary loads: dense calls and block-diagonal masks, for `kernel="xformers"` only."""

from __future__ import annotations

import functools

import torch

from ..lists import BlockLists
from .base import Operands, Request


class XformersKernel:
    name = "xformers"

    def why_not(self, request: Request) -> str | None:
        if request.device_type != "cuda":
            return "needs a CUDA GPU"
        if request.needs_lse:
            return "is not asked for the log-sum-exp here"
        if request.attn_mask != "none":
            return "is used without attn_mask here; set_attention_backend('xformers') passes masks to it"
        if (
            request.rule is not None
            or request.per_row_lengths
            or not (not request.sparse or request.shared_heads)
        ):
            return "takes block-diagonal masks shared by all heads only"
        if request.heads != request.kv_heads:
            return "does not take grouped key/value heads here"
        return _import_error()

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        import xformers.ops as xops

        q, k, v = operands.query, operands.key, operands.value
        if operands.mask is None:
            return xops.memory_efficient_attention(q, k, v, scale=operands.scale), None
        segments = diagonal_segments(operands.mask)
        if segments is None:
            raise ValueError(
                "xformers takes block-diagonal masks only; this mask is none. Use another kernel."
            )
        batch = len(q)
        q_lengths, k_lengths = segments
        bias = xops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(q_lengths * batch, k_lengths * batch)
        # Variable-length form: all batch rows behind each other in one row.
        flat = (t.flatten(0, 1).unsqueeze(0) for t in (q, k, v))
        return xops.memory_efficient_attention(*flat, attn_bias=bias, scale=operands.scale).view_as(q), None


@functools.cache
def _import_error() -> str | None:
    try:
        import xformers.ops  # noqa: F401
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a binary for another torch fails in any of these ways
        return f"xformers does not load: {type(error).__name__}: {error}"
    return None


def diagonal_segments(mask: BlockLists) -> tuple[list[int], list[int]] | None:
    """(query tokens, key tokens) of each segment of a block-diagonal mask; None if it is none.

    >>> blocks = torch.block_diag(torch.ones(2, 1), torch.ones(1, 2)).bool()
    >>> diagonal_segments(BlockLists.from_dense_blocks(blocks[None, None], (4, 4), (10, 12)))
    ([8, 2], [4, 8])
    """
    if mask.counts.shape[:2] != (1, 1) or mask.n_valid is not None or mask.rule is not None:
        return None
    (bq, bk), (sq, sk) = mask.block, mask.lengths
    counts, first = mask.counts[0, 0].tolist(), mask.indices[0, 0, :, 0].tolist()
    last = (
        mask.indices[0, 0]
        .gather(-1, (mask.counts[0, 0].long() - 1).clamp(min=0).unsqueeze(-1))
        .squeeze(-1)
        .tolist()
    )
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    previous = None
    for row, (count, start, stop) in enumerate(zip(counts, first, last, strict=True)):
        if count == 0 or stop - start + 1 != count:
            return None
        rows = min(bq, sq - row * bq)
        if (start, stop) == previous:
            q_lengths[-1] += rows
            continue
        if start != (0 if previous is None else previous[1] + 1):
            return None
        q_lengths.append(rows)
        k_lengths.append(min((stop + 1) * bk, sk) - start * bk)
        previous = (start, stop)
    return (q_lengths, k_lengths) if previous is not None and previous[1] == mask.n_k_blocks - 1 else None


KERNEL = XformersKernel()
