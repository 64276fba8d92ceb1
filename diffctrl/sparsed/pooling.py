"""Block scores in torch: exact in strips of query rows on any device, and two estimates.

W[I, J] = 1 / B^2 * sum of the attention of the queries of block I on the keys of block J, blocks that are cut
filled with zeros: a row of W sums to (real queries of the block) / B^2. Never an S x S tensor: a strip holds
as many rows as fit into a budget, one block of rows of one key head at least.

Axis letters: B batch, S tokens, H query heads, Hkv key heads, D head dim, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of scores at a time. On a CPU they should stay in the cache: 64 MiB took three times as long as 1.
CPU_STRIP_PER_THREAD = 1 << 20
GPU_STRIP = 64 << 20


def chunked_scores(
    query: Tensor,
    key: Tensor,
    query_valid: list[int],
    key_valid: list[int],
    scale: float,
    block: int,
    lse: Tensor | None = None,
) -> Tensor:
    """W, exact.

    Args:
        query: (B, Sq, H, D), floating point, any strides; row b has `query_valid[b]` real tokens, first.
        key: (B, Sk, Hkv, D), H a multiple of Hkv; row b has `key_valid[b]` real tokens, first.
        query_valid, key_valid: B numbers.
        scale: of the scores.
        block: tokens of a block.
        lse: (B, H, Sq) of the same scores over the same keys, where it is known; saves a pass.

    Returns:
        float32 (B, H, nq, nk), float64 for float64 inputs; 0 for blocks without real tokens.
    """
    out = _empty(query, key, block)
    for b, (rows, keys) in enumerate(zip(query_valid, key_valid, strict=True)):
        for heads, k in _key_heads(key[b, :keys], query.shape[2], block):
            strip = _strip_rows(k, block)
            for start in range(0, rows, strip):
                stop = min(start + strip, rows)
                scores = _scores(query[b, start:stop, heads], k, scale)
                if lse is None:
                    probs = torch.softmax(scores, -1)
                else:
                    probs = scores.sub_(lse[b, heads, start:stop].unsqueeze(-1)).exp_()
                sums = _summed(_summed(probs, block).transpose(1, 2), block).transpose(1, 2)
                first = start // block
                out[b, heads, first : first + sums.shape[1], : sums.shape[2]] = sums
    return out.div_(block**2)


def sampled_scores(
    query: Tensor, key: Tensor, query_valid: list[int], key_valid: list[int], scale: float, block: int,
    samples: int,
) -> Tensor:  # fmt: skip
    """W estimated from `samples` evenly spaced queries of each block; arguments as of `chunked_scores`."""
    out = _empty(query, key, block)
    for b, (rows, keys) in enumerate(zip(query_valid, key_valid, strict=True)):
        index, sizes = _sample(rows, block, samples, query.device)
        for heads, k in _key_heads(key[b, :keys], query.shape[2], block):
            strip = max(_strip_rows(k, block) // samples, 1)
            for first in range(0, len(sizes), strip):
                part = index[first : first + strip].flatten()
                probs = torch.softmax(_scores(query[b, part][:, heads], k, scale), -1)
                sums = _summed(probs, block).unflatten(1, (-1, samples)).mean(2)
                sums *= sizes[first : first + strip].view(-1, 1)
                out[b, heads, first : first + sums.shape[1], : sums.shape[2]] = sums
    return out.div_(block**2)


def mean_scores(
    query: Tensor, key: Tensor, query_valid: list[int], key_valid: list[int], scale: float, block: int
) -> Tensor:
    """W estimated from the mean query and the mean key of each block; arguments as of `chunked_scores`."""
    out = _empty(query, key, block)
    groups = query.shape[2] // key.shape[2]
    for b, (rows, keys) in enumerate(zip(query_valid, key_valid, strict=True)):
        q, q_sizes = _block_means(query[b, :rows], block)
        k, k_sizes = _block_means(key[b, :keys], block)
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale + k_sizes.log()
        probs = torch.softmax(scores, -1) * q_sizes.view(-1, 1)
        out[b, :, : probs.shape[1], : probs.shape[2]] = probs
    return out.div_(block**2)


def _empty(query: Tensor, key: Tensor, block: int) -> Tensor:
    shape = query.shape[0], query.shape[2], -(-query.shape[1] // block), -(-key.shape[1] // block)
    return query.new_zeros(shape, dtype=_work(query))


def _work(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _key_heads(key: Tensor, heads: int, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Key heads that fit at once: (their query heads, keys (Hkv', G, D, S), expanded over the group)."""
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    at_once = max(_budget(key.device) // (groups * block * len(key) * 4), 1)
    for start in range(0, kv_heads, at_once):
        stop = min(start + at_once, kv_heads)
        part = key[:, start:stop].permute(1, 2, 0).to(_work(key))
        yield (
            slice(start * groups, stop * groups),
            part.unsqueeze(1).expand(-1, groups, -1, -1),
        )


def _strip_rows(key: Tensor, block: int) -> int:
    """Query rows of a strip against keys (Hkv', G, D, S): whole blocks, one at least."""
    heads, keys = key.shape[0] * key.shape[1], key.shape[3]
    return max(_budget(key.device) // (heads * keys * 4 * block), 1) * block


def _budget(device: torch.device) -> int:
    return torch.get_num_threads() * CPU_STRIP_PER_THREAD if device.type == "cpu" else GPU_STRIP


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """query (R, H', D), key (Hkv', G, D, S) -> (H', R, S) in the working dtype."""
    q = query.transpose(0, 1).to(key.dtype) * scale
    return (q.unflatten(0, key.shape[:2]) @ key).flatten(0, 1)


def _summed(probs: Tensor, block: int) -> Tensor:
    """(H, R, S) -> (H, R, ceil(S / block)): sums over blocks of the last axis."""
    whole = probs.shape[-1] // block * block
    sums = probs[..., :whole].unflatten(-1, (-1, block)).sum(-1) if whole else probs[..., :0]
    return (
        torch.cat([sums, probs[..., whole:].sum(-1, keepdim=True)], -1) if whole < probs.shape[-1] else sums
    )


def _sample(rows: int, block: int, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sampled rows int64 (n, samples), and the real rows of each block, float32 (n,)."""
    starts = torch.arange(0, rows, block)
    sizes = (rows - starts).clamp(max=block)
    within = (torch.arange(samples) * 2 + 1) * sizes.unsqueeze(1) // (2 * samples)
    return (starts.unsqueeze(1) + within).to(device), sizes.to(device, torch.float32)


def _block_means(tensor: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(S, H, D) -> means (H, n, D) and block sizes (n,), in the working dtype."""
    sums = _summed(tensor.permute(1, 2, 0).to(_work(tensor)), block).transpose(1, 2)
    starts = torch.arange(0, len(tensor), block, device=tensor.device)
    sizes = (len(tensor) - starts).clamp(max=block).to(sums.dtype)
    return sums / sizes.unsqueeze(-1), sizes
