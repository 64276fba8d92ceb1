"""Leaving out candidates that cannot be chosen any more: the same result for less.

Values have bounds. A candidate's mean over all pairs is at most what it has so far with the highest value on
each pair that is left; once that is below what enough others have reached, no outcome can bring it among the
chosen.

What is expected of a picture decides when it is scored, never whether its candidate is left out. The pairs on
which a candidate should do badly come first for it, as that is where points are lost, and no more of them are
asked for than should be its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from diffctrl.softpag.heads import Head

# A candidate, and the place of a pair.
Cell = tuple[Head, int]
# Share of the pairs on which all are scored before anything is expected of one of them.
_FIRST = 1 / 16


class Race:
    """Which pictures are scored next.

    Args:
        candidates: in the order that breaks ties.
        base: the current set's value on each pair.
        bounds: least and largest value.
        top: candidates that will be chosen.
        before: values of candidates in the round before, by pair; what was not scored there is not in it.
        floor: a mean that the one to be chosen must exceed, or none is; None for no such rule.
        batch: pictures that are sampled together; what is asked for fills whole batches where it can.

    Attributes:
        alive: candidates that can still be chosen.
        values: what is known of each, by pair.
    """

    def __init__(
        self,
        candidates: Sequence[Head],
        base: Sequence[float],
        bounds: tuple[float, float],
        top: int,
        *,
        before: Mapping[Head, Mapping[int, float]] | None = None,
        floor: float | None = None,
        batch: int = 1,
    ) -> None:
        self.alive = list(candidates)
        self._place = {head: place for place, head in enumerate(candidates)}
        self._low, self._high = bounds
        self._top, self._count, self._batch = top, len(base), batch
        self._base, self._before, self._floor = list(base), dict(before or {}), floor
        self.values: dict[Head, dict[int, float]] = {head: {} for head in candidates}
        self._leave()

    def next(self) -> list[Cell]:
        """What is scored next; nothing when it is decided.

        Candidates that lead are finished, as they decide what the others must reach; of the others those
        pictures are asked for that are expected to leave them out.
        """
        expected = self._expected()
        queues = {
            head: sorted(expected[head], key=lambda pair, own=expected[head]: own[pair])
            for head in self.alive
        }
        if not any(queues.values()):
            return []
        hopes = {head: self._sum(head) + math.fsum(expected[head].values()) for head in self.alive}
        leaders = sorted(self.alive, key=lambda head: -hopes[head])[: self._top]
        reach = min(hopes[head] for head in leaders)
        known = bool(self._before) or any(self.values.values())
        asked: list[tuple[int, Head, int]] = []  # (how soon it is wanted, candidate, pair)
        later: list[tuple[int, Head, int]] = []
        for head, queue in queues.items():
            count = math.ceil(self._count * _FIRST)
            if known:
                count = len(queue) if head in leaders else self._until_out(head, queue, expected[head], reach)
            for rank, pair in enumerate(queue):
                soon = 0 if head in leaders and known else rank
                (asked if rank < count else later).append((soon, head, pair))
        asked.sort(key=lambda each: each[0])
        later.sort(key=lambda each: each[0])
        whole = len(asked) // self._batch * self._batch
        chosen = asked[:whole] if whole else [*asked, *later][: self._batch]
        return [(head, pair) for _, head, pair in chosen]

    def tell(self, values: Mapping[Cell, float]) -> None:
        """The values of what was asked for; leaves out who cannot be chosen any more."""
        for (head, pair), value in values.items():
            self.values[head][pair] = value
        self._leave()

    def left_out(self) -> dict[Head, tuple[int, float | None]]:
        """Head -> (pairs that it was scored on, what its mean is at most; None where it has no score)."""
        found: dict[Head, tuple[int, float | None]] = {}
        for head, values in self.values.items():
            if head not in self.alive:
                bound = self._mean(head)
                found[head] = len(values), bound if math.isfinite(bound) else None
        return found

    def _leave(self) -> None:
        """Leave out who cannot be chosen any more.

        Only who is scored on every pair sets what the others must reach: a picture that is left may have no
        score. `math.fsum` rounds the exact sum, so that a bound is never on the wrong side of the mean that
        the whole row would have, and equal means are left to the order of the candidates.
        """
        done = [head for head in self.alive if len(self.values[head]) == self._count]
        reached = sorted(((self._mean(head), -self._place[head]) for head in done), reverse=True)
        if len(reached) >= self._top and (needed := reached[self._top - 1])[0] > -math.inf:
            self.alive = [head for head in self.alive if (self._mean(head), -self._place[head]) >= needed]
        if self._floor is not None:
            above = [head for head in self.alive if self._mean(head) > self._floor]
            # Where none is, the likeliest is still scored, so that the search can say what it missed by.
            self.alive = above or sorted(self.alive, key=lambda head: -self._mean(head))[:1]

    def _mean(self, head: Head) -> float:
        """The mean over all pairs at most, full marks on those that are left; -inf with a NaN among them."""
        values = self.values[head]
        total = math.fsum([*values.values(), *[self._high] * (self._count - len(values))])
        return -math.inf if math.isnan(total) else total / self._count

    def _sum(self, head: Head) -> float:
        return math.fsum(self.values[head].values())

    def _until_out(
        self, head: Head, queue: Sequence[int], expected: Mapping[int, float], reach: float
    ) -> int:
        """Half of the pictures that should leave a candidate out; half of all where it should stay.

        Half, because asking again costs little, and a picture that was not needed does.
        """
        bound = self._sum(head) + len(queue) * self._high
        for count, pair in enumerate(queue, 1):
            bound -= self._high - expected[pair]
            if bound < reach:
                return math.ceil(count / 2)
        return math.ceil(len(queue) / 2)

    def _expected(self) -> dict[Head, dict[int, float]]:
        """Candidate -> the values that it should have on the pairs that are left.

        A pair's mean, moved by how the candidate did on others, and what it had there in the round before.
        """
        columns = [[value] for value in self._base]
        for row in [*self._before.values(), *self.values.values()]:
            for pair, value in row.items():
                columns[pair].append(value)
        middle = (self._low + self._high) / 2
        means = [_mean_of(column, middle) for column in columns]
        found = {}
        for head in self.alive:
            values, before = self.values[head], self._before.get(head, {})
            apart = [value - means[pair] for pair, value in values.items() if not math.isnan(value)]
            shift = math.fsum(apart) / (len(apart) + 1)
            found[head] = {
                pair: min(max(means[pair] + shift, self._low), self._high)
                if pair not in before
                else (min(max(means[pair] + shift, self._low), self._high) + before[pair]) / 2
                for pair in range(self._count)
                if pair not in values
            }
        return found


def _mean_of(values: Iterable[float], otherwise: float) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else otherwise
