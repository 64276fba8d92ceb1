"""`diffctrl generate`: a file with its recipe, repeated to the same pixels, whole or not at all."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from diffctrl.drawing import draw, png


def _only(folder):
    (path,) = folder.iterdir()
    return path


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_draws_a_png_and_prints_its_path(generate, tmp_path):
    done = generate("a red star", "--seed", 7)
    assert done.exit_code == 0, done.stderr
    path = _only(tmp_path / "out")
    assert done.stdout == f"{path}\n"
    assert path.name.startswith("tiny-sd3-stock-7-")
    assert path.suffix == ".png"
    assert _pixels(path).shape == (32, 32, 3)


def test_same_request_is_the_same_file_and_picture(generate, tmp_path):
    generate("a red star", "--seed", 7)
    before = _only(tmp_path / "out").read_bytes()
    generate("a red star", "--seed", 7)
    assert _only(tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize("method", [(), ("--method", "softpag", "--set", "u=0.7", "--set", "heads=L1H1,L0")])
def test_from_repeats_the_pixels(generate, run, tmp_path, method):
    generate("a red star", "--seed", 3, "--negative", "a blue ring", "--size", "32x40", *method)
    first = _only(tmp_path / "out")
    done = run("generate", "--from", first, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    again = _only(tmp_path / "again")
    assert again.name == first.name
    assert np.array_equal(_pixels(again), _pixels(first))
    assert png.read_recipe(again) == png.read_recipe(first)
    assert "may differ" not in done.stderr


def test_options_override_the_recipe(generate, run, tmp_path):
    generate("a red star", "--seed", 3, "--method", "softpag", "--set", "u=0.7", "--set", "w=2")
    first = _only(tmp_path / "out")
    run("generate", "--from", first, "--seed", 4, "--set", "u=0.2", "--out", tmp_path / "again")
    recipe = png.read_recipe(_only(tmp_path / "again"))
    assert (recipe.seed, recipe.steps, recipe.prompt) == (4, 3, "a red star")
    assert recipe.controls[0].settings["u"] == 0.2
    assert recipe.controls[0].settings["w"] == 2.0
    run("generate", "--from", first, "--method", "none", "--out", tmp_path / "stock")
    assert png.read_recipe(_only(tmp_path / "stock")).controls == ()


def test_a_recipes_u_and_w_go_with_its_head_set(generate, tmp_path):
    from diffctrl.drawing.plan import Request, make

    def strengths(recipe, *settings, model=None):
        (control,) = make(Request(recipe=recipe, model=model, settings=settings)).controls
        return control.settings["u"], control.settings["w"]

    plan = make(Request(prompt="a red star", model="shapes-sd3", methods=("softpag",)))
    generate("a red star", "--method", "softpag", "--set", "heads=L1", "--set", "u=0.7", "--set", "w=2")
    named = png.read_recipe(_only(tmp_path / "out"))
    quality = dataclasses.replace(named, model="shapes-sd3", controls=plan.controls)
    flat = make(
        Request(
            prompt="a red star", model="shapes-sd3", methods=("softpag",), settings=(("heads", "style:flat"),)
        )
    ).controls[0]
    own = strengths(quality)
    assert strengths(quality, ("heads", "style:flat")) == (flat.settings["u"], flat.settings["w"]) != own
    assert strengths(quality, ("heads", "style:flat"), ("u", "0.2")) == (0.2, flat.settings["w"])
    assert strengths(quality, ("scope", "image_rows")) == own
    assert strengths(quality, ("kind", "uniform")) == (0.5, 3.0)
    assert strengths(quality, model=named.model) == (0.5, 3.0)  # a model without sets
    # What was said beside heads, without a set, stays.
    assert strengths(named, ("heads", "L0")) == (0.7, 2.0)
    assert strengths(dataclasses.replace(named, model="shapes-sd3"), ("heads", "quality")) == own


def test_a_seed_does_not_depend_on_its_neighbours(generate, tmp_path):
    done = generate("a red star", "--seed", 1, "--num", 3, "--method", "softpag")
    assert len(done.stdout.splitlines()) == 3
    generate("a red star", "--seed", 2, "--method", "softpag", out=tmp_path / "alone")
    alone = _only(tmp_path / "alone")
    assert np.array_equal(_pixels(tmp_path / "out" / alone.name), _pixels(alone))


def test_method_changes_the_picture_and_leaves_it_at_no_strength(generate, tmp_path):
    pictures = []
    for index, more in enumerate([(), ("--method", "softpag"), ("--method", "softpag", "--set", "u=0")]):
        generate("a red star", *more, out=tmp_path / str(index))
        pictures.append(_pixels(_only(tmp_path / str(index))))
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def test_compare_shows_both_pictures(generate, tmp_path):
    generate("a red star", "--method", "softpag", "--compare")
    path = _only(tmp_path / "out")
    assert path.name.endswith("-compare.png")
    for more, left in (((), 12), (("--method", "softpag"), 12 + 384 + 12)):
        generate("a red star", *more, out=tmp_path / str(left))
        single = Image.open(_only(tmp_path / str(left))).resize((384, 384), Image.Resampling.NEAREST)
        assert np.array_equal(_pixels(path)[12 : 12 + 384, left : left + 384], np.asarray(single))


def test_what_was_compared_before_an_interrupt_is_there(generate, tmp_path, monkeypatch):
    drawn, one = [], draw._one

    def stops(*arguments):
        drawn.append(1)
        if len(drawn) == 4:  # the second seed's own picture, after its stock one
            raise KeyboardInterrupt
        return one(*arguments)

    monkeypatch.setattr(draw, "_one", stops)
    done = generate("a red star", "--method", "softpag", "--compare", "--num", "3")
    assert done.exit_code == 130
    assert str(_only(tmp_path / "out")) in done.stdout.replace("\n", "")


def test_prompt_never_becomes_a_path(generate, tmp_path):
    done = generate("../../../evil/name\x1b[31m")
    assert done.exit_code == 0
    assert "evil" not in _only(tmp_path / "out").name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_no_file(generate, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "_one", interrupted)
    done = generate("a red star")
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_write_leaves_no_file(generate, tmp_path, monkeypatch):
    generate("a red star")
    recipe = png.read_recipe(_only(tmp_path / "out"))
    image = Image.new("RGB", (8, 8))

    def save(where, **_):
        where.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        png.write(image, tmp_path / "new" / "a.png", recipe)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_picture_that_cannot_be_written(generate, tmp_path):
    generate("a red star", "--seed", 1)
    taken = _only(tmp_path / "out")
    taken.unlink()
    taken.mkdir()
    done = generate("a red star", "--num", 2)
    assert done.exit_code == 2
    assert f"{taken} cannot be written (Is a directory)" in done.stderr
    (written,) = done.stdout.split()  # the one before it
    assert "-0-" in written


def test_changed_surroundings_are_told(generate, run, tmp_path):
    generate("a red star")
    path = _only(tmp_path / "out")
    found = json.loads(Image.open(path).info["diffctrl"])
    found["versions"]["torch"] = "1.0"
    found["weights"]["sha256"] = "0" * 64
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("diffctrl", json.dumps(found))
    Image.open(path).save(tmp_path / "old.png", pnginfo=info)
    done = run("generate", "--from", tmp_path / "old.png", "--out", tmp_path / "again")
    assert done.exit_code == 0
    assert "torch was 1.0" in done.stderr
    assert "were 000000000000" in done.stderr


def test_heads_come_from_a_file_of_a_search(run, tiny_model, tmp_path):
    from diffctrl.drawing.plan import Request, make
    from diffctrl.softpag import Head
    from diffctrl.softpag.headset import Chosen, HeadSet, Signature

    path = tmp_path / "heads.json"
    HeadSet(chosen=(Chosen(Head(1, 0)), Chosen(Head(0, 1), u=0.3))).save(path)
    asked = Request(
        prompt="a red star", model=str(tiny_model), methods=("softpag",), settings=(("heads", str(path)),)
    )
    (control,) = make(asked).controls
    assert control.settings["heads"] == "L1H0,L0H1=0.3"  # recipes name heads, not files
    other = Signature(model_class="SD3Transformer2DModel", stacks=(("transformer_blocks", 24, (24,) * 24),))
    HeadSet(chosen=(Chosen(Head(1, 0)),), signature=other).save(path)
    done = run(
        "generate", "a red star", "--model", tiny_model, "--method", "softpag", "--set", f"heads={path}"
    )
    assert done.exit_code == 2
    assert "was found on SD3Transformer2DModel(transformer_blocks 24 x 24)" in done.stderr
    done = run(
        "generate", "a red star", "--model", tiny_model, "--method", "softpag", "--set", "heads=nowhere.json"
    )
    assert done.exit_code == 2
    assert "heads=nowhere.json cannot be read (No such file" in done.stderr
