"""Perturbed twins: extra batch rows that repeat the conditional ones, and the guidance made from the two
predictions.

A pipeline computes e + s (c - e). Adding D = guidance.delta(c, p) to both e and c yields e + s (c - e) + D,
so any unmodified pipeline is guided (SoftPAG specification, 5.4 c).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffctrl.control.context import Rows


def append_twins(value: Any, batch: int, rows: Rows) -> Any:
    """Repeat the conditional rows of every batched tensor in a nest of lists, tuples and dicts.

    Tensors whose first axis is not the batch (a scalar timestep, one shared embedding) stay as they are.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            return value
        return torch.cat([value, value[rows.cond[0] : rows.cond[1]]], dim=0)
    if isinstance(value, (list, tuple)):
        return type(value)(append_twins(item, batch, rows) for item in value)
    if isinstance(value, dict):
        return {name: append_twins(item, batch, rows) for name, item in value.items()}
    return value


def append_grouped_twins(value: Tensor, batch: int, rows: Rows) -> Tensor:
    """The same for a tensor (B * G, ...) that holds G rows for each batch row."""
    return append_twins(value.unflatten(0, (batch, -1)), batch, rows).flatten(0, 1)


def cond_rows(value: Any, batch: int, rows: Rows) -> Any:
    """The conditional rows of every batched tensor in a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            return value
        return value[rows.cond[0] : rows.cond[1]]
    if isinstance(value, (list, tuple)):
        return type(value)(cond_rows(item, batch, rows) for item in value)
    if isinstance(value, dict):
        return {name: cond_rows(item, batch, rows) for name, item in value.items()}
    return value


def grouped_cond_rows(value: Tensor, batch: int, rows: Rows) -> Tensor:
    """The same for a tensor (B * G, ...) that holds G rows for each batch row."""
    return cond_rows(value.unflatten(0, (batch, -1)), batch, rows).flatten(0, 1)


def add_delta(prediction: Tensor, delta: Tensor, seen: int) -> Tensor:
    """Keep the rows that the pipeline sees and add `delta` to each half (twice for [uncond | cond])."""
    repeats = seen // delta.shape[0]
    # The delta is float32 or wider, and the sum with it.
    return (prediction[:seen] + delta.repeat(repeats, *[1] * (delta.ndim - 1))).to(prediction.dtype)


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a diffusers denoiser returns: a tuple, or an output object with `sample`."""
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """The same kind of output with another prediction."""
    return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)
