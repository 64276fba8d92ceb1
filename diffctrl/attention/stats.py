"""What the engine did: calls per kernel, densities, fallbacks with their reasons."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_NUMBERS = itertools.count(1)
_BY_NUMBER: weakref.WeakValueDictionary[int, EngineStats] = weakref.WeakValueDictionary()


@dataclass(slots=True, eq=False, weakref_slot=True)
class EngineStats:
    """Counts of one applied model. Recording never changes what is computed.

    Dense calls inside a compiled region are traced into the graph and are not counted; block-sparse ones are.

    >>> stats = EngineStats()
    >>> stats.record("gathered", density=0.25, kernel_density=0.3)
    >>> stats.as_dict()["density"]
    0.25
    """

    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    captures: Counter[str] = field(default_factory=Counter)
    sparse_calls: int = 0
    density_sum: float = 0.0
    kernel_density_sum: float = 0.0
    number: int = field(default_factory=lambda: next(_NUMBERS))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        # Compiled regions hand a number to the custom op, which cannot take a Python object.
        _BY_NUMBER[self.number] = self

    def record(self, kernel: str, density: float | None = None, kernel_density: float | None = None) -> None:
        """One call of `kernel`; densities for block-sparse calls only."""
        with self._lock:
            self.calls[kernel] += 1
            if density is not None:
                self.sparse_calls += 1
                self.density_sum += density
                self.kernel_density_sum += density if kernel_density is None else kernel_density

    def record_fallback(self, reason: str) -> None:
        with self._lock:
            self.fallbacks[reason] += 1

    def record_capture(self, route: str) -> None:
        """Weights of one call were captured by this route."""
        with self._lock:
            self.captures[route] += 1

    def reset(self) -> None:
        with self._lock:
            self.calls.clear()
            self.fallbacks.clear()
            self.captures.clear()
            self.sparse_calls, self.density_sum, self.kernel_density_sum = 0, 0.0, 0.0

    def as_dict(self) -> dict[str, Any]:
        """calls and fallbacks; mean density over all calls (dense ones count 1), and over the sparse ones."""
        with self._lock:
            calls, sparse = sum(self.calls.values()), self.sparse_calls
            dense = calls - sparse
            return {
                "calls": dict(self.calls),
                "dense_calls": dense,
                "sparse_calls": sparse,
                "density": (self.density_sum + dense) / calls if calls else None,
                "sparse_density": self.density_sum / sparse if sparse else None,
                "kernel_density": self.kernel_density_sum / sparse if sparse else None,
                "fallbacks": dict(self.fallbacks),
                "captures": dict(self.captures),
            }


def stats_by_number(number: int) -> EngineStats | None:
    return _BY_NUMBER.get(number)
