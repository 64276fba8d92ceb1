"""Guidance from a conditional prediction and its perturbed twin. Linear: the same for eps, v and flow."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from diffctrl.softpag.config import SoftPAGConfig


def _wide(prediction: Tensor) -> Tensor:
    return prediction.float() if prediction.element_size() < 4 else prediction


def perturbation_delta(cond: Tensor, perturbed: Tensor, w: float) -> Tensor:
    """w (c - p), in float32 (float64 for float64 predictions), shape of `cond`."""
    return w * (_wide(cond) - _wide(perturbed))


def guide(cond: Tensor, perturbed: Tensor, w: float, uncond: Tensor | None = None, s: float = 1.0) -> Tensor:
    """eps = e + s (c - e) + w (c - p); without `uncond`, c + w (c - p) (paper, section 3).

    `s` is the classifier-free scale in the diffusers convention (1 is off); the paper writes s - 1.
    """
    delta = perturbation_delta(cond, perturbed, w)
    base = cond if uncond is None else uncond + s * (cond - uncond)
    return base + delta


def guidance_delta(
    config: SoftPAGConfig, cond: Tensor, perturbed: Tensor, memory: MutableMapping[str, Any]
) -> Tensor:
    """w D, where D = c - p after the post-processing that the settings name (specification 2.4).

    Args:
        config: the settings.
        cond, perturbed: (B, ...), one picture per row.
        memory: what lasts from one guided step of a run to the next; changed. The authors' code makes its
            momentum anew in each step, which turns it off.

    Returns:
        (B, ...), float32 or float64.
    """
    if config.difference == "plain":
        return perturbation_delta(cond, perturbed, config.scale)
    cond, perturbed = _wide(cond), _wide(perturbed)
    if config.difference == "tangential":
        return config.scale * (cond - shared_direction(cond, perturbed))
    difference = cond - perturbed
    if config.apg_momentum:
        before = memory.get("difference")
        if before is not None and before.shape == difference.shape:
            difference = difference + config.apg_momentum * before
        memory["difference"] = difference
    return config.scale * projected(difference, cond, config.apg_parallel or 0.0, config.apg_norm)


def projected(difference: Tensor, cond: Tensor, parallel: float, norm: float | None) -> Tensor:
    """The difference with its part along `cond` scaled by `parallel` (APG, arXiv 2410.02416).

    Args:
        difference, cond: (B, ...).
        parallel: 0 keeps what is orthogonal to c alone, 1 changes nothing.
        norm: each row is shortened to this length first; None for no limit.
    """
    flat, along = difference.flatten(1), cond.flatten(1)
    if norm is not None:
        flat = flat * (norm / flat.norm(dim=1, keepdim=True).clamp(min=norm))
    square = along.square().sum(1, keepdim=True)
    part = (flat * along).sum(1, keepdim=True) / square.clamp(min=torch.finfo(square.dtype).tiny) * along
    return (flat - (1.0 - parallel) * part).view_as(difference)


def shared_direction(cond: Tensor, perturbed: Tensor) -> Tensor:
    """`perturbed` without its part along the second singular direction of the pair (TCFG, arXiv 2503.18137).

    Each row's pair (c, p) is a matrix of two long rows. Its first right singular vector comes from the two by
    two matrix of their products; a decomposition of the long matrix would give the same.
    """
    pair = torch.stack([cond.flatten(1), perturbed.flatten(1)], dim=1).double()
    mixing = torch.linalg.eigh(pair @ pair.transpose(1, 2)).eigenvectors[..., -1]  # of the largest value
    first = (mixing[:, None] @ pair)[:, 0]
    first = first / first.norm(dim=1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny)
    kept = (pair[:, 1] * first).sum(1, keepdim=True) * first
    return kept.to(perturbed.dtype).view_as(perturbed)


def rescaled(prediction: Tensor, cond: Tensor, share: float) -> Tensor:
    """share eps std(c) / std(eps) + (1 - share) eps, each row by its own (arXiv 2305.08891, section 3.4)."""
    prediction, cond = _wide(prediction), _wide(cond)
    axes = list(range(1, prediction.ndim))
    ratio = cond.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
    return prediction * (share * ratio + (1.0 - share))
