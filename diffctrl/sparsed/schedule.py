"""Which steps are dense, which take a pattern, which are sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from diffctrl.sparsed.config import SparseDConfig

EPS = 1e-9  # 0.3 * 10 is 3.0000000000000004: without it a ceiling would keep one block or step more


class Phase(Enum):
    """What attention does in a step. BUILD is dense and takes the pattern from its queries and keys."""

    DENSE = "dense"
    BUILD = "build"
    SPARSE = "sparse"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The step rule of one run.

    Attributes:
        total: steps of the run.
        first_build: the step that takes the pattern; the run is dense to its end where it is the last one.
        builds: all steps that take a pattern.
    """

    total: int
    first_build: int
    builds: frozenset[int]

    @classmethod
    def of(cls, config: SparseDConfig, total: int, blocks: int = 1) -> Schedule:
        """The rule for `total` steps, which `blocks` semi-autoregressive blocks share equally.

        The paper ("strict"): D = max(1, ceil(skip T)) dense steps, the pattern from step D - 1. The authors'
        code: e = int(T skip) + 1, dense up to and in step e, the pattern from step e.

        Raises:
            ValueError: the numbers are no steps, or do not divide.

        >>> Schedule.of(SparseDConfig(), 128).count()
        {<Phase.DENSE: 'dense'>: 25, <Phase.BUILD: 'build'>: 1, <Phase.SPARSE: 'sparse'>: 102}
        """
        if total < 1 or blocks < 1 or total % blocks:
            raise ValueError(
                f"{total} steps in {blocks} blocks: both must be at least 1, and the blocks "
                "share the steps equally"
            )
        if config.mode == "authors":
            first = int(total * config.skip) + 1
        else:
            first = max(1, math.ceil(config.skip * total - EPS)) - 1
        if config.rests or first >= total - 1:  # nothing would be left to be sparse
            return cls(total, total - 1, frozenset())
        builds = {first}
        if config.refresh == "every_n":
            assert config.refresh_steps is not None
            builds |= set(range(first, total, config.refresh_steps))
        elif config.refresh == "per_block":
            per_block = total // blocks
            builds |= {start for start in range(0, total, per_block) if start > first}
        return cls(total, first, frozenset(builds))

    def phase(self, step: int) -> Phase:
        if step in self.builds:
            return Phase.BUILD
        return Phase.SPARSE if self.builds and step > self.first_build else Phase.DENSE

    def count(self) -> dict[Phase, int]:
        """How many steps of each phase the run has."""
        builds, last = len(self.builds), self.total - 1 - self.first_build
        sparse = last - (builds - 1) if builds else 0
        return {Phase.DENSE: self.total - builds - sparse, Phase.BUILD: builds, Phase.SPARSE: sparse}


class CommitTrigger:
    """The step rule where the number of steps is not known: dense until `skip` of the generation is
    committed.

    The first step that begins with so much committed takes the pattern; `refresh` counts from there.
    """

    def __init__(self, config: SparseDConfig) -> None:
        self._config = config
        self._builds: set[int] = set()
        self._first: int | None = None
        self._block: int | None = None

    def phase(self, step: int, committed: float, block: int | None) -> Phase:
        """The phase of a step that begins with this share committed, in this block where `refresh` asks."""
        if self._config.rests or (self._first is None and committed < self._config.skip):
            return Phase.DENSE
        if self._is_build(step, block):
            self._builds.add(step)
            self._first = step if self._first is None else self._first
            self._block = block
        return Phase.BUILD if step in self._builds else Phase.SPARSE

    def _is_build(self, step: int, block: int | None) -> bool:
        if self._first is None:
            return True
        if self._config.refresh == "every_n":
            return (step - self._first) % (self._config.refresh_steps or 1) == 0
        return self._config.refresh == "per_block" and block != self._block
