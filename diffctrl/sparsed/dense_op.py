"""Dense attention in a compiled region: one operator for the steps that take a pattern and those that do not.

So both share a graph, and a run has two: dense and sparse. The operator attends as eager code does: the step
that takes the pattern gets the log-sum-exp from the attention itself, where a second operator beside it would
have to attend once more.
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


@torch.library.custom_op("diffctrl::sparsed_dense", mutates_args=("token",))
def dense_op(
    query: Tensor, key: Tensor, value: Tensor, token: Tensor, layer: Tensor, number: int, scale: float
) -> Tensor:
    """`SparseDController.dense` of the controller of that number; `token` is said to change.

    It has no gradient: a backward pass through it would be refused by torch.
    """
    controller = _BY_NUMBER.get(number)
    if controller is None:
        raise RuntimeError("SparseD: a compiled region outlived its controller; compile the model again")
    return controller.dense(int(layer), query, key, value, scale).contiguous()


@dense_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, token: Tensor, layer: Tensor, number: int, scale: float
) -> Tensor:
    return query.new_empty(query.shape)
