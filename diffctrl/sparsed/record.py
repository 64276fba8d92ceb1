"""What a generation under SparseD did, for `stats()`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.cost import Prediction
from diffctrl.sparsed.layout import Layout
from diffctrl.sparsed.patterns import Pattern
from diffctrl.sparsed.schedule import Phase


class Record:
    """Counts of one generation; kept until the next begins.

    Attributes:
        patterns: of each layer, as last taken.
        forwards: of the model.
    """

    def __init__(
        self,
        config: SparseDConfig,
        layout: Layout | None = None,
        prediction: Prediction | None = None,
        dense: str | None = None,
    ) -> None:
        self.config, self.layout, self.prediction, self.dense = config, layout, prediction, dense
        self.patterns: dict[int, Pattern] = {}
        self.forwards = 0
        self._phases: Counter[Phase] = Counter()
        self._builds = 0
        self._milliseconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def enter(self, step: int, phase: Phase) -> None:
        if step == 0:
            self._phases.clear()
        self._phases[phase] += 1

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Times the taking of a pattern, on a GPU without waiting for it."""
        self._builds += 1
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        began = time.perf_counter()
        yield
        self._milliseconds += 1e3 * (time.perf_counter() - began)

    def build_milliseconds(self) -> float:
        """Of all patterns taken; waits for a GPU to have done them."""
        for start, end in self._events:
            end.synchronize()
            self._milliseconds += start.elapsed_time(end)
        self._events.clear()
        return self._milliseconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of interest.

        "steps" per phase; "pattern_density", share of the real (query, key) pairs that the patterns keep,
        mean over layers; "retained_mass", share of the dense attention in them; "approximate", whether
        scores were estimated, and with them that share; "stays_dense", the reason why the run is dense to
        its end, or None; the predicted gains; "build_ms" and "builders"; sizes of the patterns, packed and
        as kernels read them.
        """
        patterns = list(self.patterns.values())
        phases = {phase.value: self._phases[phase] for phase in Phase}
        return {
            "forwards": self.forwards,
            "steps": phases,
            "pattern_density": _mean([p.lists.density() for p in patterns]),
            "retained_mass": _mean([float(p.mass.mean()) for p in patterns]),
            "approximate": self.config.approximate,
            "stays_dense": self.dense,
            "predicted_step_gain": None if self.prediction is None else self.prediction.step_gain,
            "predicted_run_gain": None if self.prediction is None else self.prediction.run_gain,
            "patterns_taken": self._builds,
            "build_ms": self.build_milliseconds(),
            "builders": sorted({p.builder for p in patterns}),
            "pattern_bytes": sum(p.packed_bytes for p in patterns),
            "list_bytes": sum(p.list_bytes for p in patterns),
            "config": asdict(self.config),
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
