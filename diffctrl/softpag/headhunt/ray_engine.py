"""Ray's actors as the workers of a search, over one machine or a cluster. Needs the extra `ray`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from diffctrl.softpag.headhunt.engines import Factory, OnUnit
from diffctrl.softpag.headhunt.jobs import Unit
from diffctrl.softpag.headhunt.scoring import Values


class RayActors:
    """Actors that each load the model once and take the next unit as they become free.

    Args:
        factory: makes the evaluator in each actor; picklable.
        workers: actors.
        gpus: cards for each actor. Ray shows an actor its own cards alone, so that each is told index 0.
        address: of a running cluster; None starts one on this machine, which ends with the search.

    Values come back to this process, which alone writes the log.
    """

    main, writer = True, "0"

    def __init__(
        self, factory: Factory, workers: int, *, gpus: float = 0, address: str | None = None
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} is not a whole number from 1 on")
        self._factory, self._workers, self.lanes = factory, workers, workers
        self._gpus, self._address = gpus, address
        self._actors: list[Any] = []
        self._started = False

    def __enter__(self) -> RayActors:
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started:
            ray.shutdown()
            self._started = False

    def ready(self) -> None:
        pass

    def _start(self, count: int) -> None:
        import ray

        if not ray.is_initialized():
            # Actors of this machine import from where this process does; on others diffctrl is installed.
            path = os.pathsep.join(part or os.getcwd() for part in sys.path)
            here = {"env_vars": {"PYTHONPATH": path}} if self._address is None else None
            ray.init(address=self._address, runtime_env=here, log_to_driver=False, include_dashboard=False)
            self._started = True
        remote: Any = ray.remote(num_cpus=1, num_gpus=self._gpus)(_Actor)
        self._actors = [remote.remote(self._factory) for _ in range(min(self._workers, count))]

    def run(self, units: Sequence[Unit], on_unit: OnUnit) -> None:
        """Carry units out; an actor that fails ends the search with its error."""
        if not units:
            return
        if not self._actors:
            self._start(len(units))
        free, running = list(self._actors), {}
        for unit in units:
            if not free:
                free.append(self._finished(running, on_unit))
            actor = free.pop()
            running[actor.evaluate.remote(unit)] = unit, actor
        while running:
            self._finished(running, on_unit)

    @staticmethod
    def _finished(running: dict[Any, tuple[Unit, Any]], on_unit: OnUnit) -> Any:
        """Wait for one unit and report it; returns the actor that is free now."""
        import ray

        (done,), _ = ray.wait(list(running), num_returns=1)
        unit, actor = running.pop(done)
        on_unit(unit, ray.get(done), True)
        return actor


class _Actor:
    def __init__(self, factory: Factory) -> None:
        import torch

        torch.set_num_threads(1)
        self._evaluator = factory(0)

    def evaluate(self, unit: Unit) -> Values:
        return self._evaluator.evaluate(unit)
