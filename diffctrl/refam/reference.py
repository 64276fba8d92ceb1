"""The slow reference: whole attention maps by a dense softmax in float64, column by column. For tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """(H, S, S) softmax over every key, from (S, H, D)."""
    logits = torch.einsum("ihd,jhd->hij", query.double(), key.double()) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1)


def summed_columns(attention: Tensor, image: range, columns: list[int]) -> Tensor:
    """(I,) mean over heads of the summed columns, read one number at a time.

    Args:
        attention: (H, S, S).
        image: positions of the image queries.
        columns: positions of the kept text keys.
    """
    values = []
    for query in image:
        total = 0.0
        for head in range(attention.shape[0]):
            for column in columns:
                total += float(attention[head, query, column]) / attention.shape[0]
        values.append(total)
    return torch.tensor(values, dtype=torch.float64)


def planted_attention(
    size: int,
    target: tuple[slice, slice],
    *,
    magnets: bool,
) -> tuple[Tensor, dict[str, list[int]]]:
    """Attention with known faults: a stop word on the background, a sink everywhere, magnets that split it.

    Text logits: content 2 inside the object, a stop word 3 outside, a sink 4 everywhere, and two magnets 4,
    each on one half of the background; image keys 0.

    Args:
        size: tokens along each side of the image.
        target: rows and columns of the object.
        magnets: whether they are there.

    Returns:
        (T, I) float64 weights of image queries on text keys, and the columns by name.
    """
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[target] = True
    left = torch.zeros(size, size, dtype=torch.bool)
    left[:, : size // 2] = True
    plain = torch.zeros(size, size, dtype=torch.float64)
    logits = [
        torch.where(inside, 2.0, plain),
        torch.where(inside, plain, 3.0),
        plain + 4.0,
    ]
    names = {"content": [0], "stop": [1], "sink": [2]}
    if magnets:
        names["magnets"] = [3, 4]
        logits += [torch.where(~inside & half, 4.0, plain) for half in (left, ~left)]
    text = torch.stack([part.flatten() for part in logits])
    whole = torch.cat([text, torch.zeros(size * size, size * size, dtype=torch.float64)])
    return whole.softmax(dim=0)[: len(text)], names
