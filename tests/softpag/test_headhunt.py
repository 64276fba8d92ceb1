"""HeadHunter's rounds, log and engines, on a toy whose best heads are known (specification 3 and 8)."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import (
    Goal,
    HarmonicMean,
    HuntConfig,
    InProcess,
    Job,
    JobLog,
    Pair,
    Processes,
    Threshold,
    WeightedZ,
    cost,
)
from diffctrl.softpag.headhunt.jobs import configuration, units_of
from diffctrl.softpag.headset import HeadSet
from tests.softpag.hunting import (
    HEADS,
    PAIRS,
    SETTING,
    UNIVERSE,
    Additive,
    ToySampler,
    factory,
    search,
    with_goal,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = HuntConfig(rounds=3, top=2, batch=5)
# Jobs of three rounds of two: 12, 10 and 8 heads with the current set each, then the final set, on 5 pairs.
JOBS = (13 + 11 + 9 + 1) * 5


@pytest.fixture(scope="module")
def reference():
    return search()[0]


def _by_value(heads=HEADS):
    return sorted(heads, key=lambda head: -Additive().value(head))


def test_planted_head_is_found_first():
    for planted in (HEADS[0], HEADS[7]):
        goal = Goal((Additive(values={planted: 3.0}),))
        headset, _ = search(goal=goal, make=with_goal(goal), config=HuntConfig(rounds=2, top=1))
        assert headset.heads[0] == planted


def test_greedy_takes_the_best_in_order_and_never_again(reference):
    assert list(reference.heads) == _by_value()[:6]
    assert [each.round for each in reference.chosen] == [1, 1, 2, 2, 3, 3]
    for entry in reference.rounds:
        candidates = [each["head"] for each in entry["candidates"]]
        assert not set(candidates) & set(entry["selected"])
        assert len(candidates) == 12 - 2 * (entry["round"] - 1)


def test_later_rounds_score_selected_and_candidate():
    sampler = ToySampler()
    headset, computed = search(make=with_goal(Goal((Additive(),)), sampler))
    assert computed == len(sampler.asked) == JOBS
    first, second = set(headset.heads[:2]), set(headset.heads[:4])
    sizes = [len(heads) for _, heads in sampler.asked]
    assert sizes.count(1) == 60
    assert sizes.count(3) == 50
    assert all(first < set(heads) for _, heads in sampler.asked if len(heads) == 3)
    assert all(second < set(heads) for _, heads in sampler.asked if len(heads) == 5)


def test_one_round_is_the_ranking_of_single_heads():
    headset, _ = search(config=HuntConfig(rounds=1, top=12))
    means = {each["head"]: each["mean"] for each in headset.rounds[0]["candidates"]}
    assert [str(head) for head in headset] == sorted(means, key=lambda head: -means[head])


def test_ties_go_by_stack_layer_and_head():
    goal = Goal((Additive(values=dict.fromkeys(HEADS, 0.5)),))
    goal.parts[0].score = lambda images, prompts: [1.0] * len(images)
    headset, _ = search(goal=goal, make=with_goal(goal))
    assert headset.heads == HEADS[:6]


def test_errors_and_paired_differences(reference):
    entry = reference.rounds[1]
    sampled = {head: [] for head in ("current", entry["candidates"][0]["head"])}
    goal = Additive()
    selected = reference.heads[:2]
    for pair in PAIRS:
        for name, extra in zip(
            sampled,
            [
                (),
                (
                    Head(
                        *map(int, name_parts(entry)),
                    ),
                ),
            ],
            strict=True,
        ):
            sampled[name] += goal.score([(pair, selected + extra)], [pair.prompt])
    current, candidate = (np.array(values) for values in sampled.values())
    found = entry["candidates"][0]
    assert found["mean"] == pytest.approx(candidate.mean(), abs=1e-12)
    assert found["error"] == pytest.approx(candidate.std(ddof=1) / math.sqrt(5), abs=1e-12)
    assert found["difference"] == pytest.approx((candidate - current).mean(), abs=1e-12)
    assert found["difference_error"] == pytest.approx(
        (candidate - current).std(ddof=1) / math.sqrt(5), abs=1e-12
    )
    assert entry["current"]["mean"] == pytest.approx(current.mean(), abs=1e-12)


def name_parts(entry):
    return entry["candidates"][0]["head"][1:].split("H")


def test_nan_ranks_last_and_is_reported():
    best = _by_value()[0]
    goal = Goal((Additive(nan=frozenset({best})),))
    headset, _ = search(goal=goal, make=with_goal(goal), config=HuntConfig(rounds=1, top=12))
    assert headset.heads == tuple(_by_value()[1:])  # never chosen, even where heads run out
    (entry,) = headset.rounds
    assert entry["unscored"] == 1
    (told,) = [each for each in entry["candidates"] if each["head"] == str(best)]
    assert told["mean"] is None
    assert told["nans"] == 5
    json.dumps(headset.to_dict(), allow_nan=False)


def test_a_round_without_scores_is_an_error():
    goal = Goal((Additive(nan=frozenset(HEADS)),))
    with pytest.raises(ValueError, match="none of 12 candidates has a score"):
        search(goal=goal, make=with_goal(goal))


def test_a_wrong_number_of_scores_is_an_error():
    goal = Goal((Additive(),))
    goal.parts[0].score = lambda images, prompts: [1.0]
    with pytest.raises(ValueError, match="returned 1 scores for 5 pictures"):
        search(goal=goal, make=with_goal(goal))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_changes_nothing(reference, batch):
    assert search(config=HuntConfig(rounds=3, top=2, batch=batch))[0] == reference


def test_job_order_changes_nothing(reference):
    class Shuffled(InProcess):
        def run(self, units, on_unit):
            super().run(random.Random(1).sample(list(units), len(units)), on_unit)

    assert search(engine=Shuffled(factory))[0] == reference


def test_three_workers_find_the_same(reference, tmp_path):
    headset, computed = search(tmp_path, engine=Processes(factory, 3))
    assert headset == reference
    assert computed == JOBS


def test_two_actors_of_ray_find_the_same(reference, tmp_path):
    pytest.importorskip("ray")
    from diffctrl.softpag.headhunt.ray_engine import RayActors

    headset, computed = search(tmp_path, engine=RayActors(factory, 2))
    assert headset == reference
    assert computed == JOBS


def test_two_ranks_of_accelerate_find_the_same(reference, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = f"{str(tmp_path / 'log')!r}, {str(tmp_path / 'out')!r}"
    code = f"from tests.softpag.hunting import ranked; ranked({places})"
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], done
    assert sum(int(out.splitlines()[-1]) for out, _ in done) == JOBS  # no job was done twice
    for rank in range(2):
        assert HeadSet.load(tmp_path / f"out-{rank}.json") == reference


def test_killed_search_resumes_without_repeating_work(reference, tmp_path):
    code = f"from tests.softpag.hunting import killed; killed({str(tmp_path)!r}, 20)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    assert before.count(b"\n") == 65 + 5 + 6 * 5  # a round, then the set of the next and 6 batches of it
    file.write_bytes(before[:-40])  # and half a line is lost
    headset, computed = search(tmp_path)
    assert headset == reference
    assert computed == JOBS - (before.count(b"\n") - 1)
    keys = [json.loads(line)["key"] for line in file.read_bytes().splitlines() if line.endswith(b"}")]
    assert len(keys) == len(set(keys)) == JOBS
    again, computed = search(tmp_path)
    assert again == reference
    assert computed == 0


def test_a_longer_search_reuses_the_rounds_of_a_shorter_one(reference, tmp_path):
    search(tmp_path, config=HuntConfig(rounds=2, top=2))
    headset, computed = search(tmp_path)
    assert headset == reference
    assert computed < 9 * 5 + 5 + 1


def test_other_settings_share_no_scores(tmp_path):
    search(tmp_path)
    for config in (
        HuntConfig(rounds=3, top=2, u=0.5),
        HuntConfig(rounds=3, top=2, w=2.0),
        HuntConfig(rounds=3, top=2, scope="image_rows"),
        HuntConfig(rounds=3, top=2, guidance_scale=3.0),
    ):
        assert search(tmp_path, config=config)[1] == JOBS


def test_job_keys_are_of_everything():
    base = Job(1, HEADS[:2], HEADS[3], Pair("a painting of a landscape in style A", 0))
    others = [
        Job(1, HEADS[:1], HEADS[3], base.pair),
        Job(1, HEADS[:2], HEADS[4], base.pair),
        Job(1, HEADS[:2], None, base.pair),
        Job(1, HEADS[:2], HEADS[3], Pair("a painting of a landscape in style B", 0)),
        Job(1, HEADS[:2], HEADS[3], Pair(base.pair.prompt, 1)),
    ]
    conf = configuration(CONFIG, SETTING, {"name": "x", "version": "1"})
    keys = [job.key(conf) for job in (base, *others)]
    keys.append(base.key(configuration(CONFIG, SETTING, {"name": "x", "version": "2"})))
    assert len(set(keys)) == len(keys)
    # A set is a set: order, round, and which of its heads is the candidate do not matter.
    for same in (
        Job(1, HEADS[1::-1], HEADS[3], base.pair),
        Job(2, HEADS[:2], HEADS[3], base.pair),
        Job(3, (*HEADS[:2], HEADS[3]), None, base.pair),
    ):
        assert base.key(conf) == same.key(conf)


def test_units_hold_jobs_that_begin_at_one_depth():
    jobs = [Job(1, (), head, pair) for head in (None, *HEADS) for pair in PAIRS]
    units = units_of(jobs, 10, UNIVERSE.depth)
    assert [len(unit.jobs) for unit in units] == [10] * 6 + [5]
    assert [sorted({UNIVERSE.depth(job) for job in unit.jobs}) for unit in units] == [
        *([[0]] * 2 + [[1]] * 2 + [[2]] * 2),
        [3],  # the set alone perturbs nothing in the first round
    ]
    assert [len({job.pair for job in unit.jobs}) for unit in units] == [3] * 6 + [5]
    assert {job for unit in units for job in unit.jobs} == set(jobs)
    # Heads that are chosen already count too.
    assert UNIVERSE.depth(Job(2, HEADS[:1], HEADS[-1], PAIRS[0])) == 0


def test_log_lines_of_other_kinds_are_counted_not_believed(tmp_path):
    (tmp_path / "jobs-0.jsonl").write_text('{"key": "a", "values": [1, null]}\n{"key": "b"}\nnot json\n')
    log = JobLog(tmp_path)
    assert (log.loaded, log.torn) == (1, 2)
    assert log.get("b") is None
    assert math.isnan(log.get("a")[1])


def test_stops_where_no_head_helps():
    goal = Goal((Additive(values={head: (1.0 if head == HEADS[5] else -1.0) for head in HEADS}),))
    config = HuntConfig(rounds=3, top=1, stop_early=True)
    headset, _ = search(goal=goal, make=with_goal(goal), config=config)
    assert headset.heads == (HEADS[5],)
    assert [entry["stopped"] for entry in headset.rounds] == [False, True]
    assert len(search(goal=goal, make=with_goal(goal), config=HuntConfig(rounds=3, top=1))[0]) == 3


def test_halving_is_cheaper_and_says_so(reference):
    headset, computed = search(config=HuntConfig(rounds=3, top=2, halving=True))
    assert headset.approximations == ("halving",)
    assert reference.approximations == ()
    assert computed < 0.85 * JOBS
    assert headset.heads == reference.heads
    assert sorted({each["pairs"] for each in headset.rounds[0]["candidates"]}) == [3, 5]


def test_cost_is_what_is_computed():
    planned = cost(UNIVERSE, PAIRS, replace(CONFIG, steady=False), steps=4)
    assert planned.images == JOBS
    assert planned.naive_forwards == JOBS * 4 * 2
    assert planned.batches == (1 + 12) + (1 + 10) + (1 + 8) + 1
    # In a batch of 5, 2 or 3 pairs share their first conditional row; 12, 10 and 8 heads, and the sets.
    leaders = (3 * 8 + 5) + (2 * 8 + 6 + 5) + (2 * 8 + 5) + 5
    assert planned.forwards == planned.naive_forwards - (JOBS - leaders)
    # Batches of one size are full, or filled up.
    assert cost(UNIVERSE, PAIRS, CONFIG, steps=4).forwards == planned.batches * 5 * 4 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"u": 0.0}, "u=0.0"), ({"w": 0.0}, "w=0.0"), ({"rounds": 0}, "rounds=0"), ({"batch": 0}, "batch=0")],
)
def test_settings_out_of_range_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        HuntConfig(**arguments)


def test_impossible_searches_are_refused():
    with pytest.raises(ValueError, match="need more than the 12"):
        search(config=HuntConfig(rounds=7, top=2))
    with pytest.raises(ValueError, match="1 of them different"):
        search(pairs=[PAIRS[0], PAIRS[0]])


# --- goals --------------------------------------------------------------------------------------------------


def _values():
    return np.random.default_rng(0).normal(size=(6, 4, 3))


def test_weighted_z_scores():
    values = _values()
    scores, current = WeightedZ((1.0, 0.5, 0.0)).scores(values, values[0])
    means = values.mean(axis=1)
    z = (means - means.mean(axis=0)) / means.std(axis=0)
    assert np.allclose(scores.mean(axis=1), z @ [1.0, 0.5, 0.0])
    assert np.allclose(current, scores[0])
    values[2, 1, 0] = math.nan
    assert np.isfinite(WeightedZ((1.0, 1.0, 1.0)).scores(values, values[0])[0].mean(axis=1)).sum() == 5
    constant = np.ones_like(values)
    assert not WeightedZ((1.0, 1.0, 1.0)).scores(constant, constant[0])[0].any()


def test_threshold_excludes_and_first_part_ranks():
    planted = HEADS[4]
    goal = Goal(
        (Additive(values={planted: 5.0}), Additive("second", values={planted: -9.0})), Threshold((0.0,))
    )
    headset, _ = search(goal=goal, make=with_goal(goal), config=HuntConfig(rounds=1, top=11))
    assert planted not in headset
    assert len(headset) == 11
    assert sum(each.get("excluded", False) for each in headset.rounds[0]["candidates"]) == 1
    assert headset.objective["name"] == "additive where second>=0"


def test_harmonic_mean():
    class Constant:
        version = "1"

        def __init__(self, name, value):
            self.name, self._value = name, value

        def score(self, images, prompts):
            return [self._value] * len(images)

    assert HarmonicMean(Constant("a", 1.0), Constant("b", 3.0)).score([0, 0], ["", ""]) == [1.5, 1.5]
    assert math.isnan(HarmonicMean(Constant("a", 1.0), Constant("b", -3.0)).score([0], [""])[0])


def test_goals_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="need a ranking"):
        Goal((Additive("a"), Additive("b")))
    with pytest.raises(ValueError, match="different names"):
        Goal((Additive("a"), Additive("a")), WeightedZ((1.0, 1.0)))
    with pytest.raises(ValueError, match="zip"):
        Goal((Additive("a"), Additive("b")), WeightedZ((1.0,)))
