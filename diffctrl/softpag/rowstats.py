"""The strongest key of each query, a tile of scores at a time: never S x S."""

from __future__ import annotations

import torch
from torch import Tensor

from diffctrl.attention.scores import scores, tiles, with_mask


# An operator, so that a compiled region does not unroll the loops and compile anew for each length.
@torch.library.custom_op("diffctrl::softpag_strongest_key", mutates_args=())
def strongest_key(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, Sq) index of each query's key of the largest score; the first one where several are equal.

    Args:
        query: (B, Sq, H, D).
        key: (B, Sk, H, D).
        mask: bool (True is attended) or additive, broadcastable to (B, H, Sq, Sk), four axes.
        scale: of the scores.
    """
    batch, count, heads, _ = query.shape
    index = query.new_empty((batch, heads, count), dtype=torch.int64)
    for rows, key_tiles in tiles(query, key):
        best = None
        for keys in key_tiles:
            part = scores(query[:, rows], key[:, keys], scale)
            score, place = (part if mask is None else with_mask(part, mask, rows, keys)).max(-1)
            place += keys.start
            if best is None:
                best = score, place
            else:
                higher = score > best[0]
                best = torch.where(higher, score, best[0]), torch.where(higher, place, best[1])
        assert best is not None
        index[..., rows] = best[1]
    return index


@strongest_key.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.int64)
