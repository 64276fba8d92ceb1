"""Perturbations of whole layers: what attention or a block adds is left out, or tokens change places.

Not attention maps (specification, section 4): skip-layer guidance (SLG), spatio-temporal skip guidance (STG,
arXiv 2411.18664) and token perturbation guidance (TPG, arXiv 2506.10036), with u as a continuous strength.
"""

from __future__ import annotations

import torch
from torch import Tensor


def faded(
    states: Tensor, without: Tensor | None, weight: Tensor, rows: tuple[int, int] | None = None
) -> Tensor:
    """states + W (without - states): W = 1 leaves out what made `states` of `without`.

    Args:
        states: (B, S, C).
        without: (B, S, C), or None for zeros.
        weight: (B,) in [0, 1], the strength of each batch row.
        rows: half-open range of tokens that change; None for all.

    Returns:
        (B, S, C); rows of weight 0 bit for bit.
    """
    if rows is not None:
        start, stop = rows
        inside = faded(states[:, start:stop], None if without is None else without[:, start:stop], weight)
        return torch.cat([states[:, :start], inside, states[:, stop:]], dim=1)
    weight = weight[:, None, None].to(states.dtype)
    target = states.new_zeros(()).expand_as(states) if without is None else without
    return torch.where(weight != 0, torch.lerp(states, target, weight), states)


def shuffled(count: int, share: float, seed: int) -> Tensor:
    """(count,) int64: an order of tokens in which about `share` of them have changed places.

    A permutation keeps the norm of the states. TPG permutes all tokens; here a random subset is permuted
    among itself, cyclically, so that each of it moves.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randperm(count, generator=generator)[: round(share * count)]
    order = torch.arange(count)
    order[moved] = moved.roll(1)
    return order


def reordered(states: Tensor, order: Tensor) -> Tensor:
    """Tokens of each batch row in an order of its own.

    Args:
        states: (B, S, C).
        order: (B, S) int64.
    """
    return states.gather(1, order[:, :, None].expand_as(states))
