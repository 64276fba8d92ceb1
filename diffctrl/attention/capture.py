"""Attention weights of a few key columns, from the log-sum-exp: rows x T numbers at a time, never S x S."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def column_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    columns: slice | torch.Tensor,
    scale: float,
    rows: int = 1024,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Softmax weights of `columns`, `rows` queries at a time: reduce each part before asking for the next.

    Args:
        query: (B, Sq, H, D).
        key: (B, Sk, Hkv, D).
        lse: (B, H, Sq), as `attend(..., return_lse=True)` gave it for these tensors, this scale and its mask.
            Under a block mask the weights are those of the sparse softmax, right for columns that the row
            attends.
        columns: which of the Sk keys, T of them.
        scale: of the scores, as in the call that gave lse.

    Yields:
        (start, weights): the first query row of the part; weights (B, H, R, T), fp32.

    >>> q, k = torch.zeros(1, 3, 1, 4), torch.zeros(1, 5, 1, 4)
    >>> lse = torch.full((1, 1, 3), 5.0).log()
    >>> for start, part in column_weights(q, k, lse, slice(0, 2), 1.0):
    ...     print(start, [round(mass, 4) for mass in part.sum(-1).flatten().tolist()])
    0 [0.4, 0.4, 0.4]
    """
    groups = query.shape[2] // key.shape[2]
    chosen = key[:, columns].permute(0, 2, 3, 1).float().repeat_interleave(groups, 1)  # (B, H, D, T)
    for start in range(0, query.shape[1], rows):
        part = query[:, start : start + rows].transpose(1, 2).float()
        norm = lse[..., start : start + rows].unsqueeze(-1)
        weights = torch.exp(part @ chosen * scale - norm)
        # A row without keys has lse -inf and no weights.
        yield start, weights.masked_fill_(norm == float("-inf"), 0.0)
