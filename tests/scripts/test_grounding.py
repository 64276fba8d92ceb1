"""Datasets that a user has, the ladder and the choice of settings, on tiny models and folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffctrl.refam import RefAMConfig
from diffctrl.refam.locate import centre, mask_of, peak
from diffctrl.refam.metrics import average_precision
from diffctrl.refam.presets import preset, write_preset
from diffctrl.scripts import evaluate_grounding
from diffctrl.scripts import grounding_data as data
from diffctrl.scripts import grounding_ladder as ladder
from diffctrl.scripts.grounding_calibration import Calibration, block_ranges
from tests.refam.models import sd3, wan


def _counts(mask):
    """Run lengths down the columns, beginning with zeros."""
    flat = mask.numpy().T.flatten()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int), [2]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def _compressed(counts):
    """COCO's letters, as its own code writes them."""
    text = ""
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            bits, value = value & 0x1F, value >> 5
            more = value != (-1 if bits & 0x10 else 0)
            text += chr(48 + (bits | (0x20 if more else 0)))
    return text


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_plain_and_compressed(seed):
    mask = torch.zeros(40, 70, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        row, column = (int(torch.randint(0, n, (1,), generator=generator)) for n in (30, 60))
        mask[row : row + 9, column : column + 7] = True
    counts = _counts(mask)
    assert torch.equal(data.coco_mask({"counts": counts}, (40, 70)), mask)
    assert torch.equal(data.coco_mask({"counts": _compressed(counts)}, (40, 70)), mask)


def test_polygons():
    mask = data.coco_mask([[10, 5, 30, 5, 30, 15, 10, 15]], (20, 40))
    assert mask.shape == (20, 40)
    assert mask[10, 20]
    assert not mask[2, 20]
    assert 200 <= int(mask.sum()) <= 240


@pytest.fixture
def refcoco(tmp_path):
    folder = tmp_path / "refcoco"
    folder.mkdir()
    pictures = tmp_path / "images" / "mscoco" / "images" / "train2014"
    pictures.mkdir(parents=True)
    Image.new("RGB", (40, 20), (9, 9, 9)).save(pictures / "one.jpg")
    sentences = [{"sent": "left thing"}, {"sent": "the dark thing"}]
    references = [
        {"split": "val", "image_id": 3, "ann_id": 8, "sentences": sentences},
        {"split": "train", "image_id": 3, "ann_id": 8, "sentences": sentences},
    ]
    (folder / "refs(unc).json").write_text(json.dumps(references))
    instances = {
        "images": [{"id": 3, "file_name": "one.jpg", "height": 20, "width": 40}],
        "annotations": [{"id": 8, "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return tmp_path


def test_refcoco(refcoco):
    samples = data.refcoco_samples(refcoco, "refcoco", "val", None)
    assert [s.expression for s in samples] == ["left thing", "the dark thing"]
    assert {s.scene for s in samples} == {3}
    assert samples[0].picture().size == (40, 20)
    assert samples[0].truth().shape == (20, 40)
    assert len(data.refcoco_samples(refcoco, "refcoco", "val", 1)) == 1
    with pytest.raises(ValueError, match="it has train, val"):
        data.refcoco_samples(refcoco, "refcoco", "testA", None)
    with pytest.raises(ValueError, match="is not there"):
        data.refcoco_samples(refcoco, "refcocog", "val", None)


def test_davis(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        data.davis_samples(tmp_path, None)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    (tmp_path / "davis_text_annotations").mkdir()
    lines = 'bear 1 "a brown bear"\nbear 2 "a stone"\ncar 1 "a car"\n'
    (tmp_path / "davis_text_annotations" / "Davis17_annot1.txt").write_text(lines)
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "480p" / "bear").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (40, 20)).save(tmp_path / "JPEGImages" / "480p" / "bear" / f"{index:05d}.jpg")
        objects = np.zeros((20, 40), dtype=np.uint8)
        objects[:, index : index + 5], objects[:3, 30:] = 1, 2
        mask = Image.fromarray(objects, mode="P")
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask.save(tmp_path / "Annotations" / "480p" / "bear" / f"{index:05d}.png")
    samples = data.davis_samples(tmp_path, None)
    assert [s.expression for s in samples] == ["a brown bear", "a stone"]
    assert [frame.size for frame in samples[0].picture()] == [(40, 20)] * 3
    assert [int(frame.sum()) for frame in samples[0].truth()] == [100] * 3
    assert int(samples[1].truth()[0].sum()) == 30


def _world(count=6):
    return data.world_samples(count, seed=7, size=32)


def test_the_worlds_samples_share_no_scene():
    samples = data.world_samples(13, seed=7, size=32)
    assert len(samples) == 13
    assert len({s.scene for s in samples}) == 13
    assert [s.split for s in samples[:3]] == ["colour"] * 3
    again = data.world_samples(3, seed=7, size=32, splits=("stop words",))
    assert len(again) == 9
    assert len({s.scene for s in again}) == 3
    assert not data.world_samples(1, seed=7, size=32, splits=("none",))[0].truth().any()


def test_clips_are_referred_to_by_what_tells_the_two_apart():
    samples = data.clip_samples(6, seed=3, size=32)
    assert [s.split for s in samples] == ["clips by colour", "clips by shape", "clips by motion"] * 2
    assert samples[0].expression.endswith(" one")
    assert samples[2].expression.startswith("the one that ")
    for sample in samples:
        assert sample.picture().shape == (17, 3, 32, 32)
        assert sample.truth().shape == (17, 32, 32)
        assert sample.truth().any()


def test_every_rung_is_what_its_settings_say():
    pipe, samples = sd3(), _world()
    rungs = ladder.rungs_of(RefAMConfig(encoder="clip", blocks="0-1"))
    ladder.climb(pipe, samples, rungs, batch=4)
    assert [len(rung.answers) for rung in rungs] == [6] * 7
    for rung in rungs[1:]:
        for sample, answer in zip(samples, rung.answers, strict=True):
            found = pipe(sample.picture(), sample.expression, config=rung.config)
            assert answer.overlap == ladder.measured(found, sample.truth()).overlap
    plain, stop = rungs[0], rungs[1]
    assert [a.precision for a in plain.answers] != [a.precision for a in stop.answers]
    # The noun phrase matters where a relation is said, and only there.
    changed = [a.precision != b.precision for a, b in zip(rungs[1].answers, rungs[2].answers, strict=True)]
    assert [s.split in ("relation", "occlusion", "position") for s in samples] == changed


def test_priors_need_no_model():
    samples = _world()
    middle, box = ladder.priors(samples, 0.04, seed=0)
    for rung in (middle, box):
        assert all(a.overlap[1] >= 40 for a in rung.answers)  # a box of 4 % is 41 pixels
    assert [a.precision for a in middle.answers] != [a.precision for a in box.answers]


# --- clips --------------------------------------------------------------------------------------------------


def _clips(count=3):
    return data.clip_samples(count, seed=7, size=32)


@pytest.fixture
def pipe(monkeypatch):
    """A Wan that sees clips at their own size: a token is four pixels, a latent frame two frames."""
    made = wan()
    monkeypatch.setattr(made.reader, "area", 32 * 32)
    return made


@pytest.mark.parametrize(
    ("frames", "latent", "wanted"),
    [(9, 3, [0, 1, 1, 1, 1, 2, 2, 2, 2]), (5, 3, [0, 1, 1, 2, 2]), (3, 3, [0, 1, 2])],
)
def test_the_latent_frame_of_each_frame(frames, latent, wanted):
    assert ladder.latent_frames_of(frames, latent) == wanted


def test_a_clip_is_answered_frame_by_frame(pipe):
    samples = _clips()
    rungs = ladder.rungs_of(RefAMConfig(blocks="0-1"))
    ladder.climb(pipe, samples, rungs, batch=4, frames=17)
    for rung in rungs[1:]:
        for sample, answer in zip(samples, rung.answers, strict=True):
            found = pipe(sample.picture(), sample.expression, frames=17, config=rung.config)
            truth, size = sample.truth(), found.size
            at = ladder.latent_frames_of(17, 9)
            assert len(found.frame_maps) == 9
            points = [centre(*peak(heat), tuple(heat.shape), size) for heat in found.frame_maps]
            shown = [frame for frame in range(17) if truth[frame].any()]
            hits = [bool(truth[f][int(points[at[f]][1]), int(points[at[f]][0])]) for f in shown]
            assert answer.hit == pytest.approx(sum(hits) / len(shown))
            masks = [mask_of(found.frame_maps[at[f]], points[at[f]], size, "region") for f in range(17)]
            assert answer.overlap == (
                sum(int((masks[f] & truth[f]).sum()) for f in shown),
                sum(int((masks[f] | truth[f]).sum()) for f in shown),
            )
    plain, stop = rungs[0], rungs[1]
    assert [a.precision for a in plain.answers] != [a.precision for a in stop.answers]
    assert {a.track.j for a in plain.answers} != {a.track.j for a in stop.answers}


def test_plain_maps_of_a_clip_are_of_each_latent_frame(pipe):
    (sample,) = _clips(1)
    config = ladder.bare_of(RefAMConfig(blocks="0-1"))
    (weighed,) = pipe.weigh([(sample.picture(), sample.expression)], config, frames=17)
    found = ladder.plain_grounding(weighed, pipe.conclude(weighed, config), config, pipe)
    columns = [i for i, token in enumerate(weighed.rows.table.tokens) if token.kind not in ("pad", "context")]
    maps = weighed.weights.i2t[:, columns].sum(1).mean(0).view(9, 8, 8)
    torch.testing.assert_close(found.frame_maps, maps)
    masks = [mask_of(heat, centre(*peak(heat), (8, 8), (32, 32)), (32, 32), "region") for heat in maps]
    assert torch.equal(found.track[0::2], torch.stack(masks))
    assert torch.equal(found.track[1::2], torch.stack(masks[1:]))


def test_a_track_that_is_right_is_measured_as_right(pipe):
    (sample,) = _clips(1)
    found = pipe(sample.picture(), sample.expression)
    truth = torch.zeros(9, 32, 32, dtype=torch.bool)
    truth[0, :8, :8], truth[1:5, 8:16, :8] = True, True  # gone in the last latent frame
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 0], maps[1, 1, 0], maps[2, 3, 3] = 1.0, 1.0, 1.0
    right = replace(found, frame_maps=maps, track=truth)
    answer = ladder.measured(right, truth)
    assert (answer.hit, answer.track.j, answer.track.f) == (1.0, 1.0, 1.0)
    assert answer.overlap == (5 * 64, 5 * 64)
    late = replace(found, frame_maps=maps.roll(1, 0), track=truth.roll(4, 0))
    assert ladder.measured(late, truth).hit == 0.0


def test_priors_and_what_points_can_reach_on_clips():
    samples = _clips(6)
    middle, box = ladder.priors(samples, 0.04, seed=0)
    for rung in (middle, box):
        assert all(a.track is not None and a.overlap[1] >= 17 * 40 for a in rung.answers)
    assert 0 < ladder.reachable(samples, 8) < ladder.reachable(samples, 2) <= 100
    assert ladder.reachable(samples, 1) == 100.0


def test_settings_for_clips_count_every_latent_frame(pipe):
    samples = _clips()
    calibration = Calibration(pipe, samples, batch=3, frames=17)
    calibration.run(RefAMConfig())
    chosen = next(t for t in calibration.tried if t.config.blocks == "1" and t.config.normalise == "full")
    hits, precisions = [], []
    for sample in samples:
        maps = pipe(sample.picture(), sample.expression, frames=17, config=chosen.config).frame_maps
        grid = maps.shape[1:]
        truths = [sample.truth()[frame] for frame in range(0, 17, 2)]  # the later one of two
        each = []
        for heat, truth in zip(maps, truths, strict=True):
            seen = truth[32 // grid[0] // 2 :: 32 // grid[0], 32 // grid[1] // 2 :: 32 // grid[1]]
            if bool(seen.any()):
                each.append((float(seen[peak(heat)]), average_precision(heat, seen)))
        hits.append(sum(hit for hit, _ in each) / len(each))
        precisions.append(sum(precision for _, precision in each) / len(each))
    assert chosen.pointing == pytest.approx(100 * sum(hits) / len(hits))
    assert chosen.precision == pytest.approx(100 * sum(precisions) / len(precisions), rel=1e-4)


def test_the_command_measures_the_video_model_at_its_own_size(tmp_path, capsys):
    out = tmp_path / "clips.json"
    evaluate_grounding.main(["--model", "shapes-wan", "--data", "clips", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    values = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert found["topic"] == "grounding_clips"
    assert values["+ magnets (full RefAM): J&F"] > values["centre prior: J&F"]
    assert 80 < values["reachable: pointing accuracy"] <= 100
    assert "clips by motion" in capsys.readouterr().out
    assert torch.is_grad_enabled()


def test_settings_are_chosen_by_both_measures(tmp_path):
    calibration = Calibration(sd3(), _world(), batch=6)
    best = calibration.run(RefAMConfig())
    assert calibration.blocks == 2
    assert best.value >= max(t.value for t in calibration.tried) - 0.25
    tried = {
        (t.config.direction, t.config.encoder, t.config.blocks, t.config.sigma) for t in calibration.tried
    }
    assert len(tried) == 2 * 2 * 3 * 4
    # What was tried in one pass is what grounding does with these settings.
    chosen = next(t for t in calibration.tried if t.config.blocks == "1" and t.config.direction == "i2t")
    hits = 0
    for sample in _world():
        x, y = sd3()(sample.picture(), sample.expression, config=chosen.config).point
        hits += bool(sample.truth()[int(y), int(x)])
    assert chosen.pointing == pytest.approx(100 * hits / 6)
    default = RefAMConfig().as_dict()
    settings = {n: v for n, v in best.config.as_dict().items() if v != default[n]}
    write_preset(tmp_path / "p.json", "m", settings, {"why": 1})
    assert RefAMConfig.from_dict(json.loads((tmp_path / "p.json").read_text())["settings"]) == best.config
    with pytest.raises(ValueError, match="no option"):
        write_preset(tmp_path / "p.json", "m", {"blocs": "1"}, {})


def test_the_shipped_preset_is_whole():
    found = preset("shapes-sd3")
    assert found is not None
    assert found.evidence["tried"] > 100
    assert preset("no-model") is None


def test_ranges_of_blocks():
    assert block_ranges(3, 1) == ["0", "1", "2", "0-1", "1-2", "0-2"]
    assert block_ranges(6, 3) == ["0-2", "0-5", "3-5"]
