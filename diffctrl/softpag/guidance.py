"""Guidance from a conditional prediction and its perturbed twin. Linear: the same for eps, v and flow."""

from __future__ import annotations

from torch import Tensor


def perturbation_delta(cond: Tensor, perturbed: Tensor, w: float) -> Tensor:
    """w (c - p), in float32 (float64 for float64 predictions), shape of `cond`."""
    if cond.element_size() < 4:
        cond, perturbed = cond.float(), perturbed.float()
    return w * (cond - perturbed)


def guide(cond: Tensor, perturbed: Tensor, w: float, uncond: Tensor | None = None, s: float = 1.0) -> Tensor:
    """eps = e + s (c - e) + w (c - p); without `uncond`, c + w (c - p) (paper, section 3).

    `s` is the classifier-free scale in the diffusers convention (1 is off); the paper writes s - 1.
    """
    delta = perturbation_delta(cond, perturbed, w)
    base = cond if uncond is None else uncond + s * (cond - uncond)
    return base + delta
