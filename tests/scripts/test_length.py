"""The evaluation of length LoRAs: what it counts, its claims, and that it runs."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.length import read as read_lora
from diffctrl.pipelines.length_models import WanVelocity
from diffctrl.scripts import evaluate_length, evaluate_length_error
from diffctrl.scripts.bench import length as bench_length
from diffctrl.scripts.bench.forwards import Times
from diffctrl.scripts.evaluate_length import BASE, DENSE, MASKED, RADIAL, UNMASKED, _figures
from diffctrl.scripts.evaluation_length import ClipRead, Condition, Drawn, Studio, bootstrapped, paired, read
from diffctrl.scripts.evaluation_video import judged, straight_suite, video_suite
from diffctrl.scripts.training_video_vae import SMOKE_SIZE
from diffctrl.zoo import clips, judge
from diffctrl.zoo.video import VIDEO_TOKENS, video_parts, video_pipeline
from tests.length.models import lora_file, wan


def drawn(name: str, right: list[bool], drift: float = 0.1) -> Drawn:
    reads = [ClipRead((("direction", flag),), drift, math.nan) for flag in right]
    return Drawn(Condition(name=name), reads)


def test_the_claims_hold_where_they_do() -> None:
    good, bad = [True] * 95 + [False] * 5, [False] * 60 + [True] * 40
    made = [
        drawn(BASE, bad, 0.3),
        drawn(MASKED, bad),
        drawn(RADIAL, good),
        drawn(DENSE, [True] * 96 + good[96:]),
    ]
    found = {figure.name: figure.as_dict() for figure in _figures("straight moves", made)}
    apart = found[f"straight moves: direction: room between the intervals of {RADIAL} and {BASE}"]
    close = found[f"straight moves: direction: {RADIAL} minus {DENSE}"]
    assert (apart["holds"], close["holds"], close["value"]) == (True, True, pytest.approx(-1))
    assert found[f"straight moves: colour drift: {RADIAL} minus {BASE}"]["value"] == pytest.approx(-0.2)
    assert not any("size drift" in name for name in found)  # none could be told
    worse = [drawn(BASE, bad), drawn(RADIAL, bad), drawn(DENSE, good)]
    claims = [f.as_dict()["holds"] for f in _figures("straight moves", worse) if f.bar is not None]
    assert claims == [False, False]
    unbarred = _figures("all forms", worse)  # too few of them go straight to tell two points
    assert any(f"{RADIAL} minus {DENSE}" in figure.name for figure in unbarred)
    assert all(figure.bar is None for figure in unbarred)


def test_a_condition_is_told_in_a_line() -> None:
    assert drawn(RADIAL, [True, True, False]).line() == f"{RADIAL}: direction 66.7% (3)"


def test_paired_intervals_leave_out_what_cannot_be_told() -> None:
    assert paired([1.0, math.nan, 3.0], [0.0, 1.0, 2.0]) == (1.0, 1.0, 1.0)
    assert all(math.isnan(value) for value in bootstrapped([]))
    value, low, high = bootstrapped([0.0, 1.0] * 50)
    assert value == 0.5
    assert low == pytest.approx(0.4, abs=0.02)
    assert high == pytest.approx(0.6, abs=0.02)


def test_straight_moves_are_straight_and_unseen() -> None:
    suite = straight_suite(20, seed=67_000)
    assert len(suite.scenes) == len(suite.facts) == len(suite.captions) == 20
    for index, (facts, caption) in enumerate(zip(suite.facts, suite.captions, strict=True)):
        assert {one.motion for one in facts.objects} & {
            f"moves {way}" for way in ("left", "right", "up", "down")
        }
        assert clips.parse(caption) == facts
        one = suite.scenes.select([index])
        assert judge.check_clip(clips.render(one, 64)[0][0], facts).facts["motion"]


def test_clips_are_read_as_the_models_own_evaluation_reads_them() -> None:
    suite = video_suite(2, seed=3, forms=("wall",))
    videos = clips.render(suite.scenes, 64)[0]
    reads = [
        read((video * 255).round().byte().numpy(), wanted)
        for video, wanted in zip(videos, suite.facts, strict=True)
    ]
    whole = judged(videos, suite)
    for kind, flags in whole.items():
        assert [right for one in reads for name, right in one.facts if name == kind] == flags
    assert whole["reappears"] == [True, True]
    assert all(one.colour_drift < 0.05 and one.size_drift < 0.05 for one in reads)
    assert read(np.zeros((17, 3, 32, 32), np.uint8), suite.facts[0]).facts[0] == ("exact", False)


@torch.no_grad()
def test_clips_are_decoded_whole_as_the_pipeline_decodes_them() -> None:
    torch.manual_seed(0)
    pipe = video_pipeline(video_parts(replace(SMOKE_SIZE, layers=1)))
    pipe.vae.register_to_config(latents_mean=[0.5] * 8, latents_std=[0.5, 2.0] * 4)
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0}
    studio = Studio(pipe, {**call, "max_sequence_length": VIDEO_TOKENS}, batch=2, workers=0)
    mine = torch.tensor(np.stack([*studio._videos(Condition(name=BASE), ["a red circle", ""], seed=3)]))
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    stock = pipe(["a red circle", ""], generator=noise, output_type="pt", **studio.call).frames
    assert stock.std() > 0.05
    torch.testing.assert_close(mine / 255, stock, atol=0.51 / 255, rtol=0)


def test_it_runs_and_writes_its_figures(tmp_path: Path) -> None:
    picture = tmp_path / "frames.png"
    evaluate_length.main(["--quick", "--out", str(tmp_path / "length.json"), "--picture", str(picture)])
    assert Image.open(picture).width > Image.open(picture).height  # eight frames, five ways
    found = json.loads((tmp_path / "length.json").read_text())
    names = [figure["name"] for figure in found["figures"]]
    for condition in (BASE, MASKED, RADIAL, DENSE, "2 short clips"):
        assert f"straight moves: direction: {condition}" in names
        assert f"behind the wall: reappears: {condition}" in names
    sparse = next(f for f in found["figures"] if f["name"] == f"all forms: exact: {RADIAL}")
    assert "density 0.9" in sparse["note"]
    assert found["loras"]["radial"]["steps"] == 2
    assert str(tmp_path.parent) not in json.dumps(found["loras"])


def test_the_loras_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "length.json"
    only = ["--quick", "--no-base", "--unmasked", "--validation", "--set", "dense_last_steps=1"]
    evaluate_length.main([*only, "--out", str(out), "--picture", str(tmp_path / "a.png")])
    found = json.loads(out.read_text())
    names = [figure["name"] for figure in found["figures"]]
    assert any(name == f"behind the wall: reappears: {RADIAL} minus {DENSE}" for name in names)
    ways = {RADIAL, UNMASKED, DENSE}
    assert {name.rpartition(": ")[2] for name in names if " minus " not in name} == ways
    assert found["set"] == ["dense_last_steps=1"]
    told = capsys.readouterr().out  # of each before the next is drawn: a machine may go away in between
    assert 0 <= told.find(f"behind the wall: {RADIAL}: ") < told.rfind(f"  {UNMASKED}: 1 of 1")
    assert not {*found["seeds"]} & {*evaluate_length._SEEDS.values()}


def test_no_base_wants_two_loras(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate_length.main(["--no-base"])
    assert "give --dense as well" in capsys.readouterr().err


def test_loras_of_unequal_effort_or_other_methods_are_refused(tmp_path: Path) -> None:
    pipe = wan()

    def written(name: str, method: str, **training: int) -> str:
        return str(lora_file(tmp_path / f"{name}.safetensors", pipe, method=method, training=training))

    def compared(radial: str, dense: str) -> list[str]:
        options = argparse.Namespace(
            radial=radial, dense=dense, no_base=False, unmasked=False, set=[], frames=33
        )
        return [condition.name for condition in evaluate_length._conditions(options, 17)[0]]

    radial = written("radial", "radial", steps=5, batch=2)
    assert compared(radial, written("equal", "dense", steps=5, batch=2))[2:4] == [RADIAL, DENSE]
    # Three steps that began with a LoRA of two.
    assert compared(radial, written("same", "dense", steps=3, earlier_steps=2, batch=2))[2:4] == [
        RADIAL,
        DENSE,
    ]
    unequal = {"longer": {"steps": 5, "earlier_steps": 5, "batch": 2}, "larger": {"steps": 5, "batch": 4}}
    for name, training in unequal.items():
        with pytest.raises(BadRequestError, match="not of equal steps, batch and rank"):
            compared(radial, written(name, "dense", **training))
    with pytest.raises(BadRequestError, match="was trained with radial attention"):
        compared(radial, radial)


def test_dense_steps_are_the_callers_and_the_mask_is_the_loras(tmp_path: Path) -> None:
    radial = lora_file(tmp_path / "radial.safetensors", wan())
    lora = read_lora(radial)

    def conditions(*given: str, unmasked: bool = False) -> list[Condition]:
        options = argparse.Namespace(
            radial=str(radial), dense=None, no_base=False, unmasked=unmasked, set=given, frames=33
        )
        return evaluate_length._conditions(options, 17)[0]

    assert {one.name: one.mask for one in conditions()}[RADIAL] == lora.mask
    masks = {one.name: one.mask for one in conditions("dense_steps=3", "dense_last_steps=4")}
    assert lora.mask is not None
    changed = replace(lora.mask, dense_fraction=None, dense_steps=3, dense_last_steps=4)
    assert masks[RADIAL] == masks[MASKED] == changed
    unmasked = next(one for one in conditions(unmasked=True) if one.name == UNMASKED)
    assert (unmasked.lora, unmasked.mask) == (radial, None)
    with pytest.raises(
        BadRequestError, match=r"another mask than the LoRA's: sink=False \(trained with True"
    ):
        conditions("sink=false")
    with pytest.raises(BadRequestError, match="no option 'dense_step'"):
        conditions("dense_step=3")


def test_the_error_of_a_level_is_that_of_its_attention(tmp_path: Path) -> None:
    """Dense where the LoRA's runs are, and under its mask elsewhere."""
    options = argparse.Namespace()
    evaluate_length.make_quick(options, tmp_path)
    options.n, options.batch = 2, 1
    pipe = ModelSource.find(options.model).load(torch.float32)
    for value in pipe.transformer.parameters():  # gates start at zero, and all errors would be equal
        if not value.any():
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(value.numel()))
    model = WanVelocity(pipe, 32)
    samples = evaluate_length_error._samples(model, options, ("wall",), 33, 32, torch.device("cpu"))
    masked = evaluate_length_error.Subject.of(options.radial)
    assert masked.name == "radial"
    dense = replace(masked, lora=replace(masked.lora, method="dense", radial=None))

    def errors(subject: evaluate_length_error.Subject, part: float) -> list[float]:
        return evaluate_length_error._errors(model, subject, samples, part, 0.5)

    assert len(errors(dense, 0.5)) == 2
    assert errors(masked, 0.02) == errors(dense, 0.02) == errors(dense, 0.5)  # all of level 0.5
    assert masked.is_dense(0.02)
    assert errors(masked, 0.5) != errors(dense, 0.5)
    assert not masked.is_dense(0.5)


