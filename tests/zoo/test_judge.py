"""The judge reads clean, blurred and speckled pictures, and rejects whatever is wrong with them."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffctrl.zoo import judge, worlds
from diffctrl.zoo.judge import regions
from diffctrl.zoo.worlds import vocabulary

KINDS = {"one": ("shapes", 1), "two": ("shapes", 2), "characters": ("characters", (1, 2, 3))}
FLOOR = 0.98
VALUES = {
    "colour": vocabulary.COLOURS,
    "pattern": vocabulary.PATTERNS,
    "shape": vocabulary.SHAPES,
    "size": vocabulary.SIZES,
    "body": vocabulary.BODIES,
    "hat": vocabulary.HATS,
    "hat_colour": vocabulary.COLOURS,
    "eyes": vocabulary.EYES,
    "action": vocabulary.ACTIONS,
    "style": vocabulary.STYLES,
    "background": vocabulary.BACKGROUNDS,
    "texture": vocabulary.TEXTURES,
    "relation": vocabulary.RELATIONS,
}


def _scenes(kind: str, count: int, seed: int) -> worlds.Scenes:
    world, objects = KINDS[kind]
    return worlds.sample(count, seed=seed, world=world, objects=objects, split="test")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors on a shared machine: more threads wait for each other and take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clean() -> dict[str, tuple[list[worlds.SceneFacts], list[judge.Reading]]]:
    """Per kind, the whole truth of 150 scenes and what the judge reads of their pictures."""
    out = {}
    for kind in KINDS:
        scenes = _scenes(kind, 150, seed=41)
        images, _ = worlds.render(scenes)
        out[kind] = worlds.truth(scenes), [judge.read(image) for image in images]
    return out


def _share_exact(facts: list[worlds.SceneFacts], readings: list[judge.Reading]) -> float:
    verdicts = [judge.compare(reading, one) for one, reading in zip(facts, readings, strict=True)]
    return sum(verdict.exact for verdict in verdicts) / len(verdicts)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_fact_of_clean_pictures(clean, kind):
    assert _share_exact(*clean[kind]) >= FLOOR


def _blurred(images: Tensor, sigma: float = 0.45) -> Tensor:
    """A stand-in for a round trip through an autoencoder: a little blur and noise, about 38 dB."""
    place = torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    padded = functional.pad(images, (3, 3, 3, 3), mode="replicate")
    smooth = functional.conv2d(functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (smooth + 0.008 * noise).clamp(0, 1)


def _speckled(images: Tensor) -> Tensor:
    """Stray pixels: 3x3 spots in all corners, which decoders like to leave, and single pixels anywhere."""
    generator = torch.Generator().manual_seed(1)
    images = images.clone()
    for rows in (slice(0, 3), slice(-3, None)):
        for columns in (slice(0, 3), slice(-3, None)):
            images[:, :, rows, columns] = torch.rand(len(images), 3, 1, 1, generator=generator)
    for image in images:
        places = torch.randint(0, 128, (2, 8), generator=generator)
        image[:, places[0], places[1]] = torch.rand(3, 8, generator=generator)
    return images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", [_blurred, _speckled])
def test_reads_spoiled_pictures(kind, spoil):
    scenes = _scenes(kind, 50, seed=42)
    images, _ = worlds.render(scenes)
    assert _share_exact(worlds.truth(scenes), [judge.read(image) for image in spoil(images)]) >= FLOOR


def _with_one_wrong_fact(facts: worlds.SceneFacts, dice: random.Random) -> worlds.SceneFacts:
    """The same facts, but one of them at random is another value."""
    scene_fields = [name for name in ("style", "background", "texture", "relation") if getattr(facts, name)]
    choices: list[tuple[int | None, str]] = [(None, name) for name in scene_fields]
    choices += [(place, name) for place, one in enumerate(facts.objects) for name in one.named()]
    place, name = dice.choice(choices)
    source = facts if place is None else facts.objects[place]
    other = dice.choice([value for value in VALUES[name] if value != getattr(source, name)])
    if place is None:
        return replace(facts, **{name: other})
    objects = list(facts.objects)
    objects[place] = replace(objects[place], **{name: other})
    return replace(facts, objects=tuple(objects))


@pytest.mark.parametrize("kind", KINDS)
def test_rejects_one_wrong_fact(clean, kind):
    facts, readings = clean[kind]
    dice = random.Random(0)
    wrong = [_with_one_wrong_fact(one, dice) for one in facts for _ in range(4)]
    assert _share_exact(wrong, [reading for reading in readings for _ in range(4)]) <= 0.03


def test_rejects_shuffled_captions(clean):
    generator = torch.Generator().manual_seed(2)
    for kind in KINDS:
        scenes = _scenes(kind, 150, seed=41)
        uniforms = torch.rand(150, worlds.CAPTION_UNIFORMS, generator=generator)
        said = [judge.parse(text) for text in worlds.to_text(worlds.caption_words(scenes, uniforms))]
        _, readings = clean[kind]
        assert _share_exact(said, readings) >= FLOOR
        assert _share_exact(said[1:] + said[:1], readings) <= 0.03


def test_rejects_a_wrong_number_of_objects(clean):
    for facts, readings in (clean["two"], clean["characters"]):
        fewer = [
            replace(one, objects=one.objects[:-1], relation=None) for one in facts if len(one.objects) > 1
        ]
        more = [replace(one, objects=(*one.objects, one.objects[0])) for one in facts if len(one.objects) < 3]
        several = [reading for one, reading in zip(facts, readings, strict=True) if len(one.objects) > 1]
        few = [reading for one, reading in zip(facts, readings, strict=True) if len(one.objects) < 3]
        assert _share_exact(fewer, several) <= 0.02
        assert _share_exact(more, few) == 0


def test_a_mirrored_picture_fails_the_relation():
    scenes = worlds.sample(40, seed=43, world="shapes", objects=2)
    scenes = scenes.select((scenes.relation >= 0) & (scenes.relation < 4))
    moved = {name: value for name, value in scenes.tensors().items() if name not in ("x", "y")}
    across = (scenes.relation < 2)[:, None]
    turned = worlds.Scenes(
        world="shapes",
        x=torch.where(across, 1 - scenes.x, scenes.x),
        y=torch.where(across, scenes.y, 1 - scenes.y),
        **moved,
    )
    pairs = zip(worlds.render(scenes)[0], worlds.render(turned)[0], worlds.truth(scenes), strict=True)
    for image, mirrored, facts in pairs:
        assert judge.check(image, facts).facts["relation"]
        verdict = judge.check(mirrored, facts)
        assert [name for name, holds in verdict.facts.items() if not holds] == ["relation"]


def test_who_is_in_front_matters(clean):
    facts, readings = clean["two"]
    front = [
        (one, reading) for one, reading in zip(facts, readings, strict=True) if one.relation == "in front of"
    ]
    swapped = [replace(one, objects=one.objects[::-1]) for one, _ in front]
    assert len(front) > 15
    assert _share_exact(swapped, [reading for _, reading in front]) == 0


def test_what_is_not_there_does_not_hold():
    empty = torch.full((3, 128, 128), 0.5)
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(3))
    spec = judge.parse("a small red striped star left of a blue ring on a gray background")
    for image in (empty, noise, torch.zeros(3, 128, 128), torch.ones(3, 128, 128)):
        verdict = judge.check(image, spec)
        assert not verdict.exact
        assert not any(verdict.facts[name] for name in ("count", "colour", "shape", "size", "relation"))
    assert judge.check(empty, spec).facts["background"]


def test_a_hat_of_no_named_kind_is_any_hat():
    scenes = worlds.sample(40, seed=44, world="characters", objects=1)
    images, _ = worlds.render(scenes)
    wears = [judge.check(image, judge.parse("a creature wearing a hat")).exact for image in images]
    bare = [judge.check(image, judge.parse("a creature wearing no hat")).exact for image in images]
    assert wears == (scenes.hat[:, 0] > 0).tolist()
    assert bare == (scenes.hat[:, 0] == 0).tolist()


def test_other_sizes_and_devices_of_the_same_picture():
    scenes = worlds.sample(12, seed=45, world="shapes", objects=1)
    facts = worlds.truth(scenes)
    images, _ = worlds.render(scenes, 256)
    before = images.clone()
    assert all(judge.check(image, one).exact for image, one in zip(images, facts, strict=True))
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match="square"):
        judge.read(images[0, :, :128])
    with pytest.raises(ValueError, match="finite"):
        judge.read(images[0] * float("nan"))
    with pytest.raises(ValueError, match="3, H, W"):
        judge.read(images)


def test_a_reading_is_a_sentence():
    scenes = worlds.sample(1, seed=3, world="shapes", objects=2)
    text = str(judge.read(worlds.render(scenes)[0][0]))
    facts = worlds.truth(scenes)[0]
    for one in facts.objects:
        assert f"{one.colour}" in text
        assert f"{one.shape}" in text
    assert facts.background in text


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red dragon", "'dragon'"),
        ("a red star left of", "expected"),
        ("a red star on a green background", "background"),
        ("a red star and a blue creature", "mixes"),
        ("a red star , a blue ring , a pink cross and a red ring", "at most three"),
        ("a red star left of a blue ring above a pink cross", "one relation"),
        ("", "expected"),
        ("a flat red star", "picture of"),
    ],
)
def test_what_cannot_be_parsed_says_why(caption, message):
    with pytest.raises(ValueError, match=message):
        judge.parse(caption)


def test_parses_what_a_person_types():
    spec = judge.parse("A red star left of a blue ring.")
    assert spec.relation == "left of"
    assert [one.named() for one in spec.objects] == [
        {"colour": "red", "shape": "star"},
        {"colour": "blue", "shape": "ring"},
    ]
    assert judge.parse("red star") == judge.parse("the red star it that in")


def test_evaluate_counts_named_facts():
    scenes = worlds.sample(30, seed=46, split="test")
    images, _ = worlds.render(scenes)
    uniforms = torch.rand(30, worlds.CAPTION_UNIFORMS, generator=torch.Generator().manual_seed(4))
    captions = worlds.to_text(worlds.caption_words(scenes, uniforms))
    result = judge.evaluate(images, captions)
    assert result["exact"]["total"] == 30
    assert result["exact"]["low"] <= result["exact"]["rate"] <= result["exact"]["high"]
    per_count = [rate for counts in result["exact_by_kind"].values() for rate in counts.values()]
    assert sum(rate["hits"] for rate in per_count) == result["exact"]["hits"]
    colours = sum(one.colour is not None for facts in worlds.said(scenes, uniforms) for one in facts.objects)
    assert result["facts"]["colour"]["total"] == colours
    with pytest.raises(ValueError, match="as many"):
        judge.evaluate(images, captions[:3])


def test_wilson_interval():
    low, high = judge.wilson(81, 100)
    assert (low, high) == pytest.approx((0.7222, 0.8749), abs=1e-3)
    assert judge.wilson(0, 0) == (0.0, 1.0)


def test_regions_agree_with_a_flood_fill():
    mask = torch.rand(24, 24, generator=torch.Generator().manual_seed(5)).numpy() < 0.5
    for diagonal in (False, True):
        labels, count = regions.label(mask, diagonal=diagonal)
        assert ((labels > 0) == mask).all()
        seen, number = set(), 0
        steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + (
            [(1, 1), (1, -1), (-1, 1), (-1, -1)] if diagonal else []
        )
        for start in zip(*mask.nonzero(), strict=True):
            if start in seen:
                continue
            number += 1
            stack, members = [start], set()
            while stack:
                y, x = stack.pop()
                if (y, x) in members or not (0 <= y < 24 and 0 <= x < 24) or not mask[y, x]:
                    continue
                members.add((y, x))
                stack += [(y + dy, x + dx) for dy, dx in steps]
            assert len({labels[place] for place in members}) == 1
            seen |= members
        assert number == count
