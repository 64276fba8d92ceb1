"""What the tiny models of all families share: sizes and random numbers."""

import torch
from torch import Tensor

BATCH = 2
TEXT = 7


def randn(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator)


def lengths_mask(*lengths: int, total: int) -> Tensor:
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).to(torch.int64)
