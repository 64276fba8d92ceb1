"""Random numbers, each row from a generator of its own: a row's text does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A seed, a generator, or one of either for each row.
Seeds = int | torch.Generator | Sequence[int] | Sequence[torch.Generator] | None
_LARGEST = 2**63 - 1


def row_generators(seeds: Seeds, rows: int) -> list[torch.Generator]:
    """One generator per row.

    Args:
        seeds: a whole number s, for seeds s, s + 1, ...; a generator, from which s is drawn; one of either
            for each row; None for fresh ones. Generators made here are on the CPU whatever the model's
            device, so that a seed means the same noise everywhere; pass generators of the device where
            drawing on the CPU is too slow (temperature > 0 with a large vocabulary).
        rows: of the batch.

    Raises:
        ValueError: there is not one for each row.

    >>> a, b = row_generators(7, 2), row_generators([8], 1)
    >>> bool(torch.rand(1, generator=a[1]) == torch.rand(1, generator=b[0]))
    True
    """
    if isinstance(seeds, torch.Generator):
        seeds = int(torch.randint(_LARGEST - rows, (), generator=seeds, device=seeds.device))
    if seeds is None:
        seeds = int(torch.randint(_LARGEST - rows, ()))
    listed: list[Any] = [seeds + row for row in range(rows)] if isinstance(seeds, int) else list(seeds)
    if len(listed) != rows:
        raise ValueError(
            f"there are {len(listed)} seeds or generators for {rows} prompts; pass one, or one each"
        )
    return [
        each if isinstance(each, torch.Generator) else torch.Generator().manual_seed(each) for each in listed
    ]


def uniform(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Float64 numbers in [0, 1), drawn on the generator's device and moved."""
    drawn = torch.rand(*shape, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.to(device)


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise -ln(-ln u) from uniform u: argmax(l + tau * Gumbel) is a sample of softmax(l / tau).

    LLaDA's code computes exp(l) / (-ln u)^tau, of which this is the logarithm; the exponential overflows for
    large l. Float64 is needed: in bfloat16 the noise visibly spoils the text.
    """
    return -torch.log(-torch.log(noise))


def categorical(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Samples by inverting the cumulative distribution: one uniform number for each.

    Args:
        probabilities: (N, V) float64 >= 0; a row need not sum to 1.
        noise: (N,) float64 in [0, 1).

    Returns:
        (N,) int64, never an index of probability 0.

    >>> categorical(torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64), torch.tensor([0.5]).double()).item()
    2
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, also where the product rounds up to it.
    target = torch.minimum(noise[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)
