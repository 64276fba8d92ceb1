"""HeadHunter: greedy rounds over attention heads (arXiv 2506.10978, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffctrl.softpag.headhunt.engines import Engine
from diffctrl.softpag.headhunt.joblog import JobLog
from diffctrl.softpag.headhunt.jobs import HuntConfig, Job, Pair, Setting, Unit, configuration, units_of
from diffctrl.softpag.headhunt.race import Race
from diffctrl.softpag.headhunt.ranking import Goal, Score, as_array, summarise
from diffctrl.softpag.headhunt.scoring import Values
from diffctrl.softpag.headhunt.universe import Universe
from diffctrl.softpag.heads import Head
from diffctrl.softpag.headset import Chosen, HeadSet

# A candidate is a head, or None for the selected heads alone.
_Table = dict[Head | None, list[tuple[float, ...]]]
# (round, jobs done in it, jobs of it)
OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a search costs at most before it starts, nothing of it in a log yet.

    Attributes:
        images: pictures.
        batches: of them.
        forwards: rows through the denoiser, with those that fill batches up, and shared first steps counted
            once; with mode "prefix" the perturbed half of them is shorter, as far as the first perturbed
            block is deep.
        naive_forwards: rows when each picture is sampled alone.
    """

    images: int
    batches: int
    forwards: int
    naive_forwards: int


def cost(universe: Universe, pairs: Sequence[Pair], config: HuntConfig, steps: int) -> Cost:
    """The cost of a search of all rounds in full; a picture has a conditional and a perturbed row."""
    cfg = config.guidance_scale > 1
    images = batches = leaders = 0
    for done in range(config.rounds + 1):
        last = done == config.rounds
        heads = [] if last else universe.heads[: max(len(universe.heads) - done * config.top, 0)]
        for candidates in ([None], heads):
            jobs = [Job(done, (), head, pair) for pair in pairs for head in candidates]
            units = units_of(jobs, config.batch, universe.depth)
            images, batches = images + len(jobs), batches + len(units)
            leaders += sum(len({job.pair for job in unit.jobs}) for unit in units)
    each = steps * (3 if cfg else 2)
    if config.steady:
        return Cost(images, batches, batches * config.batch * each, images * each)
    return Cost(images, batches, images * each - (images - leaders) * (2 if cfg else 1), images * each)


