"""`diffctrl info`: the recipe of a picture, or what is here."""

import json

import pytest

from diffctrl.catalogue import FAMILIES
from diffctrl.methods import METHODS
from diffctrl.zoo import registry


def test_prints_the_recipe_of_a_picture(generate, run, tmp_path):
    generate("a red star", "--seed", 7, "--method", "softpag")
    (path,) = (tmp_path / "out").iterdir()
    done = run("info", path)
    assert done.exit_code == 0
    for text in ("a red star", "tiny-sd3", "softpag(", "u=0.5", "FlowMatchEulerDiscreteScheduler", "sha256"):
        assert text in done.stdout
    recipe = json.loads(run("info", path, "--json").stdout)
    assert (recipe["prompt"], recipe["seed"], recipe["steps"]) == ("a red star", 7, 3)
    assert {"diffctrl", "torch", "diffusers"} <= recipe["versions"].keys()


def test_a_recipe_cannot_steer_the_terminal(generate, run, tmp_path):
    generate("a red\x1b[31m [bold]star")
    (path,) = (tmp_path / "out").iterdir()
    assert "\x1b" not in run("info", path).stdout
    assert "[bold]star" in run("info", path).stdout


def test_lists_models_methods_and_families(run):
    done = run("info")
    assert done.exit_code == 0
    for text in (*registry.EMBEDDED, *METHODS, *FAMILIES, "Stable Diffusion 3 / 3.5"):
        assert text in done.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["methods"]["softpag"]["options"][:3] == ["heads", "u", "w"]
    assert found["methods"]["softpag"]["families"] == list(FAMILIES)
    assert found["methods"]["sparsed"]["command"] == "text"


def test_says_of_an_embedded_model_that_its_weights_are_missing(run, tmp_path, monkeypatch):
    assert json.loads(run("info", "--json").stdout)["models"]["shapes-sd3"]["here"]
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    assert not json.loads(run("info", "--json").stdout)["models"]["shapes-sd3"]["here"]
    assert run("info").stdout.count("missing") == len(registry.EMBEDDED)


def test_prints_the_recipe_of_a_text_and_of_a_grounding(run, tmp_path):
    control = {"method": "sparsed", "settings": {"select": 0.3}}
    recipe = {"prompt": "add 1 + 2", "controls": [control], "versions": {"torch": "2.13"}, "threads": None}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"text": "3", "recipe": recipe}))
    done = run("info", file)
    assert done.exit_code == 0
    for text in ("add 1 + 2", "method=sparsed", "torch=2.13"):
        assert text in done.stdout
    assert "None" not in done.stdout
    assert json.loads(run("info", file, "--json").stdout) == recipe


@pytest.mark.parametrize("content", ["no JSON", "[1]", '{"recipe": 3}'])
def test_a_json_file_without_a_recipe_is_refused(run, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    done = run("info", tmp_path / "a.json")
    assert done.exit_code == 2
    assert str(tmp_path / "a.json") in done.stderr


def test_a_file_without_a_recipe_is_refused(run, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    done = run("info", tmp_path / "a.png")
    assert done.exit_code == 2
    assert done.stderr == f"diffctrl: {tmp_path / 'a.png'} is not a PNG file that can be read\n"
