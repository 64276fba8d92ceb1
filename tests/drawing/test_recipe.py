"""Recipes survive a PNG file, and an untrusted one is refused with its fault."""

import dataclasses
import json

import pytest
from PIL import Image

from diffctrl.drawing import ControlSpec, Recipe, Weights, png
from diffctrl.errors import BadRequestError

RECIPE = Recipe(
    model="shapes-sd3",
    weights=Weights(sha256="ab" * 32, bytes=12, sampled=False),
    prompt='ein roter Stern, "links" vom Ring \N{SNOWMAN}',
    negative=None,
    seed=2**62,
    steps=28,
    guidance_scale=3.0,
    height=128,
    width=192,
    max_sequence_length=32,
    scheduler={"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    controls=(ControlSpec(method="softpag", settings={"heads": "L3H1,L4", "u": 0.5}),),
    compare=False,
    device="cpu",
    dtype="float32",
    hardware="x86_64 AVX2",
    threads=2,
    versions={"diffctrl": "0.1.0", "torch": "2.13.0"},
)


def test_png_keeps_the_recipe(tmp_path):
    png.write(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECIPE)
    assert png.read_recipe(tmp_path / "a.png") == RECIPE


def test_digest_names_the_request_alone():
    moved = dataclasses.replace(RECIPE, device="cuda", threads=None, versions={})
    assert moved.digest() == RECIPE.digest()
    assert dataclasses.replace(RECIPE, seed=1).digest() != RECIPE.digest()
    assert len(RECIPE.digest()) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"seed": "7"}, "seed='7'"),
        ({"seed": True}, "seed=True"),
        ({"steps": None}, "steps=None"),
        ({"prompt": ["a"]}, "prompt"),
        ({"extra": 1}, "unknown entry 'extra'"),
        ({"controls": {"softpag": {}}}, "no list of controls"),
        ({"controls": [{"method": "softpag"}]}, "lacks settings"),
        ({"controls": ["softpag"]}, "not a table"),
        ({"weights": None}, "not a table"),
    ],
)
def test_faulty_recipes_are_refused(change, says):
    found = {**json.loads(RECIPE.to_json()), **change}
    with pytest.raises(BadRequestError, match=says):
        Recipe.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["", "[]", "not json", "{}", "null"])
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(BadRequestError):
        Recipe.from_json(text)


def test_differences_name_what_changed():
    now = dataclasses.replace(
        RECIPE,
        versions={"diffctrl": "0.1.0"},
        threads=4,
        scheduler={"class": "Other"},
        weights=Weights(sha256="cd" * 32, bytes=12, sampled=False),
    )
    found = "\n".join(RECIPE.differences(now))
    for text in ("torch was 2.13.0, is missing", "threads was 2, is 4", "is Other", "were abab"):
        assert text in found
    assert RECIPE.differences(RECIPE) == []
    # Weights of another model are no changed weights.
    assert "weights" not in " ".join(RECIPE.differences(dataclasses.replace(now, model="another")))
