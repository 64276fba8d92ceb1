"""The perturbation of some heads and batch rows of one attention call: the least work for any target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffctrl.softpag.config import SoftPAGConfig
from diffctrl.softpag.perturb import blend
from diffctrl.softpag.targets import Chosen, perturbed_rows, spherical_weight, target


def perturb(
    config: SoftPAGConfig,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    heads: Tensor,
    *,
    image: tuple[int, int],
    mask: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    scale: float | None = None,
    backend: Any = None,
) -> Tensor:
    """O' of the last batch rows and of some heads; everything else is returned bit for bit.

    Args:
        config: target, scope and path.
        output: (B, S, H, D), the attention output before heads are merged.
        query: (B, S, H, D); key, value: (B, S, Hkv, D), as fed to the kernel.
        weight: (P, K), strength of the last P batch rows and the chosen heads.
        heads: (K,) indices of the chosen heads.
        image: half-open range of the image tokens.
        mask: as the kernel got it: bool or additive, broadcastable to (B, H, S, S), or (B, S) for keys.
        grid: (frames, rows, columns) of the image tokens, for the target that blurs over it.
        scale: of the scores, 1 / sqrt(D) by default.
        backend: attention backend for a second attention.
    """
    first = output.shape[0] - weight.shape[0]
    chosen = _chosen(query, key, value, mask, first, heads, image, grid, scale, backend)
    rows = perturbed_rows(config, chosen)
    strength = weight if config.path == "linear" else spherical_weight(weight, chosen, rows)
    before = output[first:, rows[0] : rows[1]].index_select(2, heads)
    after = blend(before, target(config, chosen, rows).to(output.dtype), strength)
    changed = output.clone()
    changed[first:, rows[0] : rows[1]] = changed[first:, rows[0] : rows[1]].index_copy(2, heads, after)
    return changed


def _chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    first: int,
    heads: Tensor,
    image: tuple[int, int],
    grid: tuple[int, int, int] | None,
    scale: float | None,
    backend: Any,
) -> Chosen:
    """Queries, keys, values and mask of the last batch rows and the chosen heads."""
    shared = torch.div(heads * key.shape[2], query.shape[2], rounding_mode="floor")
    if mask is not None:
        # (B, Sk) is key validity, as the stock dispatcher reads it.
        mask = mask[:, None, None] if mask.ndim == 2 else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if mask.shape[0] != 1:
            mask = mask[first:]
        if mask.shape[1] != 1:
            mask = mask.index_select(1, heads)
    return Chosen(
        query[first:].index_select(2, heads),
        key[first:].index_select(2, shared),
        value[first:].index_select(2, shared),
        mask,
        image,
        grid,
        scale,
        backend,
    )
