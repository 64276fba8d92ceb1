"""Pieces of forward passes that the trainings share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of an embedding table by a one-hot product: (V, C), (...) int64 -> (..., C).

    The gradient of an indexed lookup sorts the ids, which some versions do with a host synchronisation and
    others with atomics. The product has neither, and a few hundred words make it cheap.
    """
    hot = (ids[..., None] == torch.arange(table.shape[0], device=ids.device)).to(table.dtype)
    return hot @ table


def maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The function compiled as one graph of fixed shapes, or as it is."""
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function
