"""Sums of weights as they come, part by part: what a capture keeps of one attention call.

Axis letters: B batch, H heads, Q queries and K keys that are captured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .routes import Part
from .spec import CaptureSpec


@dataclass(frozen=True, slots=True)
class Sink:
    """Where the quantity of one spec goes.

    Attributes:
        spec: says which quantity, and how heads are reduced.
        total: what it is added to, float32: (B, [H,] Q, K) of weights, (B, [H,] Q) of a row mass, (B, [H,] K)
            of a column mass or entropy; with H where heads="each".
    """

    spec: CaptureSpec
    total: torch.Tensor


def accumulate(parts: Iterable[Part], sinks: Iterable[Sink], valid: torch.Tensor | None, rows: int) -> None:
    """Adds the quantities of one attention call to the totals of its sinks.

    Args:
        parts: the weights, each pair once.
        sinks: all want the same queries and keys.
        valid: (B, Q) bool, False at queries of padding; None where all are valid.
        rows: Q.
    """
    sinks = list(sinks)
    # Sums over queries of w and of w log w; the entropy is known at the end.
    moments = {
        i: [torch.zeros_like(sink.total) for _ in range(2)]
        for i, sink in enumerate(sinks)
        if sink.spec.quantity == "column_entropy"
    }
    count = float(rows) if valid is None else valid.sum(1).clamp(min=1).float()  # (B,)
    for part in parts:
        tile = part.weights
        height, width = tile.shape[2:]
        if valid is not None:
            tile = tile * valid[:, None, part.row : part.row + height, None]
        reduced: dict[str, torch.Tensor] = {}
        for i, sink in enumerate(sinks):
            heads = sink.spec.heads
            if heads not in reduced:
                reduced[heads] = tile if heads == "each" else getattr(tile, heads)(1)
            w, total = reduced[heads], sink.total
            queries, keys = slice(part.row, part.row + height), slice(part.column, part.column + width)
            if sink.spec.quantity == "weights":
                total[..., queries, keys] += w
            elif sink.spec.quantity == "row_mass":
                total[..., queries] += w.sum(-1)
            elif sink.spec.quantity == "column_mass":
                total[..., keys] += w.sum(-2) / _broadcast(count, w.ndim - 1)
            else:
                mass, log_mass = moments[i]
                mass[..., keys] += w.sum(-2)
                log_mass[..., keys] += torch.xlogy(w, w).sum(-2)
    # A number of the host stays there: as a tensor it would make the host wait for the card in every block.
    most = count.log() if isinstance(count, torch.Tensor) else math.log(count)
    for i, (mass, log_mass) in moments.items():
        limit = _broadcast(most, mass.ndim)
        # -sum p log p with p = w / mass; a single query, of limit 0, says nothing.
        entropy = mass.log() - log_mass / mass
        sinks[i].total.add_(torch.where((mass > 0) & (limit > 0), entropy / limit, 0.0))


def _broadcast(count: float | torch.Tensor, ndim: int) -> float | torch.Tensor:
    """A number, or one number for each batch row, in front of ndim - 1 further axes."""
    return count.view(-1, *[1] * (ndim - 1)) if isinstance(count, torch.Tensor) and count.ndim else count


def quantity_shape(spec: CaptureSpec, queries: int, keys: int) -> tuple[int, ...]:
    """Shape of the quantity without batch, steps, blocks and heads."""
    if spec.quantity == "weights":
        return queries, keys
    return (queries,) if spec.quantity == "row_mass" else (keys,)


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """What was captured.

    Attributes:
        values: float32, on the model's device. Axes in this order, those in brackets only where the spec says
            "each": (rows, [steps,] [blocks,] [heads,] queries, keys); without queries or keys where the
            quantity has none.
        axes: their names.
        spec: what was asked for.
        blocks: index of each captured block.
        sites: name of its attention module.
        steps: denoising step of each forward that was captured, None where no scheduler is known.
        grid: (frames, rows, columns) of the image tokens among the captured ones, or None.
    """

    values: torch.Tensor
    axes: tuple[str, ...]
    spec: CaptureSpec
    blocks: tuple[int, ...]
    sites: tuple[str, ...]
    steps: tuple[int | None, ...]
    grid: tuple[int, int, int] | None

    def on_grid(self) -> torch.Tensor:
        """The values with their image axis last and as (frames, rows, columns).

        Weights of image queries and text keys become (..., keys, F, H, W).

        Raises:
            ValueError: the values have no image axis, more than one, or not all tokens of a frame.
        """
        image = [axis for axis in ("query", "key") if self._is_image(axis)]
        if len(image) != 1 or self.grid is None:
            raise ValueError(
                f"values of axes {', '.join(self.axes)} (queries={self.spec.queries!r}, "
                f"keys={self.spec.keys!r}) do not lie on one grid of image tokens."
            )
        at = self.axes.index(image[0])
        if self.values.shape[at] != math.prod(self.grid):
            raise ValueError(
                f"{self.values.shape[at]} image tokens were chosen, which is no grid of {self.grid}; choose "
                "whole frames with only_frames."
            )
        return self.values.movedim(at, -1).unflatten(-1, self.grid)

    def _is_image(self, axis: str) -> bool:
        return axis in self.axes and (self.spec.queries if axis == "query" else self.spec.keys) == "image"
