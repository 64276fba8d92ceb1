"""Which positions of a row are decided in a step."""

from __future__ import annotations

import torch
from torch import Tensor


def split_evenly(count: Tensor, steps: int) -> Tensor:
    """How many positions each of `steps` steps decides: all of `count`, the earlier steps one more.

    Args:
        count: (B,) int64, masked positions of each row.

    Returns:
        (B, steps) int64.

    >>> split_evenly(torch.tensor([10]), 4).tolist()
    [[3, 3, 2, 2]]
    """
    later = torch.arange(steps, device=count.device)
    return count[:, None] // steps + (later[None] < count[:, None] % steps)


def surest(confidence: Tensor, masked: Tensor, quota: Tensor) -> Tensor:
    """The masked positions of highest confidence, `quota` of them in each row; of equals the left one.

    Args:
        confidence: (B, S) float; read where `masked`, and may be -inf there.
        masked: (B, S) bool.
        quota: (B,) int64; where there are fewer masked positions, all.

    Returns:
        (B, S) bool.
    """
    # A masked position without confidence still comes before those that are not masked.
    least = torch.finfo(confidence.dtype).min
    key = torch.where(masked, confidence.nan_to_num(nan=least).clamp(min=least), -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return masked & (rank < quota[:, None])