class Search:
    """One search; `run` returns the head set.

    Args:
        universe: the candidates.
        pairs: (prompt, seed) pairs, the same for every candidate.
        config: settings.
        setting: what the run is recorded as.
        goal: what is maximised.
        engine: who samples and scores.
        log: finished jobs.
        on_progress: hears (round, done, total); a round's jobs that the log holds count as done at once.

    Raises:
        ValueError: there are no pairs, one is given twice, or the rounds need more heads than there are.
    """

    def __init__(
        self,
        universe: Universe,
        pairs: Sequence[Pair],
        config: HuntConfig,
        setting: Setting,
        goal: Goal,
        engine: Engine,
        log: JobLog,
        on_progress: OnProgress = lambda round_, done, total: None,
    ) -> None:
        if not pairs or len(set(pairs)) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs of prompt and seed, {len(set(pairs))} of them different")
        if config.rounds * config.top > len(universe.heads):
            raise ValueError(
                f"{config.rounds} rounds of {config.top} heads need more than the {len(universe.heads)} "
                "heads of this model"
            )
        self._universe, self._pairs, self._config, self._setting = universe, list(pairs), config, setting
        self._goal, self._engine, self._log, self._on_progress = goal, engine, log, on_progress
        self._configuration = configuration(config, setting, goal.describe())
        self.computed = 0  # jobs that this run carried out; the rest came from the log
        self._before: dict[Head, dict[int, float]] = {}  # what the last race knows

    def run(self) -> HeadSet:
        """Run all rounds.

        Raises:
            ValueError: no candidate of a round could be scored.
        """
        self._engine.ready()
        chosen: list[Chosen] = []
        rounds: list[dict[str, Any]] = []
        stopped = False
        for number in range(1, self._config.rounds + 1):
            selected = tuple(each.head for each in chosen)
            entry, best = self._round(number, selected)
            rounds.append(entry)
            stopped = entry["stopped"]
            if stopped:
                break
            chosen += [Chosen(head, number, score.mean) for head, score in best]
        if not stopped:  # validation: recorded, decides nothing
            last = self._values(len(rounds) + 1, tuple(each.head for each in chosen), [None], self._pairs)
            base = as_array(last, [None])
            _, final = summarise(self._goal, base, base[0])
            # A z-score is relative to the candidates of a round; the set alone has none.
            rounds[-1]["set"] = final.to_dict() | {"values": _means(base[0], self._goal)}
        return self._headset(chosen, rounds)

    def _round(
        self, number: int, selected: tuple[Head, ...]
    ) -> tuple[dict[str, Any], list[tuple[Head, Score]]]:
        pool: list[Head] = [head for head in self._universe.heads if head not in selected]
        dropped: list[dict[str, Any]] = []
        base = as_array(self._values(number, selected, [None], self._pairs), [None])[0]
        if self._config.halving and len(self._pairs) > 1:
            pool, dropped = self._better_half(number, selected, pool)
        elif self._config.prune and self._goal.bounds is not None:
            pool, dropped = self._still_possible(number, selected, pool, base[:, 0].tolist())
        values = as_array(self._values(number, selected, pool, self._pairs), pool)
        scores, current = summarise(self._goal, values, base)
        ranked = sorted(
            zip(pool, scores, strict=True), key=lambda each: each[1].order
        )  # stable: ties in order
        best = [(head, score) for head, score in ranked[: self._config.top] if math.isfinite(score.order)]
        if not best:
            raise ValueError(
                f"round {number}: none of {len(pool)} candidates has a score "
                f"({sum(score.nans > 0 for score in scores)} with NaN, "
                f"{sum(score.excluded for score in scores)} below a floor)"
            )
        stop = self._config.stop_early and current.mean is not None and -best[0][1].order <= current.mean
        entry: dict[str, Any] = {
            "round": number,
            "selected": [str(head) for head in selected],
            "current": current.to_dict() | {"values": _means(base, self._goal)},
            "candidates": [
                {
                    "head": str(head),
                    **score.to_dict(),
                    "values": _means(row, self._goal),
                    "pairs": len(self._pairs),
                }
                for head, score, row in zip(pool, scores, values, strict=True)
            ]
            + dropped,
            "chosen": [] if stop else [str(head) for head, _ in best],
            "unscored": sum(score.nans > 0 for score in scores),
            "stopped": stop,
        }
        return entry, best

    def _better_half(
        self, number: int, selected: tuple[Head, ...], pool: list[Head]
    ) -> tuple[list[Head], list[dict[str, Any]]]:
        """Candidates that the first half of the pairs keeps, and what is recorded of the others."""
        pairs = self._pairs[: math.ceil(len(self._pairs) / 2)]
        table = self._values(number, selected, [*pool, None], pairs)
        values = as_array(table, pool)
        scores, _ = summarise(self._goal, values, as_array(table, [None])[0])
        ranked = sorted(zip(pool, scores, strict=True), key=lambda each: each[1].order)
        count = max(math.ceil(len(pool) / 2), self._config.top)
        kept = {head for head, _ in ranked[:count]}
        dropped = [
            {"head": str(head), **score.to_dict(), "pairs": len(pairs)}
            for head, score in zip(pool, scores, strict=True)
            if head not in kept
        ]
        return [head for head in pool if head in kept], dropped

    def _still_possible(
        self, number: int, selected: tuple[Head, ...], pool: list[Head], base: list[float]
    ) -> tuple[list[Head], list[dict[str, Any]]]:
        """Candidates that a race scores on every pair, and what is recorded of the others."""
        assert self._goal.bounds is not None
        race = Race(
            pool,
            base,
            self._goal.bounds,
            self._config.top,
            before={head: row for head, row in self._before.items() if head in pool},
            # Where it is the only one to be chosen, a head that does not beat the set ends the search.
            floor=_mean(base) if self._config.stop_early and self._config.top == 1 else None,
            batch=self._config.batch * self._engine.lanes,  # none of the processes shall wait for work
        )
        while cells := race.next():
            jobs = {cell: Job(number, selected, cell[0], self._pairs[cell[1]]) for cell in cells}
            found = self._carried_out(number, list(jobs.values()))
            race.tell({cell: found[job][0] for cell, job in jobs.items()})
        self._before = race.values
        empty = dict.fromkeys(("mean", "error", "difference", "difference_error"))
        dropped = [
            {"head": str(head), **empty, "pairs": scored, "at_most": bound}
            for head, (scored, bound) in race.left_out().items()
        ]
        return race.alive, dropped

    def _values(
        self, number: int, selected: tuple[Head, ...], candidates: Sequence[Head | None], pairs: list[Pair]
    ) -> _Table:
        """Values of every (candidate, pair), from the log or computed now."""
        found = self._carried_out(
            number, [Job(number, selected, head, pair) for pair in pairs for head in candidates]
        )
        table: _Table = {head: [] for head in candidates}
        for job, value in found.items():
            table[job.head].append(value)
        return table

    def _carried_out(self, number: int, jobs: list[Job]) -> dict[Job, tuple[float, ...]]:
        """The values of some jobs, from the log or computed now."""
        keys = {job: job.key(self._configuration) for job in jobs}
        missing = [job for job in jobs if self._log.get(keys[job]) is None]
        done = len(jobs) - len(missing)
        self._on_progress(number, done, len(jobs))

        def on_unit(unit: Unit, values: Values, new: bool) -> None:
            nonlocal done
            if new:
                done += len(unit.jobs)
                self.computed += len(unit.jobs)
            self._log.add(
                [(keys[job], job, value) for job, value in zip(unit.jobs, values, strict=True)], written=new
            )
            self._on_progress(number, min(done, len(jobs)), len(jobs))

        if missing:
            self._engine.run(units_of(missing, self._config.batch, self._universe.depth), on_unit)
        found = {}
        for job in jobs:
            value = self._log.get(keys[job])
            if value is None:
                raise RuntimeError(f"the engine did not carry out {job.head or 'the set'} on {job.pair}")
            found[job] = value
        return found

    def _headset(self, chosen: list[Chosen], rounds: list[dict[str, Any]]) -> HeadSet:
        return HeadSet(
            chosen=tuple(chosen),
            signature=self._universe.signature,
            model=self._setting.model,
            perturbation=self._config.perturbation(),
            sampling=self._setting.sampling,
            objective=self._goal.describe(),
            pairs=tuple((pair.prompt, pair.seed) for pair in self._pairs),
            rounds=tuple(rounds),
            approximations=("halving",) if self._config.halving else (),
        )


def _mean(values: list[float]) -> float | None:
    """As `Score.mean`: None where a value is NaN."""
    mean = math.fsum(values) / len(values)
    return mean if math.isfinite(mean) else None


def _means(values: Any, goal: Goal) -> dict[str, float | None]:
    """Mean of each part over the pairs; values: (Q, P)."""
    means = values.mean(axis=0).tolist()
    named = zip(goal.parts, means, strict=True)
    return {part.name: mean if math.isfinite(mean) else None for part, mean in named}
