"""What the guidance scripts ask and count, apart from the pictures: prompts, conditions, intervals, names."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffctrl.drawing.hunt import PipelineSampler
from diffctrl.processors.universe import universe_of
from diffctrl.scripts import find_headsets
from diffctrl.scripts.bench import softpag as bench
from diffctrl.scripts.evaluate_guidance import RANDOM, _best, _carried, _compare, _layers, _share
from diffctrl.scripts.evaluation_guidance import (
    Condition,
    Drawn,
    Read,
    Studio,
    mean_interval,
    paired,
    random_sets,
    styleless_pairs,
    unknown_to,
    unseen_pairs,
)
from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import Goal, HuntConfig, Pair
from diffctrl.softpag.headset import Chosen, HeadSet
from diffctrl.zoo import judge
from tests import tiny
from tests.softpag.hunting import UNIVERSE


def drawn(flags):
    reads = [Read(exact=flag, share=float(flag), facts=[], style=None, sharpness=0.0) for flag in flags]
    return Drawn(Condition(name="x"), torch.empty(0), 0.0, _reads=reads)


def test_prompts_of_search_and_evaluation_are_apart():
    unseen, styleless = unseen_pairs(20), styleless_pairs(20)
    assert len(set(unseen)) == len(set(styleless)) == 20
    used = HeadSet(chosen=(Chosen(Head(0, 0)),), pairs=((unseen[3].prompt, 7), ("a red star", 0)))
    assert unknown_to(unseen, [used]) == [pair for pair in unseen if pair != unseen[3]]
    searched = find_headsets.pairs_of("quality", 24)
    assert min(len(pair.prompt.split()) for pair in searched) >= 10
    assert len({pair.prompt for pair in searched}) == 24
    assert all(judge.parse(pair.prompt).style is None for pair in styleless)
    assert {len(judge.parse(pair.prompt).objects) for pair in unseen[:2]} == {1, 2}
    style = find_headsets.pairs_of("style:soft", 8)
    assert all(judge.parse(pair.prompt).style is None for pair in style)


def test_a_condition_counts_its_rows():
    head = (Head(0, 1),)
    assert [each.rows for each in (Condition(name=""), Condition(name="", s=3.0))] == [1, 2]
    assert Condition(name="", heads=head, s=3.0).rows == 3
    assert Condition(name="", heads=head).sets(2) == [head, head]
    sets = random_sets(UNIVERSE, 3, 5)
    assert Condition(name="", heads=sets).sets(4) == sets[:4]
    assert {len(set(each)) for each in sets} == {3}
    assert random_sets(UNIVERSE, 3, 5) == sets
    assert len(set(sets)) > 1


def test_intervals_are_of_the_pairs():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    mean, low, high = mean_interval(values)
    assert low < 2.0 < high
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20)
    one, other = drawn([True, True, False, True]), drawn([True, False, False, False])
    value, low, high = paired(one, other, lambda read: float(read.exact))
    assert value == 0.5
    assert low < 0.5 < high
    assert paired(one, one, lambda read: float(read.exact)) == (0.0, 0.0, 0.0)


def test_a_bar_holds_where_the_intervals_lie_apart():
    from diffctrl.scripts.evaluate_guidance import BOTH, CFG, HUNTED, LAYER, NONE, SOFT

    good, bad = drawn([True] * 90 + [False] * 10), drawn([True] * 40 + [False] * 60)
    near = drawn([True] * 85 + [False] * 15)
    figures: list = []
    _compare({HUNTED: good, NONE: bad, RANDOM: near, LAYER: bad, SOFT: bad, CFG: near, BOTH: good}, figures)
    bars = {figure.name: figure.as_dict()["holds"] for figure in figures if figure.bar is not None}
    assert list(bars.values()) == [True, False]
    assert _share("x", [True, False]).value == 50.0


def test_a_studio_draws_what_the_pipeline_draws():
    """Every condition through the batched sampler equals a plain call of the pipeline, prompt by prompt."""
    import diffctrl
    from diffctrl.processors import SoftPAGAttnProcessor
    from diffctrl.scripts.evaluation_image import to_bytes

    pipe, pairs = tiny.sd3_pipeline(), unseen_pairs(2)
    heads = universe_of(pipe).heads[:2]
    call = {name: value for name, value in tiny.CALL.items() if name != "guidance_scale"}
    with Studio(pipe, tiny.CALL, 1, 0) as studio:
        for condition in (Condition(name="cfg", s=3.0), Condition(name="both", heads=heads, s=3.0, w=2.0)):
            found = studio.draw(condition, pairs, samples=2)
            processor = SoftPAGAttnProcessor(
                condition.heads or "L0", u=0.5 if condition.heads else 0.0, w=2.0
            )
            with diffctrl.apply(pipe, processor):
                plain = [
                    pipe(
                        pair.prompt,
                        guidance_scale=3.0,
                        generator=torch.Generator().manual_seed(pair.seed),
                        output_type="pt",
                        **call,
                    ).images
                    for pair in pairs
                ]
            apart = found.samples.int() - to_bytes(torch.cat(plain)).int()
            assert apart.abs().max() <= 1
            assert len(found.reads) == 2
    assert studio.forwards == 2 * 3 * (2 + 3)


def test_a_search_counts_what_ran():
    pipe = tiny.sd3_pipeline()
    config = HuntConfig(rounds=1, top=1, mode="prefix", batch=8, prune=False, steady=False)
    call = {**tiny.CALL, "num_inference_steps": 2}
    found = find_headsets.search(
        pipe, "style:soft", "shapes-sd3", call, find_headsets.pairs_of("style:soft", 2), config
    )
    # The set of one head is the best candidate of its round, and drawn once; the loop draws it twice.
    assert found.pictures == (1 + 4) * 2
    assert found.naive_block_rows == (1 + 4 + 1) * 2 * 2 * 2 * 2
    # Two steps of two blocks: 2 rows of the set alone; 8 candidates with 2 conditional rows in the first
    # step and 8 in the second; 8 twins from the first block on, as the batch holds both depths.
    assert found.block_rows == 2 * 2 * 2 + 2 * (2 + 8) + 2 * 2 * 8


class Near:
    """Rewards the picture that a set makes at one scale."""

    version = "1"

    def __init__(self, name, target):
        self.name, self._target = name, target

    def score(self, images, prompts):
        return [-float((image - self._target).abs().mean()) for image in images]


def test_the_best_of_what_was_found_is_chosen_on_other_prompts():
    pipe, config = tiny.sd3_pipeline(), HuntConfig(u=0.5, w=2.0, batch=2)
    call = {**tiny.CALL, "num_inference_steps": 2}
    two = HeadSet(
        chosen=(Chosen(Head(0, 1), 1), Chosen(Head(1, 0), 2)),
        pairs=(("a red star", 3),),
        perturbation=config.perturbation(),
    )
    one = replace(two, chosen=(Chosen(Head(1, 1), 1),))
    others = [Pair("a blue ring", 5)]
    plain = {name: value for name, value in call.items() if name != "guidance_scale"}
    sampler = PipelineSampler(pipe, replace(config, w=1.5), plain)
    (target,) = sampler.sample(others, [two.up_to_round(1).heads])
    sampler.close()
    goal = Goal((Near("near", target),))
    best = find_headsets.best_of(pipe, [one, two], others, goal, config, call)
    assert (best.heads, best.u, best.w) == (two.up_to_round(1).heads, 0.5, 1.5)
    assert len(best.use["tried"]) == 3 * len(find_headsets.SCALES)
    assert best.perturbation["w"] == 2.0  # what the search was run with stays
    assert HeadSet.from_dict(best.to_dict()) == best
    assert unknown_to([*others, Pair("a red star", 9), Pair("a cross", 9)], [best]) == [Pair("a cross", 9)]
    assert find_headsets._told(best).startswith(f"{best} at w = 1.5: 0.000, -")
    sampler = PipelineSampler(pipe, config, plain)
    (unguided,) = sampler.sample(others, [()])
    sampler.close()
    none = find_headsets.best_of(pipe, [one, two], others, Goal((Near("near", unguided),)), config, call)
    assert not len(none)
    assert "no head did better" in find_headsets._told(none)


def test_prompts_to_choose_on_are_not_those_of_the_search():
    for name in find_headsets.NAMES[:2]:
        searched, others = find_headsets.pairs_of(name, 8), find_headsets.pairs_of(name, 8, after=8)
        assert len(others) == 8
        assert not {pair.prompt for pair in searched} & {pair.prompt for pair in others}
        assert not {pair.seed for pair in searched} & {pair.seed for pair in others}
        assert find_headsets.pairs_of(name, 4) == searched[:4] or name == find_headsets.QUALITY


def test_sets_are_evaluated_at_what_they_carry():
    found = HeadSet(chosen=(Chosen(Head(0, 1)),), perturbation={"u": 0.5, "w": 2.0}, use={"u": 0.5, "w": 1.5})
    said = argparse.Namespace(u=None, w=None)
    assert _carried(found, said) == {"u": 0.5, "w": 1.5}
    assert _carried(found, argparse.Namespace(u=0.25, w=3.0)) == {"u": 0.25, "w": 3.0}
    assert _carried(replace(found, use={}), said) == {"u": 0.5, "w": 2.0}


def test_a_peer_gets_its_best_scale():
    with Studio(tiny.sd3_pipeline(), {**tiny.CALL, "num_inference_steps": 1}, 4, 0) as studio:
        layers = _layers(studio)
        best = _best(studio, layers, 1.0, argparse.Namespace(search=1))
    assert best.heads in layers
    assert best.w in find_headsets.SCALES
    assert studio.pictures == len(layers) * len(find_headsets.SCALES)
    assert f"w = {best.w:g}, the best on 1 search prompts" in best.told


def test_the_benchmark_counts_extra_forwards_in_the_window_alone():
    case = bench.CASES[0]
    model = bench.build(case, "cpu", quick=True)
    inputs = bench.inputs_of(model, case, 2, "cpu", quick=True)
    with torch.no_grad():
        figures = bench._counted(
            case, model, inputs, bench._Scheduler(), control_of="L0H1", layout="uncond_cond"
        )
    assert [figure.value for figure in figures] == [1, 0]
    assert (figures[0].low, figures[0].high) == (1, 1)
