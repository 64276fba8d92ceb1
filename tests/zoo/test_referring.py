"""The referring set: every expression is true of its target and of nothing else, everywhere the same."""

import hashlib
from dataclasses import replace

import pytest
import torch

from diffctrl.zoo import worlds
from diffctrl.zoo.worlds.expressions import Expression, Layout, layouts, word_spans
from diffctrl.zoo.worlds.referring_set import POINTED, SPLITS, ReferringSet, referring_set

SETS = {split: referring_set(split, 12, seed=5) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_everywhere(split):
    made = SETS[split]
    again = referring_set(split, 12, seed=5)
    assert again.to_json() == made.to_json()
    assert referring_set(split, 12, seed=6).to_json() != made.to_json()
    read = ReferringSet.from_json(made.to_json())
    assert read.items == made.items
    for one, other in zip(worlds.render(read.scenes, 32), worlds.render(made.scenes, 32), strict=True):
        assert torch.equal(one, other)
    # More scenes of the same stream begin with the same ones.
    assert referring_set(split, 3, seed=5).items == made.items[: len(made.items) // 4]


def test_the_set_of_this_version_does_not_change():
    # A change of the scenes or of the phrases is a new VERSION.
    said = [(item.split, item.expression, item.target) for split in SPLITS for item in SETS[split].items]
    assert hashlib.sha256(repr(said).encode()).hexdigest()[:16] == "7a019aa811bb8ac2"


@pytest.mark.parametrize("split", SPLITS)
def test_words_are_the_embedded_models_own(split):
    for item in SETS[split].items:
        words = [item.expression[start:stop] for start, stop in item.words]
        assert "".join(words) == item.expression.replace(" ", "")
        assert set(words) <= set(worlds.WORDS)


def _target_pixels(made):
    _, masks = worlds.render(made.scenes, 64)
    return masks > 0.5


@pytest.mark.parametrize("split", POINTED)
def test_targets_are_seen(split):
    masks = _target_pixels(SETS[split])
    for item in SETS[split].items:
        assert masks[item.scene, item.target].sum() > 20


def test_splits_hold_what_they_are_about():
    for split, need in (("conjunction", 2), ("size", 1), ("position", 1), ("relation", 1), ("occlusion", 1)):
        made = SETS[split]
        for item, layout in zip(made.items, layouts(made.scenes), strict=True):
            others = [i for i in range(len(layout)) if i != item.target]
            twins = [i for i in others if layout.shape[i] == layout.shape[item.target]]
            assert twins
            if need == 2:
                assert any(layout.colour[i] == layout.colour[item.target] for i in others)
            if split == "size":
                radii = [layout.radius[i] / layout.radius[item.target] for i in twins]
                assert all(r >= 1.4 or r <= 1 / 1.4 for r in radii)
            if split == "position":
                assert all(abs(layout.x[i] - layout.x[item.target]) >= 0.15 for i in twins)
            if split == "occlusion":
                assert item.target == 0
                assert layout.overlaps


def test_paraphrases_share_their_target():
    made = SETS["stop words"]
    stops = {"the", "it", "is", "and", "this", "that"}
    for index in range(0, len(made.items), 3):
        three = made.items[index : index + 3]
        assert len({(item.scene, item.target) for item in three}) == 1
        counts = [sum(word in stops for word in item.expression.split()) for item in three]
        assert counts == [0, 3, 8]


def test_nothing_fits_where_nothing_is_meant():
    made = SETS["none"]
    for item, layout in zip(made.items, layouts(made.scenes), strict=True):
        colour, shape = item.expression.split()[1:]
        assert item.target is None
        assert Expression(colour=colour, shape=shape).referents(layout) == ([], [])


_LAYOUT = Layout(
    shape=(0, 0, 1), colour=(0, 1, 0), pattern=(0, 0, 1), x=(0.2, 0.8, 0.5), y=(0.2, 0.7, 0.25),
    radius=(0.1, 0.2, 0.11), overlaps=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "only"),
    [
        (Expression(colour="green"), 1),
        (Expression(colour="red"), None),
        (Expression(shape="circle", colour="red"), 0),
        (Expression(shape="circle", size="large"), 1),
        (Expression(shape="circle", size="small"), 0),
        (Expression(size="small"), None),  # 0.10 and 0.11: somebody could mean either
        (Expression(shape="circle", side="left"), 0),
        (Expression(shape="circle", side="bottom"), 1),
        (Expression(side="top"), None),
        (Expression(pattern="striped"), 2),
        (Expression(shape="circle", relation="left of", anchor=Expression(shape="square")), 0),
        # Both circles lie to the sides of the square, one of them above it by a hair.
        (Expression(shape="circle", relation="above", anchor=Expression(shape="square")), None),
        (Expression(shape="circle", relation="left of", anchor=Expression(colour="red")), None),
        (Expression(shape="star"), None),
    ],
)
def test_truth_of_an_expression(expression, only):
    assert expression.only(_LAYOUT) == only


def test_depth():
    pair = Layout(
        shape=(0, 0),
        colour=(0, 1),
        pattern=(0, 0),
        x=(0.4, 0.5),
        y=(0.5, 0.5),
        radius=(0.1, 0.1),
        overlaps=True,
    )
    green = Expression(shape="circle", colour="green")
    front = Expression(shape="circle", relation="in front of", anchor=green)
    assert front.only(pair) == 0
    assert replace(front, relation="behind").only(pair) is None
    behind = Expression(shape="circle", relation="behind", anchor=replace(green, colour="red"))
    assert behind.only(pair) == 1
    assert behind.say("english") == "the circle behind the red circle"


def test_english_wording():
    assert Expression(shape="star", size="large").say("english") == "the largest star"
    assert Expression(colour="red").say("english") == "the red shape"
    assert Expression(shape="star", side="top").say() == "the star at the top"
    said = {
        item.expression.split()[2] for item in referring_set("occlusion", 10, seed=1, wording="english").items
    }
    assert said == {"behind", "in"}


def test_spans_are_of_words_and_marks():
    assert [("red one, left."[a:b]) for a, b in word_spans("red one, left.")] == [
        "red",
        "one",
        ",",
        "left",
        ".",
    ]


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="colour, conjunction"):
        referring_set("color", 1, seed=0)
    with pytest.raises(ValueError, match="positive"):
        referring_set("colour", 0, seed=0)
    with pytest.raises(ValueError, match="shapes"):
        layouts(worlds.sample(2, seed=0, world="characters"))
