"""Who scores the pictures: this process, or several beside it while the next batch is sampled."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from diffctrl.softpag.headhunt.objectives import Objective
from diffctrl.softpag.headhunt.ranking import Goal, column_of, rows_of

Values = list[tuple[float, ...]]
_CHUNK = 8  # pictures that one process gets at a time


class Scorer(Protocol):
    """Scores a batch of pictures; the values are asked for later."""

    ahead: int  # batches that may be sampled before the values of the first of them are asked for

    def submit(self, images: Any, prompts: Sequence[str]) -> Callable[[], Values]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Here:
    """Scores at once, in this process."""

    goal: Goal
    ahead: int = 0

    def submit(self, images: Any, prompts: Sequence[str]) -> Callable[[], Values]:
        values = self.goal.score(images, prompts)
        return lambda: values

    def close(self) -> None:
        pass


class Beside:
    """Scores the parts of a goal that read picture after picture in processes of their own.

    Other parts (learned scorers on the GPU) run here, at once. The values do not depend on it.

    Args:
        goal: whose parts must be picklable where they are `apart`.
        workers: how many, or a pool of them, which several searches share and which this leaves open.
    """

    ahead = 2

    def __init__(self, goal: Goal, workers: int | Executor) -> None:
        self._goal, self._owns = goal, not isinstance(workers, Executor)
        self._pool = workers if isinstance(workers, Executor) else scoring_pool(workers)

    def submit(self, images: Any, prompts: Sequence[str]) -> Callable[[], Values]:
        """Hand a batch over; `images` (N, 3, H, W) on any device."""
        apart = [part for part in self._goal.parts if getattr(part, "apart", False)]
        parcels: list[tuple[Any, list[str]]] = []
        if apart:
            pictures = images.float().cpu().numpy()
            for start in range(0, len(prompts), _CHUNK):
                part = slice(start, start + _CHUNK)
                parcels.append((pictures[part], list(prompts[part])))
        columns: list[list[float] | list[Future[list[float]]]] = [
            [self._pool.submit(_score, part, *parcel) for parcel in parcels]
            if part in apart
            else column_of(part, images, prompts)
            for part in self._goal.parts
        ]
        return lambda: rows_of([_collected(column) for column in columns])

    def close(self) -> None:
        if self._owns:
            self._pool.shutdown(wait=True, cancel_futures=True)


def scoring_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that score; spawned, not forked, as the parent holds CUDA and threads."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread)


def scorer_of(goal: Goal, workers: int | Executor) -> Scorer:
    """`Beside` where there is something to do beside, else `Here`."""
    apart = any(getattr(part, "apart", False) for part in goal.parts)
    return Beside(goal, workers) if workers and apart else Here(goal)


def _collected(column: list[Any]) -> list[float]:
    if column and isinstance(column[0], Future):
        return [value for future in column for value in future.result()]
    return column


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _score(part: Objective, pictures: Any, prompts: list[str]) -> list[float]:
    import torch

    return column_of(part, torch.from_numpy(pictures), prompts)