def test_unknown_forms_and_missing_plots_are_refused_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        (["--form", "walls"], "invalid choice: 'walls'"),
        (["--picture", "a.png"], "diffctrl[plots]"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            evaluate_length_error.main([*arguments, "--lora", "nowhere"])
        assert said in capsys.readouterr().err
        monkeypatch.undo()


def test_errors_by_level_are_written_and_drawn(tmp_path: Path) -> None:
    picture, out = tmp_path / "error.png", tmp_path / "error.json"
    evaluate_length_error.main(["--quick", "--out", str(out), "--picture", str(picture)])
    assert Image.open(picture).width > 500
    figures = json.loads(out.read_text())["figures"]
    assert len(figures) == 3 * len(evaluate_length_error.PARTS)
    ratio, error, other = figures[-1], figures[-3], figures[-2]
    assert ratio["name"] == "0.9 of the run: radial over dense"
    assert ratio["note"] == "noise level 0.250, 2 clips, under the mask"
    assert ratio["value"] == pytest.approx(error["value"] / other["value"], rel=1e-2)


def test_without_weights_or_loras_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffctrl.zoo import registry

    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    with pytest.raises(SystemExit):
        evaluate_length.main([])
    assert "scripts/train_zoo_video.py trains" in capsys.readouterr().err


def test_the_benchmark_runs_and_adds_up(tmp_path: Path) -> None:
    bench_length.main(["--dry-run", "--part", "wan", "--out", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert [figure["name"] for figure in found] == [
        "wan: training step, dense",
        "wan: training step, radial",
        "wan: training step, speed-up of radial",
    ]
    assert "density 0." in found[2]["note"]
    # One second for each block and one besides; under the mask half, but for the first two blocks.
    dense = {"one": Times([3.0] * 3, 0), "a": Times([4.0] * 3, 0), "b": Times([4.0] * 3, 0)}
    radial = {"one": Times([2.0] * 3, 0), "a": Times([2.5] * 3, 0), "b": Times([2.5] * 3, 0)}
    counts = {"a": 20, "b": 40}
    assert bench_length.whole({"dense": dense, "radial": radial}, counts, sparse=False).median == 61.0
    assert bench_length.whole({"dense": dense, "radial": radial}, counts, sparse=True).median == 32.0
