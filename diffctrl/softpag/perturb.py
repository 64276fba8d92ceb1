"""The perturbation in its output form: no attention map is formed."""

from __future__ import annotations

import torch
from torch import Tensor


def blend(output: Tensor, target: Tensor, weight: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
    """O' = O + W (T V - O), which is A' = (1 - W) A + W T applied to V (paper section 4; eq. of SoftPAG).

    Args:
        output: (B, S, H, D), the attention output of every head, before heads are merged.
        target: T V, (B, S, H, D) or (B, 1, H, D); with `rows`, as many queries as they are.
        weight: strength in [0, 1]: (B, H), or (B, S, H) where it differs from query to query.
        rows: half-open range of query tokens that are changed; None for all.

    Returns:
        (B, S, H, D). Where the weight is 0 the output is returned bit for bit (also where the target is not
        finite); where it is 1, the target.
    """
    if rows is not None:
        start, stop = rows
        inside = blend(output[:, start:stop], target, weight)
        return torch.cat([output[:, :start], inside, output[:, stop:]], dim=1)
    weight = (weight[:, None] if weight.ndim == 2 else weight)[..., None].to(output.dtype)
    return torch.where(weight != 0, torch.lerp(output, target.expand_as(output), weight), output)


def blend_identity(
    output: Tensor, value: Tensor, weight: Tensor, rows: tuple[int, int] | None = None
) -> Tensor:
    """`blend` towards the identity map, whose output is V: SoftPAG itself.

    Args:
        output, weight, rows: as in `blend`.
        value: (B, S, Hkv, D), as fed to the kernel; with grouped heads, query head h uses value head
            h * Hkv // H.
    """
    if value.shape[2] != output.shape[2]:
        value = value.repeat_interleave(output.shape[2] // value.shape[2], dim=2)
    return blend(output, value if rows is None else value[:, rows[0] : rows[1]], weight, rows)


def blend_zero(output: Tensor, weight: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
    """`blend` towards no output at all: (1 - W) O. Its rows sum to 1 - W, so that it is no distribution."""
    return blend(output, output.new_zeros(()), weight, rows)
