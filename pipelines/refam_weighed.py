"""Expressions about pictures on their way through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffctrl.pipelines.refam_finish import Seen
from diffctrl.pipelines.refam_readers import TextRows
from diffctrl.refam import Scored, Weights


@dataclass(slots=True, eq=False)
class Weighed:
    """One expression about one picture, on its way.

    Attributes:
        seen: the picture.
        latents: (C, ...) of it.
        rows: the expression as the model reads it.
        seconds: of the parts so far.
        weights: the attention, once it was read.
        scored: what it says, on the CPU: the heat map with what it was made of, and the map of each token.
    """

    seen: Seen
    latents: Tensor
    rows: TextRows
    seconds: dict[str, float] = field(default_factory=dict)
    weights: Weights | None = None
    scored: tuple[Scored, Tensor] | None = None

    @property
    def bucket(self) -> tuple[Any, ...]:
        return (tuple(self.latents.shape), len(self.rows.table))


def batches(tasks: Sequence[Weighed], size: int) -> Iterator[list[Weighed]]:
    """Tasks of one shape, `size` at most: they share a forward."""
    buckets: dict[tuple[Any, ...], list[Weighed]] = {}
    for task in tasks:
        buckets.setdefault(task.bucket, []).append(task)
    for bucket in buckets.values():
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size]
