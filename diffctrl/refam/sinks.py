"""Global attention sinks: text tokens that every query attends, strongly and alike (the paper's GAS).

The paper describes them and gives no rule; the statistic is ours. A token is flagged in a block where its
mean column is far above the median of the text columns, and its image column is nearly uniform. Early blocks
have none and do not vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def median(values: Tensor) -> Tensor:
    """True median over the last axis: the mean of the two central values of an even count."""
    ordered = values.sort(dim=-1).values
    count = values.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def importance(text_mass: Tensor | None, image_mass: Tensor) -> Tensor:
    """m = (mT + mI) / 2, the mean of both kinds of queries alike; mI alone in cross-attention.

    Args:
        text_mass: (..., T) mean over text queries of their weights on each text key, or None.
        image_mass: (..., T) the same of image queries.
    """
    return image_mass if text_mass is None else (text_mass + image_mass) / 2


def evenness(maps: Tensor) -> Tensor:
    """How evenly each column lies on the image: entropy of its shares over log I, in [0, 1].

    Args:
        maps: (..., T, I) weights, not negative. A column without any weight has 0.

    Returns:
        (..., T).

    >>> evenness(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).round(decimals=4).abs().tolist()
    [1.0, 0.0]
    """
    mass = maps.sum(dim=-1, keepdim=True)
    shares = torch.where(mass > 0, maps / mass, 0.0)
    entropy = -torch.xlogy(shares, shares).sum(dim=-1)
    return entropy / torch.log(torch.tensor(float(max(maps.shape[-1], 2)), dtype=maps.dtype))


def flags(
    macro: Tensor, even: Tensor, depth: Sequence[float], *, tau: float, least_even: float, least_depth: float
) -> Tensor:
    """Which tokens each block flags.

    Args:
        macro: (N, T) importance, one row for each of N blocks.
        even: (N, T) evenness of the image columns.
        depth: (N,) relative depth in [0, 1] of each block.
        tau: how many medians.
        least_even, least_depth: from where on.

    Returns:
        (N, T) bool.
    """
    deep = torch.tensor([place >= least_depth for place in depth], device=macro.device)
    strong = macro >= tau * median(macro).unsqueeze(-1)
    return strong & (even >= least_even) & deep[:, None]


def elected(flagged: Tensor) -> Tensor:
    """Tokens that at least half of the blocks flag: (N, T) bool -> (T,) bool."""
    return 2 * flagged.sum(dim=0) >= flagged.shape[0]
