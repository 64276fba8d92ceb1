"""The method as its definition reads, with S x S attention in float64. For tests.

Axis letters: H heads, S tokens, D head dim, n blocks. One batch row without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.layout import RowBlocks
from diffctrl.sparsed.selection import quota


def attention(query: Tensor, key: Tensor, scale: float, first_key: int = 0) -> Tensor:
    """A, float64 (H, S, S): softmax(scale Q K^T) over the keys from `first_key` on; 0 before it.

    query (H, S, D), key (Hkv, S, D).
    """
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = query.double() @ key.double().transpose(1, 2) * scale
    scores[..., :first_key] = float("-inf")
    return torch.softmax(scores, -1)


def pooled(attention: Tensor, block: int) -> Tensor:
    """W (H, n, n): sums of A over blocks, divided by block^2; blocks that are cut count as filled with 0."""
    heads, tokens, _ = attention.shape
    blocks = -(-tokens // block)
    filled = attention.new_zeros(heads, blocks * block, blocks * block)
    filled[:, :tokens, :tokens] = attention
    return filled.view(heads, blocks, block, blocks, block).sum((2, 4)) / block**2


def kept_blocks(
    query: Tensor, key: Tensor, prompt: int, scale: float, config: SparseDConfig
) -> list[list[set[int]]]:
    """Kept key blocks of every head and query block."""
    block = config.block_size
    scores = pooled(attention(query, key, scale), block)
    row = RowBlocks.of(prompt, query.shape[1] - prompt, block)
    generation = pooled(attention(query, key, scale, row.split * block), block)[..., row.split :]
    return [
        [_kept(scores[h, i].tolist(), generation[h, i].tolist(), row, config) for i in range(row.count)]
        for h in range(len(scores))
    ]


def _kept(scores: list[float], own: list[float], row: RowBlocks, config: SparseDConfig) -> set[int]:
    split, count = row.split, row.count
    if config.mode == "authors":
        joint = _best(scores, range(count), quota(count, config))
        mine = _best(own, range(count - split), quota(count - split, config))
        return {j for j in joint if j < split} | {split + j for j in mine}
    if not config.isolated:
        return _best(scores, range(count), quota(count, config))
    return _best(scores, range(split), quota(split, config)) | _best(
        scores, range(split, count), quota(count - split, config)
    )


def _best(scores: list[float], among: range, k: int) -> set[int]:
    return set(sorted(among, key=lambda j: -scores[j])[:k])


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: list[list[set[int]]], scale: float, block: int
) -> Tensor:
    """O (H, S, Dv), float64: softmax over the tokens of the kept blocks only."""
    heads, tokens, _ = query.shape
    allowed = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for h, rows in enumerate(kept):
        for i, blocks in enumerate(rows):
            for j in blocks:
                allowed[h, i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    groups = heads // key.shape[0]
    key, value = (t.double().repeat_interleave(groups, 0) for t in (key, value))
    scores = (query.double() @ key.transpose(1, 2) * scale).masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, -1) @ value
