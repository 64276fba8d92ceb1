"""All heads that can be perturbed: what a search chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffctrl.softpag.heads import Head
from diffctrl.softpag.headset import Signature

if TYPE_CHECKING:
    from diffctrl.softpag.headhunt.jobs import Job


@dataclass(frozen=True, slots=True)
class Universe:
    """The candidates of a search; `diffctrl.processors.universe.universe_of` reads them off a model.

    Attributes:
        heads: ordered by (stack, layer, head), which is also how ties are broken. Stacks that the flat index
            counts come first and are named by it; others (SD3.5's second attention) by their own name.
        places: head -> (name of its attention module, index of the head there).
        signature: what identifies the model's shape.
        layers: number of layers in flat order; a head's depth for prefix reuse and for the heat map.
    """

    heads: tuple[Head, ...]
    places: dict[Head, tuple[str, int]]
    signature: Signature
    layers: int

    def depth(self, job: Job) -> int:
        """The first layer that a job perturbs; a job without heads comes last."""
        return min((head.layer for head in job.heads), default=self.layers)
