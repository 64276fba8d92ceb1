"""Settings of SoftPAG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffctrl.softpag.heads import Head, parse_heads

Scope = Literal["joint", "image_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPAGConfig:
    """Which heads are perturbed, how strongly, and how far the sample is pushed away from the result.

    Args:
        heads: the heads, as in 'L3H1,L4' or an iterable; None takes every head of the layer at 3/8 of the
            depth (layer 9 of 24 in the paper's sweeps over u), in a UNet of the middle block (as PAG does).
        u: perturbation strength in [0, 1]: A' = (1 - u) A + u I. 0 is the stock model, 1 is PAG.
        w: guidance scale >= 0 in e + s (c - e) + w (c - p); 0 turns the guidance off.
        scope: "joint" perturbs text and image queries (the paper's rule), "image_rows" image queries only.
        start_fraction, stop_fraction: the half-open part of the run that is guided.

    Raises:
        ValueError: a value is out of range.
    """

    heads: tuple[Head, ...] | str | None = None
    u: float = 0.5
    w: float = 3.0
    scope: Scope = "joint"
    start_fraction: float = 0.0
    stop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", parse_heads(self.heads))
            if not self.heads:
                raise ValueError("heads is empty; name at least one head, e.g. 'L3H1', or leave it out")
        if not 0.0 <= self.u <= 1.0:
            raise ValueError(f"u={self.u!r} is not in [0, 1]; 0 is the stock model, 1 is full PAG")
        if not (math.isfinite(self.w) and self.w >= 0.0):
            raise ValueError(f"w={self.w!r} is not a finite number >= 0")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r} is unknown; accepted: {', '.join(get_args(Scope))}")
        if not 0.0 <= self.start_fraction < self.stop_fraction <= 1.0:
            raise ValueError(
                f"the window [{self.start_fraction!r}, {self.stop_fraction!r}) is not inside [0, 1) or "
                "is empty"
            )
