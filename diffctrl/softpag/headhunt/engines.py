"""Who carries units out: this process, several processes, or the ranks of an `accelerate launch`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffctrl.processes import launched, leave_group_at_exit
from diffctrl.softpag.headhunt.jobs import Pair, Unit
from diffctrl.softpag.headhunt.scoring import Scorer, Values
from diffctrl.softpag.heads import Head

# (unit, its values, whether they are new: values that another process has logged itself are not).
OnUnit = Callable[[Unit, Values, bool], None]


class Sampler(Protocol):
    """Makes pictures."""

    def sample(self, pairs: Sequence[Pair], sets: Sequence[tuple[Head, ...]]) -> Any:
        """One picture per pair, with the set of perturbed heads at its place."""
        ...


@dataclass(slots=True)
class Evaluator:
    """Samples a unit and scores it in memory; one per process.

    Attributes:
        closing: what is undone when the search is over (controls on a pipeline).
    """

    sampler: Sampler
    scorer: Scorer
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def begin(self, unit: Unit) -> Callable[[], Values]:
        """Sample a unit and hand its pictures to the scorer; the values are asked for later."""
        pairs = [job.pair for job in unit.jobs]
        images = self.sampler.sample(pairs, [job.heads for job in unit.jobs])
        return self.scorer.submit(images, [pair.prompt for pair in pairs])

    def evaluate(self, unit: Unit) -> Values:
        return self.begin(unit)()

    def close(self) -> None:
        self.scorer.close()
        self.closing.close()


# Called in the process that will evaluate, with its index; must be picklable for several processes.
Factory = Callable[[int], Evaluator]


class Engine(Protocol):
    """Carries units out in any order. Its context ends with the search."""

    main: bool  # whether this process writes the results
    lanes: int  # units that are carried out at the same time
    writer: str  # name of this process's log file

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exception: object) -> None: ...

    def ready(self) -> None:
        """Wait until every process has read the log; before that, none may write."""
        ...

    def run(self, units: Sequence[Unit], on_unit: OnUnit) -> None: ...


class InProcess:
    """A plain loop. The evaluator is made when the first unit needs it: a finished search loads no model."""

    main, writer, lanes = True, "0", 1

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._evaluator: Evaluator | None = None

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None

    def ready(self) -> None:
        pass

    def _evaluated(self, units: Sequence[Unit], index: int = 0) -> Iterator[tuple[Unit, Values]]:
        """The units with their values, in order; a few are sampled before the first of them is scored."""
        if self._evaluator is None and units:
            self._evaluator = self._factory(index)
        begun: deque[tuple[Unit, Callable[[], Values]]] = deque()
        for unit in units:
            assert self._evaluator is not None
            begun.append((unit, self._evaluator.begin(unit)))
            if len(begun) > self._evaluator.scorer.ahead:
                first, values = begun.popleft()
                yield first, values()
        for unit, values in begun:
            yield unit, values()

    def run(self, units: Sequence[Unit], on_unit: OnUnit) -> None:
        for unit, values in self._evaluated(units):
            on_unit(unit, values, True)


class Processes:
    """Several processes of this machine that take the next unit as they become free."""

    main, writer = True, "0"

    def __init__(self, factory: Factory, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} is not a whole number from 1 on")
        self._factory, self._workers = factory, workers
        self.lanes = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def ready(self) -> None:
        pass

    def run(self, units: Sequence[Unit], on_unit: OnUnit) -> None:
        if not units:
            return
        if self._pool is None:
            # Spawned, not forked: CUDA does not survive a fork, nor do torch's threads.
            context = multiprocessing.get_context("spawn")
            taken = context.Value("i", 0)
            self._pool = ProcessPoolExecutor(
                self._workers, context, _start_worker, (self._factory, taken, self._workers)
            )
        futures = {self._pool.submit(_work, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                on_unit(futures[future], future.result(), True)
        except BaseException:
            for future in futures:
                future.cancel()
            raise


_worker: Evaluator | None = None


def _start_worker(factory: Factory, taken: Any, workers: int) -> None:
    global _worker
    import torch

    with taken.get_lock():
        index, taken.value = taken.value, taken.value + 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers)))
    _worker = factory(index)


def _work(unit: Unit) -> Values:
    if _worker is None:
        raise RuntimeError("this worker was not started with a factory")
    return _worker.evaluate(unit)


class Ranks(InProcess):
    """The ranks of `accelerate launch` (or torchrun), over one or several machines.

    Every rank runs the whole search and evaluates its share of each round. The units of a round cost the
    same, so that equal shares end together. The log folder must be one that all ranks see.
    """

    def __init__(self, factory: Factory) -> None:
        super().__init__(factory)
        import torch
        from accelerate import PartialState

        # Without a GPU it must be told, or it starts no process group and each rank would search alone.
        self._state = PartialState(cpu=not torch.cuda.is_available())
        leave_group_at_exit()
        if launched() and self._state.num_processes == 1:
            raise RuntimeError(
                "this is one of several ranks, but accelerate started no process group, so that every rank "
                "would do all of the work; start with `accelerate launch`"
            )
        self.main = self._state.is_main_process
        self.writer = str(self._state.process_index)
        self.lanes = self._state.num_processes

    def ready(self) -> None:
        self._state.wait_for_everyone()

    def run(self, units: Sequence[Unit], on_unit: OnUnit) -> None:
        from accelerate.utils import gather_object

        # Not `split_between_processes`: where units are few, it hands the last one to several ranks.
        places = range(self._state.process_index, len(units), self._state.num_processes)
        mine: list[tuple[int, Values]] = []
        own = self._evaluated([units[index] for index in places], self._state.local_process_index)
        for index, (unit, values) in zip(places, own, strict=True):
            mine.append((index, values))
            on_unit(unit, values, True)
        for index, values in gather_object(mine):
            on_unit(units[index], values, False)
