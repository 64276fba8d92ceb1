"""Leaving out candidates that cannot be chosen any more: the same result for less.

Values have bounds. A candidate's mean over all pairs is at most what it has so far plus the highest value on
each pair that is left; once that is below what enough others reach even with the lowest value on theirs, no
outcome can bring it among the chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diffctrl.softpag.heads import Head

# Parts of the pairs after which it is decided who goes on.
_WAVES = 8


class Race:
    """Which candidates are scored next, on how many of the pairs.

    Args:
        candidates: in the order that breaks ties.
        base: the current set's value on each pair. Where it does badly most candidates do, so that these
            pairs come first: that is where points are lost.
        bounds: least and largest value.
        top: candidates that will be chosen.
    """

    def __init__(
        self, candidates: Sequence[Head], base: Sequence[float], bounds: tuple[float, float], top: int
    ) -> None:
        self.order = sorted(range(len(base)), key=lambda index: _or(base[index], -math.inf))
        self.alive = list(candidates)
        self._low, self._high = bounds
        self._top, self._count = top, len(base)
        self._step = math.ceil(len(base) / _WAVES)
        self._values: dict[Head, list[float]] = {head: [] for head in candidates}

    def next(self) -> tuple[list[Head], int]:
        """(candidates, pairs): who is scored next, on how many pairs of `order`; nobody when it is decided.

        Those that lead are finished first, as they decide what the others must reach.
        """
        running = [head for head in self.alive if len(self._values[head]) < self._count]
        leaders = sorted(self.alive, key=lambda head: -_or(self._mean(head), -math.inf))[: self._top]
        begun = [head for head in leaders if head in running and self._values[head]]
        if begun or not running:
            return begun, self._count
        return running, min(len(self._values[running[0]]) + self._step, self._count)

    def tell(self, values: Mapping[Head, list[float]]) -> None:
        """The values of who was scored, in `order`; leaves out who cannot be chosen any more."""
        self._values |= values
        reached = sorted((self._bound(head, self._low) for head in self.alive), reverse=True)
        needed = reached[self._top - 1] if len(reached) >= self._top else -math.inf
        if needed > -math.inf:
            needed -= 1e-9 * self._count * (self._high - self._low)  # sums of another order
            self.alive = [head for head in self.alive if self._bound(head, self._high) >= needed]

    def left_out(self) -> dict[Head, tuple[int, float | None]]:
        """Head -> (pairs that it was scored on, what its mean is at most; None where it has no score)."""
        found: dict[Head, tuple[int, float | None]] = {}
        for head, values in self._values.items():
            if head not in self.alive:
                bound = self._bound(head, self._high) / self._count
                found[head] = len(values), bound if math.isfinite(bound) else None
        return found

    def _mean(self, head: Head) -> float:
        values = self._values[head]
        return math.fsum(values) / len(values) if values else -math.inf

    def _bound(self, head: Head, rest: float) -> float:
        """The sum over all pairs where those that are left give `rest`; -inf for a candidate with a NaN."""
        values = self._values[head]
        return _or(math.fsum(values) + (self._count - len(values)) * rest, -math.inf)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
