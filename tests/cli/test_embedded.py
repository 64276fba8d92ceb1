"""The embedded model through the command line: real weights, real words, and the judge."""

import numpy as np
import pytest
from PIL import Image

from diffctrl.drawing import png
from diffctrl.zoo import integrity, registry

PROMPT = "a red star left of a blue ring"


def _only(folder):
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("name", registry.EMBEDDED)
def test_shipped_weights_are_whole(name):
    assert integrity.problem(name) is None


def test_draws_what_the_words_say(run, tmp_path):
    done = run("generate", PROMPT, "--seed", 7, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    path = _only(tmp_path / "out")
    assert min(Image.open(path).size) >= 128
    assert "(as asked)" in done.stderr
    recipe = png.read_recipe(path)
    assert (recipe.model, recipe.device, recipe.dtype) == ("shapes-sd3", "cpu", "float32")
    again = run("generate", "--from", path, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open(_only(tmp_path / "again"))), np.asarray(Image.open(path)))


def test_compare_reads_both_pictures(run, tmp_path):
    done = run("generate", PROMPT, "--method", "softpag", "--set", "u=0.5", "--compare", "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    notes = done.stderr.splitlines()
    assert notes[0].startswith("stock: ")
    assert notes[1].startswith("softpag(")


def test_words_outside_the_world_are_named(run, tmp_path):
    done = run("generate", "a red dragon left of a blue ring", "--steps", 2, "--out", tmp_path)
    assert done.exit_code == 0
    assert "'dragon'" in done.stderr
    assert "'red'" not in done.stderr


def test_too_many_words_are_refused(run, tmp_path):
    done = run("generate", "a red star and " * 12, "--out", tmp_path)
    assert done.exit_code == 2
    assert "of 32 at most" in done.stderr


def test_other_sizes(run, tmp_path):
    done = run("generate", "a red star", "--size", "64x96", "--steps", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert Image.open(_only(tmp_path)).size == (96, 64)
    refused = run("generate", "a red star", "--size", "512x512", "--out", tmp_path)
    assert refused.exit_code == 2
    assert "up to 256" in refused.stderr
