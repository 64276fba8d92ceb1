"""The perturbation in its output form: no attention map is formed."""

from __future__ import annotations

import torch
from torch import Tensor


def blend_identity(
    output: Tensor, value: Tensor, weight: Tensor, rows: tuple[int, int] | None = None
) -> Tensor:
    """O' = O + W (V - O), which is A' = (1 - W) A + W I applied to V (paper section 4; eq. of SoftPAG).

    Args:
        output: (B, S, H, D), the attention output of every head, before heads are merged.
        value: (B, S, Hkv, D), as fed to the kernel; with grouped heads, query head h uses value head
            h * Hkv // H.
        weight: (B, H), strength per batch row and head, in [0, 1].
        rows: half-open range of query tokens that are changed; None for all.

    Returns:
        (B, S, H, D). Where the weight is 0 the output is returned bit for bit (also where V is not finite);
        where it is 1, V.
    """
    if value.shape[2] != output.shape[2]:
        value = value.repeat_interleave(output.shape[2] // value.shape[2], dim=2)
    weight = weight[:, None, :, None].to(output.dtype)
    if rows is None:
        return torch.where(weight != 0, torch.lerp(output, value, weight), output)
    start, stop = rows
    inside = output[:, start:stop]
    blended = torch.where(weight != 0, torch.lerp(inside, value[:, start:stop], weight), inside)
    return torch.cat([output[:, :start], blended, output[:, stop:]], dim=1)
