"""What a search consists of: settings, (prompt, seed) pairs, jobs with keys that cannot collide."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffctrl.softpag.config import LAYER_KINDS
from diffctrl.softpag.heads import Head

# A change here forgets the logs of earlier versions instead of mixing scores of two meanings.
_KEY_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HuntConfig:
    """Settings of a search; the defaults of u and w are those of the published style searches.

    Args:
        rounds: R, greedy rounds.
        top: k, heads chosen in each round.
        u: perturbation strength of the search in (0, 1]; effects show best at 1, and are used at less.
        w: guidance scale of the search, > 0.
        scope: as in `SoftPAGConfig`.
        kind: kind of the perturbation, as in `SoftPAGConfig`.
        options: further settings of `SoftPAGConfig` that change pictures.
        mode: how twins are run, as in `SoftPAGConfig`; it changes the time, not the pictures.
        guidance_scale: classifier-free guidance during the search; 1 is off, as published.
        batch: candidates that are sampled together. It does not change what is found.
        steady: every batch has `batch` rows in every forward: short ones are filled with repeated rows, and
            the first step is not shared. On a GPU the kernel, and with it the rounding, depends on the number
            of rows; so a picture is the same to the bit whatever else is in its batch, and a search that
            leaves candidates out sees the pictures of one that does not.
        stop_early: end before a round whose best candidate does not beat the current set.
        prune: stop scoring a candidate once full marks on the pairs that are left could not bring it among
            the chosen. Exact: the same heads with the same scores. It needs a goal of one objective whose
            values have bounds; others, and searches with `halving`, score in full.
        halving: score every candidate on the first half of the pairs, and only the better half of them on
            the rest. Approximate: it can lose a head; the head set names it.

    Raises:
        ValueError: a value is out of range.
    """

    rounds: int = 1
    top: int = 3
    u: float = 1.0
    w: float = 3.0
    scope: str = "joint"
    kind: str = "identity"
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "batched"
    guidance_scale: float = 1.0
    batch: int = 16
    steady: bool = True
    stop_early: bool = False
    prune: bool = True
    halving: bool = False

    def __post_init__(self) -> None:
        if self.kind in LAYER_KINDS:
            raise ValueError(f"kind={self.kind!r} acts on whole layers, and a search chooses single heads")
        for name in ("rounds", "top", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not a whole number from 1 on")
        if not 0.0 < self.u <= 1.0:
            raise ValueError(f"u={self.u!r} is not in (0, 1]; at 0 no head does anything")
        if not (math.isfinite(self.w) and self.w > 0.0):
            raise ValueError(f"w={self.w!r} is not a finite number > 0; at 0 no head does anything")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0.0):
            raise ValueError(f"guidance_scale={self.guidance_scale!r} is not a finite number >= 0")

    def perturbation(self) -> dict[str, Any]:
        """What changes a picture, for keys and for the head set."""
        return {
            "kind": self.kind,
            "scope": self.scope,
            "u": self.u,
            "w": self.w,
            "s": self.guidance_scale,
            **self.options,
        }

    def settings(self) -> dict[str, Any]:
        """What `SoftPAGConfig` takes of it; names that equal its defaults are left out."""
        named = {
            "scope": (self.scope, "joint"),
            "kind": (self.kind, "identity"),
            "mode": (self.mode, "batched"),
        }
        changed = {name: value for name, (value, default) in named.items() if value != default}
        return {"u": self.u, "w": self.w, **changed, **self.options}


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """A prompt with a seed; the same for every candidate, so that differences are paired."""

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Job:
    """One picture: the selected heads with one candidate, or the selected ones alone (`head` is None)."""

    round: int
    selected: tuple[Head, ...]
    head: Head | None
    pair: Pair

    @property
    def heads(self) -> tuple[Head, ...]:
        """The perturbed heads."""
        return self.selected if self.head is None else (*self.selected, self.head)

    def key(self, configuration: str) -> str:
        """A hash of all that decides the score; a prompt enters whole, so that none can pass for another.

        A set of heads is scored once, in whichever round and order it comes up: the current set of a round
        of one head is the best candidate of the round before.
        """
        entry = {
            "v": _KEY_VERSION,
            "config": configuration,
            "heads": sorted(str(head) for head in self.heads),
            "prompt": self.pair.prompt,
            "seed": self.pair.seed,
        }
        return digest(entry)


@dataclass(frozen=True, slots=True)
class Unit:
    """Jobs that are sampled in one batch; neighbours in the model, so that prefixes coincide."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a search runs: what its keys and its head set record besides the config.

    Attributes:
        model: {"id", "revision"}; the revision must identify the weights.
        sampling: steps, size, scheduler, dtype, and other arguments of the pipeline's call.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


def configuration(config: HuntConfig, setting: Setting, objective: Mapping[str, Any]) -> str:
    """The hash of everything that is the same for all jobs; batch size and number of rounds are not in it."""
    return digest(
        {
            "perturbation": config.perturbation(),
            "model": dict(setting.model),
            "sampling": dict(setting.sampling),
            "objective": dict(objective),
        }
    )


def digest(entry: Any) -> str:
    """The first 128 bits of SHA-256 over canonical JSON."""
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def units_of(jobs: Sequence[Job], batch: int, depth: Callable[[Job], int]) -> list[Unit]:
    """Jobs in batches, those whose perturbation begins deepest in the model last.

    A batch runs from its first perturbed block on, so that jobs of one depth belong together, whatever their
    pairs; within a depth, jobs of one pair are neighbours, as they share the first conditional prediction.
    """
    places = {pair: index for index, pair in enumerate(dict.fromkeys(job.pair for job in jobs))}
    ordered = sorted(jobs, key=lambda job: (depth(job), places[job.pair]))
    return [Unit(tuple(ordered[start : start + batch])) for start in range(0, len(ordered), batch)]
