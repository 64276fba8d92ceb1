"""The world of clips, its captions, and the judge that reads them."""

from dataclasses import replace

import pytest
import torch

from diffctrl.zoo import clips, judge
from diffctrl.zoo.clips import vocabulary as v
from diffctrl.zoo.tokenizers import t5_tokenizer


@pytest.fixture(scope="module")
def many():
    return clips.sample(600, seed=7)


def _uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, clips.CAPTION_UNIFORMS, generator=torch.Generator().manual_seed(seed))


def test_the_same_key_gives_the_same_clips_and_another_does_not():
    first, again, other = (clips.sample(20, seed=3, index=index) for index in (1, 1, 2))
    assert all(torch.equal(value, again.tensors()[name]) for name, value in first.tensors().items())
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.x, clips.sample(20, seed=3, index=1, split="test").x)


def test_objects_stay_inside_apart_and_of_their_split(many):
    pose = clips.poses(many)
    present = many.present[:, None].expand_as(pose.x)
    for place in (pose.x, pose.y):
        assert (place - pose.radius)[present].min() > 0.04
        assert (place + pose.radius)[present].max() < 0.96
    assert pose.radius[present].min() > 0.07
    pairs = many.count == 2
    apart = torch.hypot(pose.x[..., 0] - pose.x[..., 1], pose.y[..., 0] - pose.y[..., 1]) - pose.radius.sum(
        -1
    )
    assert apart[pairs].min() > 0.05
    assert (many.colour[pairs, 0] != many.colour[pairs, 1]).all()
    shown = many.present
    assert not v.held_out(many.colour, many.shape, many.motion)[shown].any()
    kept = clips.sample(50, seed=7, split="heldout")
    assert v.held_out(kept.colour, kept.shape, kept.motion)[:, 0].all()
    turning = (many.motion == v.CLOCKWISE) | (many.motion == v.COUNTERCLOCKWISE)
    assert not (turning & (many.shape == 0) & shown).any()


@pytest.mark.parametrize("frames", [17, 129])
def test_other_lengths_are_the_same_world(frames):
    long = clips.sample(200, seed=2, frames=frames)
    pose = clips.poses(long)
    present = long.present[:, None].expand_as(pose.x)
    assert pose.x.shape[1] == frames
    assert (pose.x - pose.radius)[present].min() > 0.04
    assert (pose.y + pose.radius)[present].max() < 0.96


def test_wall_hides_and_there_and_back_ends_where_it_began(many):
    walled = many.select(many.form == v.WALL)
    _, masks = clips.render(walled.select(slice(0, 8)))
    area = masks[:, :, 0].sum((2, 3))
    assert (area.min(1).values < 0.02 * area.max(1).values).all()
    assert ((area < 1).sum(1) >= 4).all()
    assert (area[:, [0, -1]] > 0.95 * area.max(1, keepdim=True).values).all()
    pose = clips.poses(many.select(many.form == v.BACK))
    torch.testing.assert_close(pose.x[:, 0], pose.x[:, -1])
    assert ((pose.x[:, 0] - pose.x[:, 16]).abs() + (pose.y[:, 0] - pose.y[:, 16]).abs())[:, 0].min() > 0.3


def test_masks_are_what_can_be_seen(many):
    part = many.select(slice(0, 4))
    times = torch.tensor([0.0, 9.0, 32.0])
    images, masks = clips.render(part, 32, times)
    other = replace(part, rgb=1 - part.rgb)
    changed = (clips.render(other, 32, times)[0] - images).abs().amax(2) > 1e-4
    assert not (changed & (masks.sum(2) < 1e-6)).any()
    assert masks.sum(2).max() <= 1 + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1


def test_captions_say_what_their_facts_say(many):
    uniforms = _uniforms(len(many))
    words = clips.caption_words(many, uniforms)
    captions = clips.to_text(words)
    assert [clips.parse(caption) for caption in captions] == clips.said(many, uniforms)
    assert (words >= 0).sum(1).max() <= 24
    full = clips.detailed(uniforms, torch.ones(len(many), dtype=torch.bool))
    for facts in clips.said(many.select(slice(0, 50)), full[:50]):
        assert facts.background is not None
        assert all(one.colour and one.shape for one in facts.objects)


def test_caption_ids_are_the_tokenizers(many):
    from diffctrl.zoo.video import caption_ids

    words = clips.caption_words(many, _uniforms(len(many), 3))
    words[0] = -1
    tokenizer = t5_tokenizer(clips.WORDS)
    expected = tokenizer(clips.to_text(words), padding="max_length", max_length=32, return_tensors="pt")
    assert torch.equal(caption_ids(words), expected.input_ids)


@pytest.mark.parametrize(
    "text", ["a red rhombus moves left", "a red star", "a red star moves left on a navy"]
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="expected|unknown"):
        clips.parse(text)


def test_the_judge_reads_clean_clips_and_rejects_wrong_captions():
    scenes = clips.sample(50, seed=11, split="test")
    facts = clips.truth(scenes)
    videos, _ = clips.render(scenes)
    readings = [judge.read_clip(video) for video in videos]
    right = [judge.compare_clip(*pair).exact for pair in zip(readings, facts, strict=True)]
    assert sum(right) >= 49
    shifted = [judge.compare_clip(one, facts[index - 1]).exact for index, one in enumerate(readings)]
    assert sum(shifted) == 0
    for reading, said in zip(readings, facts, strict=True):
        for field, value in said.objects[0].named().items():
            names = {
                "colour": ("red", "blue"),
                "shape": ("star", "cross"),
                "speed": ("slowly", "quickly"),
            }.get(field, ("stands still", "bounces"))
            wrong = replace(said.objects[0], **{field: names[value == names[0]]})
            verdict = judge.compare_clip(reading, replace(said, objects=(wrong, *said.objects[1:])))
            assert not verdict.exact


def test_the_judge_sees_drift_change_and_loss():
    walled = clips.sample(1, seed=5, split="test", forms=("wall",))
    video = clips.render(walled)[0][0]
    assert judge.read_clip(video).objects[0].reappears
    assert not judge.read_clip(torch.cat([video[:17], video[:1].expand(16, -1, -1, -1)])).objects[0].reappears
    other = replace(walled, rgb=walled.rgb.flip(2) * 0 + torch.tensor([0.9, 0.1, 0.1]))
    recoloured = torch.cat([video[:17], clips.render(other)[0][0][17:]])
    if int(walled.colour[0, 0]) != 0:
        assert not judge.read_clip(recoloured).objects[0].reappears
        assert judge.read_clip(recoloured).objects[0].colour_drift > 0.3
    still = clips.sample(40, seed=5, forms=("plain",))
    row = int(torch.nonzero(still.motion[:, 0] == v.STILL)[0])
    one = still.select([row])
    drifting = torch.stack(
        [clips.render(replace(one, radius=one.radius * (1 - 0.005 * t)))[0][0, 0] for t in range(33)]
    )
    assert judge.read_clip(clips.render(one)[0][0]).objects[0].size_drift < 0.03
    assert 0.05 < judge.read_clip(drifting).objects[0].size_drift < 0.2
