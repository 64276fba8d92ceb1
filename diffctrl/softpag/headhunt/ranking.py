"""From the values of pictures to one score per candidate. NaN and what misses a floor come last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from diffctrl.softpag.headhunt.objectives import Objective

# Axis letters: N candidates, Q pairs, P parts of the goal.
Array = npt.NDArray[np.float64]


class Ranking(Protocol):
    """How the parts of a goal become one score."""

    def name(self, parts: Sequence[str]) -> str: ...

    def scores(self, values: Array, current: Array) -> tuple[Array, Array]:
        """(N, Q, P) of the candidates and (Q, P) of the current set -> (N, Q) and (Q,)."""
        ...

    def excluded(self, values: Array) -> npt.NDArray[np.bool_]:
        """(N,): candidates that must not be chosen whatever their score."""
        ...


@dataclass(frozen=True, slots=True)
class Single:
    """One part, as it is."""

    def name(self, parts: Sequence[str]) -> str:
        return parts[0]

    def scores(self, values: Array, current: Array) -> tuple[Array, Array]:
        return values[..., 0], current[..., 0]

    def excluded(self, values: Array) -> npt.NDArray[np.bool_]:
        return np.zeros(len(values), dtype=bool)


@dataclass(frozen=True, slots=True)
class WeightedZ:
    """The weighted sum of the parts' z-scores among the candidates of the round; a part without spread is 0.

    Means and spreads are those of the candidates' means, NaN left out, so that nothing depends on the order
    in which candidates were scored.
    """

    weights: tuple[float, ...]

    def name(self, parts: Sequence[str]) -> str:
        named = zip(self.weights, parts, strict=True)
        return "z(" + ",".join(f"{part}={weight:g}" for weight, part in named) + ")"

    def scores(self, values: Array, current: Array) -> tuple[Array, Array]:
        means = values.mean(axis=1)  # (N, P)
        known = means[np.isfinite(means).all(axis=1)]
        if not len(known):
            return np.full(values.shape[:2], math.nan), np.full(len(current), math.nan)
        centre, spread = known.mean(axis=0), known.std(axis=0)
        factor = np.where(spread > 0, np.asarray(self.weights) / np.where(spread > 0, spread, 1.0), 0.0)
        return ((values - centre) * factor).sum(axis=-1), ((current - centre) * factor).sum(axis=-1)

    def excluded(self, values: Array) -> npt.NDArray[np.bool_]:
        return np.zeros(len(values), dtype=bool)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The first part ranks, among candidates whose other parts reach their floors on average.

    The published setting is CLIP among heads with PickScore >= 20 and aesthetic >= 6:
    `Goal((clip, pickscore, aesthetic), Threshold((20.0, 6.0)))`.
    """

    floors: tuple[float, ...]

    def name(self, parts: Sequence[str]) -> str:
        named = zip(parts[1:], self.floors, strict=True)
        return f"{parts[0]} where " + ", ".join(f"{part}>={floor:g}" for part, floor in named)

    def scores(self, values: Array, current: Array) -> tuple[Array, Array]:
        return values[..., 0], current[..., 0]

    def excluded(self, values: Array) -> npt.NDArray[np.bool_]:
        return ~(values[..., 1:].mean(axis=1) >= np.asarray(self.floors)).all(axis=1)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a search maximises: one objective, or several with a ranking that joins them.

    Raises:
        ValueError: two parts of one name, or several parts without a ranking.
    """

    parts: tuple[Objective, ...]
    ranking: Ranking = Single()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a goal needs objectives of different names, got {', '.join(names) or 'none'}")
        if isinstance(self.ranking, Single) and len(names) > 1:
            raise ValueError(f"{', '.join(names)}: several objectives need a ranking, e.g. WeightedZ")
        self.ranking.name(names)  # a wrong number of weights or floors shows here

    def describe(self) -> dict[str, Any]:
        """{"name", "version"} for keys and head sets."""
        name = self.ranking.name([part.name for part in self.parts])
        return {"name": name, "version": ",".join(part.version for part in self.parts)}

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and largest value, where the goal is one objective that has them."""
        if not isinstance(self.ranking, Single):
            return None
        return getattr(self.parts[0], "bounds", None)

    def score(self, images: Any, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        """One value per part for each picture; what is not finite becomes NaN.

        Raises:
            ValueError: an objective returned another number of scores.
        """
        return rows_of([column_of(part, images, prompts) for part in self.parts])


def column_of(part: Objective, images: Any, prompts: Sequence[str]) -> list[float]:
    """One objective's value of each picture.

    Raises:
        ValueError: it returned another number of values.
    """
    column = [float(value) for value in part.score(images, prompts)]
    if len(column) != len(prompts):
        raise ValueError(f"{part.name} returned {len(column)} scores for {len(prompts)} pictures")
    return [value if math.isfinite(value) else math.nan for value in column]


def rows_of(columns: Sequence[list[float]]) -> list[tuple[float, ...]]:
    """One tuple per picture from one list per part."""
    return list(zip(*columns, strict=True))


@dataclass(frozen=True, slots=True)
class Score:
    """A candidate's score over all pairs.

    Attributes:
        mean, error: over the pairs; the error is None for a single pair, the mean None where a score is NaN.
        difference, difference_error: to the current set, pair by pair.
        nans: pairs without a score.
        excluded: below a floor.
    """

    mean: float | None
    error: float | None
    difference: float | None
    difference_error: float | None
    nans: int
    excluded: bool = False

    @property
    def order(self) -> float:
        """Sorts ascending: best first, NaN and excluded last."""
        return math.inf if self.mean is None or self.excluded else -self.mean

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "mean": self.mean,
            "error": self.error,
            "difference": self.difference,
            "difference_error": self.difference_error,
        }
        if self.nans:
            entry["nans"] = self.nans
        if self.excluded:
            entry["excluded"] = True
        return entry


def summarise(goal: Goal, values: Array, current: Array) -> tuple[list[Score], Score]:
    """Scores of N candidates (N, Q, P) and of the current set (Q, P)."""
    scores, base = goal.ranking.scores(values, current)
    excluded = goal.ranking.excluded(values)
    found = [_score(row, row - base, bool(out)) for row, out in zip(scores, excluded, strict=True)]
    return found, _score(base, np.full(len(base), math.nan), False)


def _score(row: Array, difference: Array, excluded: bool) -> Score:
    mean, error = _mean_and_error(row)
    gain, gain_error = _mean_and_error(difference)
    return Score(mean, error, gain, gain_error, int(np.isnan(row).sum()), excluded)


def _mean_and_error(row: Array) -> tuple[float | None, float | None]:
    if not np.isfinite(row).all():
        return None, None
    mean = math.fsum(row.tolist()) / len(row)
    if len(row) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in row.tolist()) / (len(row) - 1)
    return mean, math.sqrt(variance / len(row))


def as_array(table: Mapping[Any, list[tuple[float, ...]]], keys: Sequence[Any]) -> Array:
    """(N, Q, P) from candidate -> values of its pairs."""
    return np.asarray([table[key] for key in keys], dtype=np.float64)
