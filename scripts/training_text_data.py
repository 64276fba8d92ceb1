"""Exercises for the training of the text model: mixed batches of one length, made on the device."""

import torch
from torch import Tensor

from diffctrl.zoo.tasks import Draw, Examples, sample

# Lookups are what the model is for, and what long rows are for; the other tasks are over in a short row. Sums
# need the most examples, above all those of numbers of different lengths; sorting is learnt last. Rows of 64
# hold no string of more than 29 characters: without sorting in rows of 128, 30 to 32 were never seen, and
# none was right.
_SHARES = {
    32: {"facts": 0.26, "copy": 0.08, "reverse": 0.09, "sort": 0.24, "add": 0.26, "scene": 0.07},
    64: {"facts": 0.32, "copy": 0.1, "reverse": 0.11, "sort": 0.26, "add": 0.15, "scene": 0.06},
    128: {"facts": 0.42, "copy": 0.12, "reverse": 0.13, "sort": 0.25, "add": 0.05, "scene": 0.03},
}
EVERY_TASK = 128
"""Rows of up to so many tokens hold all tasks."""


def task_counts(rows: int, tokens: int) -> dict[str, int]:
    """Rows of each task among `rows` of `tokens` tokens; they add up."""
    shares = next((shares for limit, shares in _SHARES.items() if tokens <= limit), {"facts": 1.0})
    counts = {name: int(rows * share) for name, share in shares.items()}
    counts["facts"] += rows - sum(counts.values())
    return counts


class ExerciseBatches:
    """A supply of batches in tensors that stay where they are, so that a captured step can read them.

    Args:
        tokens: S, tokens of a row.
        rows: B, rows of a batch.
        batches: batches in the supply; `refill` makes so many new ones.
        device: where they are made and kept.
    """

    def __init__(self, *, tokens: int, rows: int, batches: int, device: torch.device) -> None:
        self.tokens, self.rows, self.batches = tokens, rows, batches
        self._draw = Draw(device)
        self._counts = task_counts(rows * batches, tokens)
        self._supply = self._made()
        self._next = torch.zeros((), dtype=torch.int64, device=device)
        self._row = torch.arange(rows, device=device)

    def refill(self) -> None:
        """Put new exercises in the place of the old ones."""
        new = self._made()
        for name in ("ids", "start", "length", "task"):
            getattr(self._supply, name).copy_(getattr(new, name))
        self._next.zero_()

    def next(self) -> Examples:
        """The next batch; device work only. After `batches` of them the first comes again."""
        index = (self._next % self.batches) * self.rows + self._row
        self._next.add_(1)
        supply = self._supply
        chosen = (x.index_select(0, index) for x in (supply.ids, supply.start, supply.length, supply.task))
        return Examples(*chosen)

    def _made(self) -> Examples:
        return sample(self._counts, tokens=self.tokens, draw=self._draw)


def answer_offsets(examples: Examples) -> Tensor:
    """(B, S) int64: distance of every token from its row's first answer token, negative in the prompt."""
    place = torch.arange(examples.ids.shape[1], device=examples.ids.device)
    return place - examples.start[:, None]
