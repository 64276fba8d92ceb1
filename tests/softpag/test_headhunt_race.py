"""What cannot be chosen any more is left out, and nothing else changes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import Goal, HuntConfig, InProcess
from diffctrl.softpag.headhunt.objectives import JudgeObjective, SharpnessObjective, StyleObjective
from diffctrl.softpag.headhunt.race import Race
from diffctrl.softpag.headhunt.ranking import WeightedZ
from diffctrl.softpag.headhunt.scoring import Beside, Here, scorer_of
from tests.softpag.hunting import HEADS, PAIRS, ToySampler, noise, search, with_goal


def raced(values, base, bounds, top, **options):
    """(the race, (head, pair) cells that were scored) of a race over a table of values."""
    heads = [Head(0, index) for index in range(len(values))]
    race = Race(heads, base, bounds, top, **options)
    cells = set()
    while asked := race.next():
        assert not cells & set(asked)
        cells |= set(asked)
        race.tell({(head, pair): values[head.head][pair] for head, pair in asked})
    return race, cells


def ranking(table):
    """Indices of the whole table's rows that have a score, best first; ties by the order of the rows."""
    means = [math.fsum(row) / len(row) for row in table]
    known = [index for index, mean in enumerate(means) if not math.isnan(mean)]
    return sorted(known, key=lambda index: -means[index]), means


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_chosen_are_those_of_the_whole_table(data):
    count, pairs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    low, high = data.draw(st.sampled_from([(0.0, 1.0), (-3.0, 2.0)]))
    # Few distinct values: ties are common, as shares of facts are.
    value = st.sampled_from([low, (low + high) / 2, high, (low + 2 * high) / 3, math.nan])
    table = [[data.draw(value) for _ in range(pairs)] for _ in range(count)]
    base = [data.draw(value) for _ in range(pairs)]
    top, batch = data.draw(st.integers(1, count)), data.draw(st.integers(1, 30))
    earlier = st.dictionaries(st.integers(0, pairs - 1), value)
    before = {Head(0, index): data.draw(earlier) for index in range(0, count, 2)}
    race, cells = raced(table, base, (low, high), top, batch=batch, before=before)
    ranked, means = ranking(table)
    left = [head.head for head in race.alive]
    assert [index for index in ranked if index in left][:top] == ranked[:top]
    assert all((head, pair) in {(h.head, p) for h, p in cells} for head in left for pair in range(pairs))
    for head, (scored, bound) in race.left_out().items():
        assert sum(cell[0] == head for cell in cells) == scored
        if bound is not None and not math.isnan(means[head.head]):
            assert means[head.head] <= bound  # exact: nothing is left to rounding
            last = ranked[top - 1]
            assert (bound, -head.head) < (means[last], -last)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_floor_finds_the_best_above_it_or_none(data):
    count, pairs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    value = st.sampled_from([0.0, 1 / 3, 2 / 3, 1.0])
    table = [[data.draw(value) for _ in range(pairs)] for _ in range(count)]
    base = [data.draw(value) for _ in range(pairs)]
    floor = math.fsum(base) / pairs
    race, _ = raced(table, base, (0.0, 1.0), 1, floor=floor)
    ranked, means = ranking(table)
    left = [head.head for head in race.alive]
    if means[ranked[0]] > floor:
        assert [index for index in ranked if index in left][0] == ranked[0]
    else:
        assert all(means[index] <= floor for index in left)
        assert len(left) == 1 or means[left[0]] == floor


def test_a_bound_that_is_too_low_loses_the_best(monkeypatch):
    """The check above sees what it should: with a bound below full marks, a winner that begins badly goes."""
    table = [[0.0, 0.0, *[1.0] * 14], [1.0, 1.0, *[0.5] * 14]]
    base = [0.0, 0.0, *[0.5] * 14]
    assert raced(table, base, (0.0, 1.0), 1)[0].alive[0] == Head(0, 0)
    bound = Race._mean
    monkeypatch.setattr(
        Race, "_mean", lambda self, head: bound(self, head) - 0.5 * (len(self.values[head]) < 16)
    )
    assert Head(0, 0) not in raced(table, base, (0.0, 1.0), 1)[0].alive


def test_most_of_a_clear_race_is_not_run():
    generator = np.random.default_rng(0)
    hard = generator.random(64) < 0.3  # pairs that most candidates miss
    table = (generator.random((32, 64)) > np.where(hard, 0.8, 0.03)).astype(float)
    table[7] = generator.random(64) > 0.02
    race, cells = raced(table.tolist(), (~hard).astype(float).tolist(), (0.0, 1.0), 1, batch=8)
    assert race.alive[0] == Head(0, 7)
    assert len(cells) < 0.25 * table.size


