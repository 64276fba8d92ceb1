"""Log-sum-exp and strongest key of each query, a few queries at a time: rows x keys numbers, never S x S.

The engine returns a log-sum-exp too, in float32; these are as wide as their operands.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SCORE_BYTES = 64 << 20  # of scores at a time


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """(queries, their scores (B, H, R, Sk)), in float32, or float64 for float64 operands."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.permute(0, 2, 3, 1).to(wide)
    batch, length, heads, _ = query.shape
    step = max(_SCORE_BYTES // (8 * batch * heads * key.shape[1]), 1)
    for start in range(0, length, step):
        part = slice(start, start + step)
        scores = query[:, part].transpose(1, 2).to(wide) @ keys * scale
        if mask is not None:
            bias = mask if mask.shape[-2] == 1 else mask[..., part, :]
            scores = (
                scores.masked_fill(~bias, float("-inf"))
                if bias.dtype == torch.bool
                else scores + bias.to(wide)
            )
        yield part, scores


# Operators, so that a compiled region does not unroll the loops and compile anew for each length.
@torch.library.custom_op("diffctrl::softpag_log_sum_exp", mutates_args=())
def log_sum_exp(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, Sq) log-sum-exp of the scaled scores, float32 or float64, without gradients.

    Args:
        query: (B, Sq, H, D).
        key: (B, Sk, H, D).
        mask: bool (True is attended) or additive, broadcastable to (B, H, Sq, Sk), four axes.
        scale: of the scores.
    """
    parts = [scores.logsumexp(-1) for _, scores in _scores(query, key, mask, scale)]
    return torch.cat(parts, dim=-1)


@log_sum_exp.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=wide)


@torch.library.custom_op("diffctrl::softpag_strongest_key", mutates_args=())
def strongest_key(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, Sq) index of each query's key of the largest score; arguments as in `log_sum_exp`."""
    parts = [scores.argmax(-1) for _, scores in _scores(query, key, mask, scale)]
    return torch.cat(parts, dim=-1)


@strongest_key.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.int64)
