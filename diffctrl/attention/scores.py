"""Scaled scores in full precision, and the log-sum-exp over them, a tile at a time: never S x S.

Axis letters: B batch, R queries of a tile, T keys of a tile, H query heads, Hkv key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

TILE_BYTES = 64 << 20  # of scores at a time
_ROWS = 512  # queries of a tile that does not hold all keys

Hide = Callable[[torch.Tensor, slice, slice], torch.Tensor]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores of these operands are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Inside it, products are in the dtype of their operands."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, below: torch.Tensor | None = None
) -> torch.Tensor:
    """scale * query key^T as (B, H, R, T), float32 (float64 for float64), whatever the operands are.

    Args:
        query: (B, R, H, D), any strides.
        key: (B, T, Hkv, D), the same dtype; H is a multiple of Hkv.
        scale: of the scores.
        below: (B, H, R, 1), subtracted in the same pass over memory.

    >>> scores(torch.ones(1, 2, 4, 8).bfloat16(), torch.ones(1, 3, 2, 8).bfloat16(), 0.5).unique().tolist()
    [4.0]
    """
    batch, rows, heads, dim = query.shape
    length, kv_heads = key.shape[1:3]
    left = query.transpose(1, 2).reshape(batch * kv_heads, heads // kv_heads * rows, dim)
    right = key.permute(0, 2, 3, 1).reshape(batch * kv_heads, dim, length)
    wide = wide_dtype(query.dtype)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        # Products of 16-bit numbers are exact in float32: tensor cores, and no copy of the operands. Scores
        # rounded to bfloat16 would be off by up to 2 % in small weights.
        product = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        with without_autocast(query.device.type):
            product = torch.bmm(left.to(wide), right.to(wide))
    product = product.view(batch, heads, rows, length)
    return product.mul_(scale) if below is None else torch.add(-below, product, alpha=scale, out=product)


def tiles(
    query: torch.Tensor, key: torch.Tensor, tile_bytes: int | None = None
) -> Iterator[tuple[slice, Iterator[slice]]]:
    """(queries, their tiles of keys): each pair a tile of scores of at most `tile_bytes`, or one score."""
    tile_bytes = tile_bytes or TILE_BYTES
    batch, count, heads, _ = query.shape
    length = key.shape[1]
    numbers = max(tile_bytes // (batch * heads * wide_dtype(query.dtype).itemsize), 1)
    rows = max(numbers // length, min(_ROWS, count, numbers))
    columns = min(max(numbers // rows, 1), length)
    for start in range(0, count, rows):
        keys = (slice(first, min(first + columns, length)) for first in range(0, length, columns))
        yield slice(start, min(start + rows, count)), keys


def tiled_logsumexp(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    hide: Hide | None = None,
    tile_bytes: int | None = None,
) -> torch.Tensor:
    """Log-sum-exp (B, H, Sq) of the scores of every query over ALL keys, float32 or float64; no gradients.

    Args:
        query: (B, Sq, H, D).
        key: (B, Sk, Hkv, D).
        scale: of the scores.
        hide: (scores of a tile, its queries, its keys) -> the scores with -inf where a pair is not attended.
        tile_bytes: of scores at a time, TILE_BYTES by default; about three times as much is used.

    -inf for a query that attends nothing.
    """
    batch, count, heads, _ = query.shape
    out = query.new_empty((batch, heads, count), dtype=wide_dtype(query.dtype))
    for rows, key_tiles in tiles(query, key, tile_bytes):
        total = None
        for keys in key_tiles:
            part = scores(query[:, rows], key[:, keys], scale)
            part = torch.logsumexp(part if hide is None else hide(part, rows, keys), -1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        out[..., rows] = total
    return out


def with_mask(scores: torch.Tensor, attn_mask: torch.Tensor, rows: slice, keys: slice) -> torch.Tensor:
    """Scores (B, H, R, T) of a tile under a bool (True is attended) or additive mask of four axes."""
    bias = attn_mask[..., keys]
    bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
    return scores.masked_fill_(~bias, float("-inf")) if bias.dtype == torch.bool else scores.add_(bias)
