"""The evaluation of Radial Attention against patterns of its density: masks, comparisons, that it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffctrl
from diffctrl.attention import BlockLists
from diffctrl.errors import BadRequestError
from diffctrl.processors import RadialAttnProcessor
from diffctrl.radial import Layout, block_lists
from diffctrl.scripts import evaluate_radial, evaluation_radial
from diffctrl.scripts.evaluate_radial import BLOCKS, _figures
from diffctrl.scripts.evaluation_length import ClipRead
from diffctrl.scripts.evaluation_radial import (
    DENSE,
    PUBLISHED,
    RADIAL,
    RIVALS,
    Compared,
    Contender,
    PairedStudio,
    RivalAttnProcessor,
    contenders,
    decibels,
    named,
    rival_blocks,
    rival_lists,
)
from diffctrl.scripts.evaluation_video import VideoSuite, telling, video_suite
from diffctrl.scripts.training_video_vae import SMOKE_SIZE
from diffctrl.zoo.video import VIDEO_TOKENS, video_parts, video_pipeline

CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 17,
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "max_sequence_length": VIDEO_TOKENS,
}
SEED = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With several, a clip drawn twice may differ in the last bits: 92 dB, not the 100 of equal ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    parts = video_parts(SMOKE_SIZE)
    for parameter in parts.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = video_pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def suite() -> VideoSuite:
    return video_suite(2, seed=SEED, frames=17)


@pytest.fixture(scope="module")
def studio(pipe: Any) -> PairedStudio:
    return PairedStudio(pipe, CALL, batch=2, workers=0)


@pytest.fixture(scope="module")
def dense(studio: PairedStudio, suite: VideoSuite) -> Compared:
    return studio.compare(Contender(name=DENSE), suite, SEED, None)


def mask(frames: int, tokens: int, block: int) -> BlockLists:
    pattern, _ = RadialAttnProcessor(PUBLISHED, block=block).resolved("wan", frames)
    return block_lists(pattern, Layout(frames=frames, tokens=tokens))


@pytest.mark.parametrize(("frames", "tokens", "block"), [(17, 64, 64), (17, 64, 8), (33, 64, 8), (9, 10, 4)])
def test_rivals_keep_as_many_blocks_and_their_own(frames: int, tokens: int, block: int) -> None:
    lists = mask(frames, tokens, block)
    kept = lists.to_dense_blocks()[0, 0]
    window, random = (rival_blocks(rival, kept) for rival in RIVALS)
    for rival, blocks in zip(RIVALS, (window, random), strict=True):
        assert torch.equal(blocks.sum(1), kept.sum(1))
        assert blocks.diagonal().all()
        assert not torch.equal(blocks, kept)
        assert torch.equal(rival_blocks(rival, kept), blocks)  # the same in every step and site
        apart = abs(rival_lists(rival, lists).density() - lists.density())
        assert apart <= (1 / len(kept) if frames * tokens % block else 0)
    place = torch.arange(len(kept))
    distance = (place[:, None] - place).abs()
    inside, outside = distance.masked_fill(~window, -1), distance.masked_fill(window, len(kept))
    assert (inside.amax(1) <= outside.amin(1)).all()  # nothing left out is nearer


def test_random_blocks_are_uniform() -> None:
    kept = torch.zeros(400, 400, dtype=torch.bool)
    kept[:, :100] = True
    kept.fill_diagonal_(True)
    share = rival_blocks("random", kept).float().mean(0)
    assert share.mean() == pytest.approx(0.25, abs=0.01)
    assert share.std() == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.2)


def test_densities_are_those_of_the_docstring() -> None:
    table = {
        33: (0.471, 0.668, 0.630, 0.489),
        65: (0.302, 0.458, 0.458, 0.378),
        129: (0.184, 0.293, 0.305, 0.266),
    }
    for frames, wanted in table.items():
        found = [mask((frames - 1) // 2 + 1, 64, block).density() for block in (64, 32, 16, 8)]
        assert found == pytest.approx(wanted, abs=5e-4)
        assert all(f"{value:.3f}" in str(evaluate_radial.__doc__) for value in found)


def test_contenders_of_shapes_wan() -> None:
    pipe = video_pipeline(video_parts())
    call = {"height": 64, "width": 64, "num_frames": 33}
    made = contenders(pipe, call, BLOCKS)
    assert [one.name for one in made] == [
        DENSE,
        *(named(shape, block) for block in BLOCKS for shape in (RADIAL, *RIVALS)),
    ]
    found = [one.lists.density() for one in made if one.lists]
    assert found == pytest.approx([136 / 289] * 3 + [9046 / 136**2] * 3)
    schedules = {one.processor.resolved("wan", 17)[1] for one in made if one.processor}
    (schedule,) = schedules
    assert (schedule.first(20), schedule.first(50), schedule.last(20), schedule.blocks) == (5, 12, 0, 1)
    for frames in (33, 65, 129):  # a longer clip changes nothing but the mask
        assert {one.processor.resolved("wan", frames)[1] for one in made if one.processor} == schedules
    with pytest.raises(BadRequestError, match="leave nothing out of 2 frames of 64 tokens"):
        contenders(pipe, {**call, "num_frames": 3}, [64])


def test_a_rival_differs_in_the_mask_alone(pipe: Any, suite: VideoSuite) -> None:
    published: dict[str, list[Any]] = {}

    def spied(processor: RadialAttnProcessor, name: str) -> RadialAttnProcessor:
        prepare, seen = processor.prepare, published.setdefault(name, [])

        def spy(*arguments: Any) -> Any:
            seen.append(prepare(*arguments))
            return seen[-1]

        processor.prepare = spy  # type: ignore[method-assign]
        return processor

    config = replace(PUBLISHED, block=16)
    rivals = {rival: RivalAttnProcessor(rival, config) for rival in RIVALS}
    for name, processor in {RADIAL: RadialAttnProcessor(config), **rivals}.items():
        with diffctrl.apply(pipe, spied(processor, name)):
            pipe(suite.captions[:1], output_type="latent", **CALL)
    lists = mask(9, 16, 16)
    for name, seen in published.items():
        # Four steps, two forwards each; the first and the last step are dense, and so is the first block.
        assert [each is None for each in seen] == [True] * 2 + [False] * 4 + [True] * 2
        wanted = lists if name == RADIAL else rival_lists(name, lists)  # type: ignore[arg-type]
        assert all(dict(each.masks) == {"blocks.1.attn1": wanted} for each in seen if each)


def test_clips_are_compared_with_their_own(studio: PairedStudio, suite: VideoSuite, dense: Compared) -> None:
    assert len(dense.clips) == len(dense.reads) == 2
    assert dense.psnr == []
    again = studio.compare(Contender(name="again"), suite, SEED, dense)
    assert again.psnr == [100.0, 100.0]
    other = studio.compare(Contender(name="other noise"), suite, SEED + 1, dense)
    assert max(other.psnr) < 40
    black, grey = np.zeros((1, 3, 2, 2), np.uint8), np.full((1, 3, 2, 2), 51, np.uint8)
    assert decibels([black, grey], [grey, grey]) == pytest.approx([-20 * math.log10(0.2), 100.0])


def test_a_rival_with_the_same_mask_draws_the_same(
    studio: PairedStudio, suite: VideoSuite, dense: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {one.name: one for one in contenders(studio.pipe, CALL, [16])}
    radial, window, random = (
        studio.compare(ways[named(shape, 16)], suite, SEED, dense) for shape in (RADIAL, *RIVALS)
    )
    assert len({tuple(each.psnr) for each in (radial, window, random)}) == 3
    assert radial.density == window.density == random.density
    monkeypatch.setattr(evaluation_radial, "rival_lists", lambda rival, lists: lists)
    same = studio.compare(ways[named("window", 16)], suite, SEED, dense)
    assert same.psnr == radial.psnr
    assert np.array_equal(same.clips[0], radial.clips[0])


def test_a_mask_that_is_not_the_announced_one_is_refused(
    studio: PairedStudio, suite: VideoSuite, dense: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(contenders(studio.pipe, CALL, [16])[1], lists=mask(9, 16, 4))
    with pytest.raises(RuntimeError, match="ran, not"):
        studio.compare(wrong, suite, SEED, dense)
    off = replace(wrong, processor=RadialAttnProcessor(dense_fraction=1.0))
    with pytest.raises(RuntimeError, match="density None ran"):
        studio.compare(off, suite, SEED, dense)
    blocks = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    monkeypatch.setattr(
        evaluation_radial,
        "rival_lists",
        lambda rival, lists: BlockLists.from_dense_blocks(blocks, lists.block, lists.lengths),
    )
    with pytest.raises(RuntimeError, match="more than Radial Attention"):
        contenders(studio.pipe, CALL, [16])


def made(psnr: list[float], right: list[bool]) -> Compared:
    reads = [ClipRead((("direction", flag),), 0.0, 0.0) for flag in right]
    return Compared(Contender(name=""), reads, 0.5, psnr=psnr)


def test_bars_hold_where_the_intervals_lie_apart() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 200)
    right, wrong = [True] * 180 + [False] * 20, [True] * 100 + [False] * 100
    drawn = {
        DENSE: made([], right),
        "radial, blocks of 64": made(list(30 + noise), right),
        "window, blocks of 64": made(list(25 + noise), wrong),
        "random, blocks of 64": made(list(29.9 + noise), right),
    }
    found = {figure.name: figure.as_dict() for figure in _figures("all forms", drawn, [64])}
    between = "all forms: PSNR to dense: room between the intervals of radial and {}, blocks of 64"
    assert [found[between.format(rival)]["holds"] for rival in RIVALS] == [True, False]
    minus = found["all forms: PSNR to dense: radial minus random, blocks of 64"]
    assert (minus["value"], minus["low"]) == pytest.approx((0.1, 0.1))  # paired: it is always there
    points = found["all forms: direction: radial minus window, blocks of 64"]
    assert (points["value"], points["low"] > 0) == (pytest.approx(40), True)
    assert found["all forms: direction: radial minus dense, blocks of 64"]["value"] == 0
    assert not any("PSNR to dense: dense" in name or "reappears" in name for name in found)
    assert all(figure.bar is None for figure in _figures("behind the wall", drawn, [64]))


def test_it_runs_and_writes_its_figures(tmp_path: Path) -> None:
    out, picture = tmp_path / "radial.json", tmp_path / "frames.png"
    evaluate_radial.main(["--quick", "--out", str(out), "--picture", str(picture)])
    found = json.loads(out.read_text())
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert found["topic"] == "radial_quality"
    assert found["call"]["num_frames"] == 17
    for block, density in ((16, 55 / 81), (4, 1002 / 1296)):
        for shape in (RADIAL, *RIVALS):
            assert figures[f"density: {named(shape, block)}"]["value"] == pytest.approx(density)
            assert figures[f"all forms: PSNR to dense: {named(shape, block)}"]["value"] < 90
            assert f"behind the wall: reappears: {named(shape, block)}" in figures
    assert "behind the wall: reappears: dense" in figures
    assert sum(figure["bar"] is not None for figure in found["figures"]) == 4
    assert Image.open(picture).width > Image.open(picture).height


def test_without_weights_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffctrl.zoo import registry

    with pytest.raises(SystemExit):
        evaluate_radial.main(["--model", str(tmp_path)])
    assert "it has no diffctrl.json" in capsys.readouterr().err
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    with pytest.raises(SystemExit):
        evaluate_radial.main([])
    assert "scripts/train_zoo_video.py trains" in capsys.readouterr().err


def test_the_picture_shows_the_first_clip_in_which_something_is_hidden() -> None:
    suite = video_suite(16, seed=65_000)
    hidden = [index for index, facts in enumerate(suite.facts) if "behind" in str(facts.objects[0].motion)]
    assert telling(suite, 16) == hidden[0] > 0
    assert telling(suite, hidden[0]) == 0