class Shares:
    """Each head has a share of pairs that it serves; values are 0 or 1."""

    name, version, bounds = "shares", "1", (0.0, 1.0)

    def score(self, images, prompts):
        return [
            float(max((noise(pair, head) < 0.2 + 0.06 * HEADS.index(head) for head in heads), default=False))
            for pair, heads in images
        ]


@pytest.mark.parametrize("top", [1, 2])
def test_a_search_finds_the_same_heads_with_the_same_scores(top):
    goal, pairs = Goal((Shares(),)), [type(PAIRS[0])(f"prompt {index}", index) for index in range(40)]
    results = {}
    for prune in (True, False):
        config = HuntConfig(rounds=3, top=top, prune=prune)
        results[prune] = search(goal=goal, make=with_goal(goal), config=config, pairs=pairs)
    (pruned, fewer), (full, every) = results[True], results[False]
    assert pruned.chosen == full.chosen
    assert fewer < 0.8 * every
    assert full.approximations == pruned.approximations == ()
    for one, other in zip(pruned.rounds, full.rounds, strict=True):
        assert one["current"] == other["current"]
        complete = {each["head"]: each for each in other["candidates"]}
        for each in one["candidates"]:
            if "at_most" in each:
                assert complete[each["head"]]["mean"] <= each["at_most"] + 1e-12
            else:
                assert each == complete[each["head"]]


class Counted(InProcess):
    """Notes how many units each call gets, as if several processes took them."""

    def __init__(self, make, lanes):
        super().__init__(make)
        self.lanes, self.units = lanes, []

    def run(self, units, on_unit):
        self.units.append(len(units))
        super().run(units, on_unit)


def test_several_processes_get_work_for_all_of_them():
    goal, pairs = Goal((Shares(),)), [type(PAIRS[0])(f"prompt {index}", index) for index in range(40)]
    engines = [Counted(with_goal(goal), lanes) for lanes in (1, 4)]
    config = HuntConfig(rounds=1, top=1, batch=5)
    one, four = (search(engine=each, goal=goal, config=config, pairs=pairs)[0] for each in engines)
    assert one.chosen == four.chosen
    raced = [each.units[1:-1] for each in engines]  # without the set before and after the race
    assert min(raced[0]) < 4
    assert sum(units % 4 == 0 for units in raced[1]) >= len(raced[1]) - 1


def test_a_goal_without_bounds_is_scored_in_full():
    assert Goal((JudgeObjective(),)).bounds == (0.0, 1.0)
    assert Goal((SharpnessObjective(),)).bounds is None
    assert Goal((JudgeObjective(), SharpnessObjective()), WeightedZ((1.0, 1.0))).bounds is None


def test_scores_made_beside_are_those_made_here():
    from diffctrl.zoo import worlds

    images, _ = worlds.render(worlds.sample(11, seed=3, world="shapes"))
    prompts = ["a red star"] * 11
    goal = Goal((StyleObjective("soft"), SharpnessObjective(), JudgeObjective()), WeightedZ((1.0, 1.0, 1.0)))
    here = Here(goal).submit(images, prompts)()
    beside = scorer_of(goal, 1)
    assert isinstance(beside, Beside)
    try:
        first, second = (beside.submit(images, prompts) for _ in range(2))
        assert first() == second() == here
    finally:
        beside.close()
    assert isinstance(scorer_of(Goal((SharpnessObjective(),)), 2), Here)
    assert isinstance(scorer_of(goal, 0), Here)


def test_batches_are_sampled_ahead_of_their_scores():
    """The engine asks for a batch's values only after the next ones were sampled, and keeps their order."""
    sampler, asked = ToySampler(), []

    class Slow(Here):
        ahead = 2

        def submit(self, images, prompts):
            values, number = super().submit(images, prompts), len(sampler.asked)
            return lambda: asked.append((number, len(sampler.asked))) or values()

    goal = Goal((Shares(),))
    slow = Slow(goal)
    slow.ahead = 2
    config = HuntConfig(rounds=1, top=2, batch=5, prune=False)
    make = with_goal(goal, sampler)

    def late(index):
        evaluator = make(index)
        evaluator.scorer = slow
        return evaluator

    found, _ = search(engine=InProcess(late), goal=goal, config=config)
    assert found == search(make=with_goal(goal), goal=goal, config=config)[0]
    assert [number for number, _ in asked] == sorted(number for number, _ in asked)
    assert sum(made > number for number, made in asked) > len(asked) / 2
