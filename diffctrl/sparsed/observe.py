"""Taking a pattern from inside a compiled region: one operator that does nothing in all steps but those.

So dense steps and the step that takes the pattern share a graph, and a run has two: dense and sparse.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffctrl.sparsed.controller import SparseDController

# A compiled region hands a number to the operator, which cannot take a Python object.
_BY_NUMBER: weakref.WeakValueDictionary[int, SparseDController] = weakref.WeakValueDictionary()


def remember(number: int, controller: SparseDController) -> None:
    _BY_NUMBER[number] = controller


@torch.library.custom_op("diffctrl::sparsed_observe", mutates_args=("token",))
def observe_op(query: Tensor, key: Tensor, token: Tensor, layer: Tensor, number: int, scale: float) -> None:
    """Hands queries and keys of a layer to the controller of that number; `token` is said to change."""
    controller = _BY_NUMBER.get(number)
    if controller is not None:
        controller.build(int(layer), query, key, scale, None)


@observe_op.register_fake
def _(query: Tensor, key: Tensor, token: Tensor, layer: Tensor, number: int, scale: float) -> None:
    return None
