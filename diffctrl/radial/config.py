"""Settings of Radial Attention, and the pattern that is left of them once a model has filled the gaps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

PatternName = Literal["reference", "paper"]
BlockRule = Literal["reference", "hybrid", "cover", "exact"]
Adjacent = Literal["full", "half", "decay"]
WidthBase = Literal["P", "S"]

_CHOICES: dict[str, Any] = {
    "pattern": PatternName,
    "block_rule": BlockRule,
    "adjacent": Adjacent,
    "width_base": WidthBase,
}
# Runs this short come from step-distilled models: fewer dense steps, and the last one dense.
_SHORT_RUN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialConfig:
    """What is attended, and which steps and blocks stay dense. None takes the preset of the model.

    Args:
        pattern: "reference", the published code, which the paper's own sparsities were made with; "paper",
            its equation 4.
        block_rule: how the token band becomes blocks. "hybrid": own, adjacent and sink frames keep each block
            they touch, farther ones are voted on. "reference" votes on all, as the published code. "cover"
            keeps every block that the band touches. "exact" attends the band itself, pair by pair. None:
            "hybrid", with the paper's pattern "cover" (a vote would lose its thin diagonals).
        decay_factor: in (0, 1]: scales the width of the bands at two frames' distance and more, down to one
            block. Pattern "reference" only.
        sink: whether every query attends the whole first frame.
        adjacent: the neighbouring frames: "full", "half" (half-width S // 2, the published code until
            November 2025), "decay" (as all the others: sparser than published).
        width_base: what widths are fractions of: "P", the smallest power of two above the S tokens of a
            frame, as published, or "S" itself (no jump where S passes a power of two).
        block: side of a block in tokens. 128 is what the kernels want; on a GPU, multiples of 16.
        dense_steps: steps at the beginning of the run that attend all.
        dense_fraction: the same as a part of the run, rounded up.
        dense_last_steps: steps at its end that attend all. By default 0, and 1 in runs of up to 8 steps.
        dense_blocks: transformer blocks at the model's input that always attend all; in models with double
            and single blocks, the double blocks count first.

    Raises:
        ValueError: a value is out of range, or options contradict each other.

    Source: arXiv 2506.19852, and the code published with it, which differs from the paper.
    """

    pattern: PatternName = "reference"
    block_rule: BlockRule | None = None
    decay_factor: float | None = None
    sink: bool | None = None
    adjacent: Adjacent = "full"
    width_base: WidthBase = "P"
    block: int = 128
    dense_steps: int | None = None
    dense_fraction: float | None = None
    dense_last_steps: int | None = None
    dense_blocks: int | None = None

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(accepted) and not (name == "block_rule" and value is None):
                raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(get_args(accepted))}")
        if self.decay_factor is not None and not 0.0 < self.decay_factor <= 1.0:
            raise ValueError(f"decay_factor={self.decay_factor!r} is not in (0, 1]; 1 is the full width")
        if self.block < 1:
            raise ValueError(f"block={self.block!r} is not a number of tokens; 128 is what the kernels want")
        if self.pattern == "paper":
            for name, neutral in (("decay_factor", (None, 1.0)), ("adjacent", ("full",)),
                                  ("width_base", ("P",))):  # fmt: skip
                if getattr(self, name) not in neutral:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} belongs to pattern='reference'; the paper's "
                        "equation has no such option: leave it out, or set pattern='reference'"
                    )
        for name in ("dense_steps", "dense_last_steps", "dense_blocks"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value!r} is negative; 0 leaves none dense")
        if self.dense_fraction is not None:
            if self.dense_steps is not None:
                raise ValueError("dense_steps and dense_fraction say the same thing; give one of them")
            if not 0.0 <= self.dense_fraction <= 1.0:
                raise ValueError(f"dense_fraction={self.dense_fraction!r} is not in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Which pairs of tokens and which blocks are attended: what a mask is made from, and its key in caches.

    Fields as in `RadialConfig`, none of them open. `block` may be any positive number here.
    """

    pattern: PatternName = "reference"
    block_rule: BlockRule = "hybrid"
    decay_factor: float = 1.0
    sink: bool = False
    adjacent: Adjacent = "full"
    width_base: WidthBase = "P"
    block: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseParts:
    """Which steps and blocks attend all.

    Attributes:
        steps: at the beginning, as a number, or None where `fraction` says it.
        fraction: of the run, rounded up.
        published: whether the fraction is a model's preset and not asked for: at most 2 steps of short runs.
        last_steps: at the end; None for 0, and 1 in short runs.
        blocks: at the model's input.
    """

    steps: int | None = None
    fraction: float = 0.0
    published: bool = False
    last_steps: int | None = None
    blocks: int = 0

    @property
    def always(self) -> bool:
        """Whether no step is sparse, whatever the run."""
        return self.steps is None and self.fraction == 1.0

    @property
    def never(self) -> bool:
        """Whether every step is sparse, whatever the run."""
        return not (self.fraction if self.steps is None else self.steps) and self.last_steps == 0

    def first(self, total: int) -> int:
        """Dense steps at the beginning of a run of `total` steps.

        >>> [DenseParts(fraction=0.24).first(total) for total in (4, 8, 50)]
        [1, 2, 12]
        """
        if self.steps is not None:
            return min(self.steps, total)
        # 0.24 * 50 is a little more than 12 in floating point.
        steps = math.ceil(self.fraction * total - 1e-9)
        return min(steps, 2) if self.published and total <= _SHORT_RUN else steps

    def last(self, total: int) -> int:
        """Dense steps at its end."""
        if self.last_steps is not None:
            return min(self.last_steps, total)
        return int(1 < total <= _SHORT_RUN)

    def is_dense(self, step: int, total: int) -> bool:
        """Whether step number `step` of `total` (from 0) attends all."""
        return step < self.first(total) or step >= total - self.last(total)

    def share(self, total: int, blocks: int) -> float:
        """The share of (step, block) pairs that attend all."""
        dense = min(total, self.first(total) + self.last(total)) / total
        return 1.0 - (1.0 - dense) * (1.0 - min(self.blocks, blocks) / blocks)
