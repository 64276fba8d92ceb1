"""`diffctrl headhunt`: a head set, a report, a resumable log; and what it refuses."""

import json

import pytest
from PIL import Image

from diffctrl.softpag.headset import HeadSet


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\na red star\n\na blue ring\n", encoding="utf-8-sig")
    return path


@pytest.fixture
def headhunt(run, tiny_model, prompts, tmp_path):
    """A search on the tiny model that writes `tmp_path`/heads.json."""

    def headhunt(*arguments, objective="sharpness", steps=2):
        fixed = ("--model", tiny_model, "--prompts", prompts, "--steps", steps, "--size", "32x32")
        return run("headhunt", *fixed, "--objective", objective, "--out", tmp_path / "heads.json", *arguments)

    return headhunt


def test_finds_heads_and_goes_on_where_it_stopped(headhunt, tmp_path):
    done = headhunt("--rounds", 1, "--top", 2, "--set", "w=2")
    assert done.exit_code == 0, done.stderr
    assert "4 heads, 2 pairs: 12 pictures" in done.stderr
    assert "12 pictures scored" in done.stderr
    paths = done.stdout.split()
    assert paths[0] == str(tmp_path / "heads.json")
    for path in paths[1:]:
        assert Image.open(path).width > 50
    headset = HeadSet.load(tmp_path / "heads.json")
    assert len(headset) == 2
    assert headset.pairs == (("a red star", 0), ("a blue ring", 1))
    assert headset.perturbation["w"] == 2
    assert headset.perturbation["u"] == 1
    assert headset.sampling["steps"] == 2
    assert len(headset.model["revision"]) == 64
    more = headhunt("--rounds", 2, "--top", 2, "--set", "w=2")
    assert more.exit_code == 0, more.stderr
    assert "12 jobs in" in more.stderr
    # The current set of round 2 was scored as the final set; two candidates and the new final set are left.
    assert "8 pictures scored" not in more.stderr or len(HeadSet.load(tmp_path / "heads.json")) == 4
    assert HeadSet.load(tmp_path / "heads.json").up_to_round(1).heads == headset.heads


def test_a_search_that_finds_nothing_says_so_and_its_set_is_refused(run, tiny_model, tmp_path, capsys):
    from diffctrl.cli.headhunt import _print_table

    entry = {"round": 1, "selected": [], "candidates": [], "chosen": [], "stopped": True}
    empty = HeadSet(chosen=(), objective={"name": "judge", "version": "1"}, rounds=(entry,))
    _print_table(empty)
    assert "no head was found: none does better than no guidance" in " ".join(capsys.readouterr().err.split())
    empty.save(tmp_path / "empty.json")
    setting = f"heads={tmp_path / 'empty.json'}"
    done = run("generate", "a red star", "--model", tiny_model, "--method", "softpag", "--set", setting)
    assert done.exit_code == 2
    assert "is empty: its search found no head" in " ".join(done.stderr.split())


def test_a_head_set_brings_its_strength_and_scale_into_the_recipe(headhunt, run, tiny_model, tmp_path):
    assert headhunt("--rounds", 1, "--top", 1, "--set", "w=2").exit_code == 0
    fixed = ("generate", "a red star", "--model", tiny_model, "--method", "softpag", "--steps", 1)
    fixed += ("--size", "32x32", "--set", f"heads={tmp_path / 'heads.json'}")
    found = []
    for index, more in enumerate([(), ("--set", "w=4"), ("--set", "u=0.25")]):
        picture = run(*fixed, *more, "--out", tmp_path / str(index)).stdout.split()[0]
        found.append(json.loads(run("info", picture, "--json").stdout))
    settings = [recipe["controls"][0]["settings"] for recipe in found]
    assert [(each["u"], each["w"]) for each in settings] == [(1.0, 2.0), (1.0, 4.0), (0.25, 2.0)]


def test_runs_on_the_embedded_model(run, tmp_path):
    out = tmp_path / "heads.json"
    arguments = ("--limit", 1, "--top", 1, "--steps", 1, "--size", "64x64", "--batch", 33, "--out", out)
    done = run("headhunt", *arguments)
    assert done.exit_code == 0, done.stderr
    headset = HeadSet.load(out)
    assert headset.objective == {"name": "judge", "version": "1"}
    assert headset.model["id"] == "shapes-sd3"
    assert len(headset) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--objective", "jugde"), "did you mean judge?"),
        (("--objective", "judge"), "embedded models only"),
        (("--objective", "clip"), "needs a folder"),
        (("--objective", "clip:nowhere"), "needs config.json"),
        (("--objective", "style:cubist"), "no style of the world"),
        (("--seed", 1, "--objective", "sharpness=2"), "--objective sharpness is given twice"),
        (("--set", "heads=L1"), "it finds the heads"),
        (("--set", "u=0"), "u=0.0 is not in (0, 1]"),
        (("--set", "v=1"), "no option 'v'"),
        (("--rounds", 3, "--top", 2), "more than the 4 heads"),
        (("--top", 0), "top=0"),
        (("--workers", 0), "--workers 0"),
        (("--num", 0), "--num 0"),
        (("--limit", 0), "--limit 0"),
        (("--size", "33x32"), "height=33"),
        (("--prompts", "nowhere.txt"), "cannot be read"),
        (("--prompts", "built-in"), "embedded models' world"),
        (("--set", "start_fraction=2"), "window"),
        (("--set", "start_fraction=0.9"), "holds none of the 2 steps"),
        (("--out", "."), "is a folder; name a file"),
        (("--out", "a" * 300), "cannot be written (File name too long)"),
    ],
)
def test_bad_requests_are_answered_before_weights_are_loaded(headhunt, no_weights, arguments, said):
    objective = arguments[1] if arguments[0] == "--objective" else "sharpness"
    rest = () if arguments[0] == "--objective" else arguments
    done = headhunt(*rest, objective=objective)
    assert done.exit_code == 2, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
