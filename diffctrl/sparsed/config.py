"""Settings of SparseD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffctrl.errors import nearest

Mode = Literal["strict", "authors"]
ScoreScale = Literal["head_dim", "authors"]
Refresh = Literal["none", "per_block", "every_n"]
Trigger = Literal["step", "committed"]
Share = Literal["query_head", "kv_group"]
Builder = Literal["exact", "fused", "chunked", "sampled", "mean"]

_CHOICES: dict[str, Any] = {
    "mode": Mode,
    "score_scale": ScoreScale,
    "refresh": Refresh,
    "trigger": Trigger,
    "share": Share,
    "builder": Builder,
}
APPROXIMATE = ("sampled", "mean")
LARGEST_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseDConfig:
    """What is kept of the attention of a diffusion language model, from which step on, and how that is found.

    Source: SparseD, arXiv 2509.24014 (ICLR 2026). Defaults are the authors' for long contexts; for short ones
    they use select=0.5 with block_size=32, which is a quality setting and saves little time.

    Args:
        select: in (0, 1], the share of key blocks that each query block keeps of each group (prompt,
            generation). 1 is dense attention.
        block_size: tokens of a block, a power of two from 2 to 128; kernels on a GPU need 16 or more.
        skip: in [0, 1], the first part of the steps that stays dense; the pattern is taken at its end. 1 is
            dense to the end.
        mode: "strict" is the paper's rule. "authors" repeats their code: prompt blocks compete with
            generation blocks, each group keeps up to one block more, one step more is dense.
        isolated: False ranks all blocks together, without the two groups; for ablations, "strict" only.
        score_scale: what scores are divided by while blocks are ranked: "head_dim" is sqrt(head dim), as in
            the attention itself; "authors" is the sqrt(number of heads) of their code for LLaDA.
        refresh: when the pattern is taken again: never ("none"), in the first step of each
            semi-autoregressive block ("per_block"), or every `refresh_steps` steps ("every_n"). Such a step
            is dense.
        refresh_steps: for "every_n", >= 1.
        trigger: what ends the dense part: the step number ("step"), or the share of generation tokens that
            are committed ("committed"), for decoding with a confidence threshold, whose number of steps is
            not known.
        share: with grouped keys and values, a pattern for each "query_head" (as the authors), or one for all
            queries of a "kv_group", from their mean scores.
        builder: how block scores are computed. "exact" is the fused kernel where it runs, else chunks in
            torch; "fused" and "chunked" name one of the two. Approximate: "sampled" looks at `sampled_rows`
            queries of each block, "mean" at the mean query and key of each block.
        sampled_rows: for "sampled", queries per block, 8 where nothing is said.
        auto_dense: whether runs that would gain less than `min_gain`, or are shorter than the break-even
            of the device, stay dense; the statistics say so, and the log once.
        min_gain: smallest predicted gain of the whole run for which `auto_dense` lets it be sparse, >= 0.

    Raises:
        ValueError: a value is out of range, or options contradict each other.

    >>> SparseDConfig(select=0.5, block_size=32).mode
    'strict'
    """

    select: float = 0.3
    block_size: int = 128
    skip: float = 0.2
    mode: Mode = "strict"
    isolated: bool = True
    score_scale: ScoreScale = "head_dim"
    refresh: Refresh = "none"
    refresh_steps: int | None = None
    trigger: Trigger = "step"
    share: Share = "query_head"
    builder: Builder = "exact"
    sampled_rows: int | None = None
    auto_dense: bool = True
    min_gain: float = 0.05

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(accepted):
                choices = get_args(accepted)
                raise ValueError(
                    f"{name}={value!r} is unknown{nearest(str(value), choices)}; accepted: "
                    f"{', '.join(choices)}"
                )
        if not 0.0 < self.select <= 1.0:
            raise ValueError(
                f"select={self.select!r} is not in (0, 1]; it is the share of blocks that is kept, 1 is dense"
            )
        if not 0.0 <= self.skip <= 1.0:
            raise ValueError(
                f"skip={self.skip!r} is not in [0, 1]; it is the part of the steps that is dense"
            )
        size = self.block_size
        if not isinstance(size, int) or not 2 <= size <= LARGEST_BLOCK or size & (size - 1):
            raise ValueError(f"block_size={size!r} is not a power of two from 2 to {LARGEST_BLOCK}")
        if not (math.isfinite(self.min_gain) and self.min_gain >= 0.0):
            raise ValueError(f"min_gain={self.min_gain!r} is not a finite number >= 0; 0.05 is 5 %")
        for name in ("isolated", "auto_dense"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither True nor False")
        self._check_belongings()

    def _check_belongings(self) -> None:
        for name, option, value in (
            ("refresh_steps", "refresh", "every_n"),
            ("sampled_rows", "builder", "sampled"),
        ):
            number = getattr(self, name)
            if number is None:
                continue
            if getattr(self, option) != value:
                raise ValueError(
                    f"{name}={number!r} belongs to {option}={value!r}, but {option} is "
                    f"{getattr(self, option)!r}; leave {name} out, or set {option}={value!r}"
                )
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r} is not a whole number >= 1")
        if self.refresh == "every_n" and self.refresh_steps is None:
            raise ValueError("refresh='every_n' needs refresh_steps, e.g. refresh_steps=32")
        if not self.isolated and self.mode != "strict":
            raise ValueError(
                "isolated=False is an ablation of mode='strict'; mode='authors' has its own rule"
            )

    @property
    def rests(self) -> bool:
        """Whether these settings keep every block or every step, so that attention is dense throughout."""
        return self.select == 1.0 or self.skip == 1.0

    @property
    def approximate(self) -> bool:
        """Whether block scores are estimated rather than computed."""
        return self.builder in APPROXIMATE


__all__ = ["APPROXIMATE", "LARGEST_BLOCK", "SparseDConfig"]
