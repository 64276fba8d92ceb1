"""`diffctrl text`: the answer on stdout, its recipe in a file, the order of decoding on a terminal."""

import io
import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from diffctrl.cli.text_view import OrderView, colour
from diffctrl.dlm import Checkpoint, StepEvent
from diffctrl.pipelines import LLaDASparseDPipeline
from diffctrl.zoo import registry
from tests.dlm import layouts

SIZES = ("--gen-length", 16, "--steps", 8, "--block-length", 8)
SPARSE = ("--method", "sparsed", "--set", "block_size=4", "--set", "auto_dense=false")


@pytest.fixture(scope="session")
def llada_folder(tmp_path_factory):
    return layouts.write(
        tmp_path_factory.mktemp("models") / "tiny-llada", layouts.LLADA, layouts.llada_weights()
    )


@pytest.fixture(scope="session")
def dream_folder(tmp_path_factory):
    return layouts.write(
        tmp_path_factory.mktemp("models") / "tiny-dream", layouts.DREAM, layouts.dream_weights()
    )


@pytest.fixture
def text(run, llada_folder):
    def text(*arguments, model=llada_folder, sizes=SIZES):
        return run("text", *arguments, "--model", model, *sizes)

    yield text
    logger = logging.getLogger("diffctrl")
    logger.handlers, logger.propagate = [], True


@pytest.fixture
def no_weights(monkeypatch):
    def load(self, *arguments, **options):
        raise AssertionError(f"the weights of {self.name} were loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


def test_prints_the_answer_of_the_pipeline(text, llada_folder):
    done = text("red cup")
    assert done.exit_code == 0, done.stderr
    pipe = LLaDASparseDPipeline.from_pretrained(llada_folder)
    found = pipe("red cup", sparsed=False, gen_length=16, steps=8, block_length=8)
    assert done.stdout == found.texts[0] + "\n"
    assert done.stderr == ""


@pytest.mark.parametrize("more", [(), ("--temperature", 1, "--seed", 7), (*SPARSE, "--cfg-scale", 0.5)])
def test_a_file_repeats_its_text(text, run, tmp_path, more):
    first, again = tmp_path / "a.json", tmp_path / "new" / "b.json"
    done = text("red cup", "--out", first, *more)
    assert done.exit_code == 0, done.stderr
    repeated = run("text", "--from", first, "--out", again)
    assert repeated.exit_code == 0, repeated.stderr
    assert repeated.stdout == done.stdout
    assert repeated.stderr == ""
    one, two = (json.loads(path.read_text()) for path in (first, again))
    assert one["stats"].pop("seconds") >= 0
    for found in (one, two):  # what was timed
        found.pop("stats")
    assert one == two
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_what_the_file_holds(text, run, tmp_path):
    text("red cup", "--out", tmp_path / "a.json", "--seed", 3, *SPARSE, "--set", "select=0.4")
    found = json.loads((tmp_path / "a.json").read_text())
    recipe = found["recipe"]
    assert (recipe["prompt"], recipe["seed"], recipe["sampler"]) == ("red cup", 3, "llada")
    assert recipe["sampling"]["gen_length"] == 16
    (control,) = recipe["controls"]
    assert control["method"] == "sparsed"
    assert control["settings"]["select"] == 0.4
    assert sorted(set(found["order"])) == list(range(8))
    assert len(found["tokens"]) == 16
    assert found["stats"]["control"]["steps"] == {"dense": 1, "build": 1, "sparse": 6}
    assert {"diffctrl", "torch", "transformers"} <= recipe["versions"].keys()
    assert json.loads(run("info", tmp_path / "a.json", "--json").stdout) == recipe


def test_options_override_the_file(text, run, tmp_path):
    text("red cup", "--out", tmp_path / "a.json", "--seed", 3, *SPARSE)
    out = tmp_path / "b.json"
    run("text", "the plate", "--from", tmp_path / "a.json", "--seed", 4, "--set", "select=1", "--out", out)
    recipe = json.loads(out.read_text())["recipe"]
    assert (recipe["prompt"], recipe["seed"]) == ("the plate", 4)
    assert recipe["sampling"]["steps"] == 8
    assert recipe["controls"][0]["settings"]["select"] == 1.0
    assert recipe["controls"][0]["settings"]["block_size"] == 4
    run("text", "--from", tmp_path / "a.json", "--method", "none", "--gen-length", 8, "--out", out)
    recipe = json.loads(out.read_text())["recipe"]
    assert recipe["controls"] == []
    assert (recipe["sampling"]["gen_length"], recipe["sampling"]["steps"]) == (8, 8)


def test_changed_surroundings_and_texts_are_told(text, run, tmp_path):
    path = tmp_path / "a.json"
    text("red cup", "--out", path)
    found = json.loads(path.read_text())
    found["recipe"]["versions"]["torch"] = "1.0"
    found["recipe"]["weights"]["sha256"] = "0" * 64
    found["tokens"][0] += 1
    path.write_text(json.dumps(found))
    done = run("text", "--from", path)
    assert done.exit_code == 0
    assert "torch was 1.0" in done.stderr
    assert "were 000000000000" in done.stderr
    assert "the text is another than the file's" in done.stderr


def test_dream(run, dream_folder, tmp_path):
    sampling = ("--gen-length", 8, "--alg", "entropy", "--top-p", 0.9, "--temperature", 0.5)
    out = tmp_path / "a.json"
    done = run("text", "red cup", "--model", dream_folder, *sampling, *SPARSE, "--out", out)
    assert done.exit_code == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["recipe"]["sampler"] == "dream"
    assert found["recipe"]["sampling"]["top_p"] == 0.9
    assert 0 not in found["tokens"]
    assert found["stats"]["control"]["steps"]["sparse"] == 6


def test_sparse_differs_and_neutral_does_not(text):
    dense = text("the red cup is on a plate .").stdout
    assert text("the red cup is on a plate .", *SPARSE, "--set", "select=1").stdout == dense
    assert text("the red cup is on a plate .", *SPARSE, "--set", "select=0.05").stdout != dense


def test_library_messages_are_notes(text):
    done = text("red cup purple", "--method", "sparsed", sizes=("--gen-length", 64, "--steps", 2))
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert all(line.startswith("note: ") for line in lines), lines
    assert any("does not know 'purple'" in line for line in lines)
    assert any("70 tokens are more than the 64" in line for line in lines)
    assert any("stays dense" in line for line in lines)


def test_ctrl_c_prints_what_was_decided(text, tmp_path, monkeypatch):
    from diffctrl.dlm.sampler import Canvas

    event = Canvas.event

    def interrupted(self, decided, step, block):
        if step == 5:
            raise KeyboardInterrupt
        return event(self, decided, step, block)

    monkeypatch.setattr(Canvas, "event", interrupted)
    done = text("red cup", "--out", tmp_path / "a.json")
    assert done.exit_code == 130
    assert "stopped" in done.stderr
    assert "░" in done.stdout
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["finished"] is False
    assert found["order"].count(-1) == 4


def test_an_answer_that_cannot_be_saved_is_shown(text, tmp_path):
    answer = text("red cup").stdout
    done = text("red cup", "--out", tmp_path / ("a" * 250))  # too long with what an unfinished file is called
    assert done.exit_code == 2
    assert done.stdout == answer
    assert "cannot be written (File name too long)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_the_order(text, monkeypatch):
    plain = text("red cup").stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    done = text("red cup", *SPARSE, "--set", "select=1")
    assert done.exit_code == 0
    assert done.stdout == plain
    assert "step 8 of 8" in done.stderr
    assert "38;2;70;90;200" in done.stderr  # the first step's colour
    assert "8 forwards" in done.stderr
    assert "dense throughout" in done.stderr


def test_view_colours_each_token_by_its_step():
    tokenizer = layouts.word_tokenizer()
    view = OrderView(tokenizer, ends={1}, length=4)

    def drawn():
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
        console.print(view)
        return console.file.getvalue()

    view.update(_event(0, [1], [6]))
    assert "cup" in drawn()
    assert drawn().count("░") == 3
    view.update(_event(2, [0, 3, -1], [5, 1, 4]))
    early, late = ("38;2;{};{};{}".format(*colour(share)) for share in (0.0, 1.0))
    assert f"{late}mred" in drawn().replace("\x1b[", "")
    assert f"{early}m cup" in drawn().replace("\x1b[", "")
    assert "∎" in drawn()
    assert "step 3 of 3" in drawn()


def _event(step, positions, tokens):
    rows = torch.zeros(len(positions), dtype=torch.long)
    return StepEvent(step, 3, 0, rows, torch.tensor(positions), torch.tensor(tokens), 0)


def test_text_cannot_steer_the_terminal(run, tmp_path, monkeypatch):
    folder = layouts.write(tmp_path / "model", layouts.LLADA, layouts.llada_weights())
    content = (folder / "tokenizer.json").read_text()
    for word in ("red", "cup", "is", "w12", "w13", "w14", "w15", "w16", "w17", "w18", "w19", "w20", "plate"):
        content = content.replace(f'"{word}"', f'"\\u001b[2J{word}"')
    (folder / "tokenizer.json").write_text(content)
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run("text", "the a on", "--model", folder, *SIZES)
    assert done.exit_code == 0
    assert "?[2J" in done.stdout
    assert "\x1b[2J" not in done.stdout + done.stderr


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "there is no prompt"),
        ((" ",), "there is no prompt"),
        (("copy \udcff",), "the prompt 'copy \\udcff' is not UTF-8"),
        (("a", "--method", "sparsd"), "did you mean sparsed?"),
        (("a", "--method", "softpag"), "softpag does not work on language models"),
        (("a", "--method", "sparsed", "--set", "selekt=1"), "did you mean select?"),
        (("a", "--method", "sparsed", "--set", "select=2"), "not in (0, 1]"),
        (("a", "--method", "sparsed", "--set", "select"), "not NAME=VALUE, as in --set select=0.3"),
        (("a", "--method", "sparsed", "--set", "builder=fused"), "write builder=chunked, or leave it out"),
        (("a", "--set", "select=0.3"), "add --method"),
        (("a", "--seed", "-1"), "range of seeds"),
        (("a", "--temperature", "-1"), "not a finite number >= 0"),
        (("a", "--threshold", "2"), "not in (0, 1]"),
        (("a", "--alg", "entropy"), "llada has no option 'alg'"),
        (("a", "--device", "tpu9"), "no device"),
        (("a", "--dtype", "int4"), "float32, bfloat16, float16"),
        (("a", "--from", "missing.json"), "no file missing.json"),
    ],
)
def test_one_sentence_and_exit_code_2(text, no_weights, tmp_path, arguments, says):
    _refused(text(*arguments), says)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (("--gen-length", 0), "gen_length=0"),
        (("--gen-length", 10, "--block-length", 8), "not a multiple of block_length"),
        (("--gen-length", 16, "--block-length", 8, "--steps", 5), "the nearest is 4"),
    ],
)
def test_sizes_that_cannot_be(text, no_weights, sizes, says):
    _refused(text("a", sizes=sizes), says)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/no/such/folder", "is no folder"),
        ("owner/name", "no folder owner/name here"),
        ("shapes-sd3", "of kind 'image', not of text"),
    ],
)
def test_models_that_are_not_there(text, no_weights, model, says):
    _refused(text("a", model=model), says)


def test_the_default_model_without_its_weights(run, no_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    _refused(run("text", "a"), "the weights of 'scenes-lm' are not in")


def test_a_folder_that_does_not_say_how_it_decodes(text, llada_folder, tmp_path):
    LLaDASparseDPipeline.from_pretrained(llada_folder).save_pretrained(tmp_path)
    assert text("a", model=tmp_path).exit_code == 0
    (tmp_path / "diffctrl.json").unlink()
    _refused(text("a", model=tmp_path), 'write {"sampler": ...} with one of llada, dream')


def test_weights_of_another_model(text, llada_folder, dream_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llada_folder, folder)
    shutil.copy(dream_folder / "model.safetensors", folder)
    _refused(text("a", model=folder), "are not those of the llada model")


def test_out_and_from_that_cannot_be(text, no_weights, tmp_path):
    _refused(text("a", "--out", tmp_path), "is a folder; name a file")
    _refused(text("a", "--out", "a" * 300), "cannot be written (File name too long)")
    (tmp_path / "taken").write_text("")
    _refused(text("a", "--out", tmp_path / "taken" / "a.json"), "cannot be written below")
    _refused(text("a", "--from", tmp_path / "taken"), "not a JSON file")
    (tmp_path / "other.json").write_text('{"recipe": {}}')
    _refused(text("a", "--from", tmp_path / "other.json"), "carries no recipe of a text")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found["recipe"].update(version=9), "version 9"),
        (lambda found: found["recipe"].update(seed="1"), "seed='1'"),
        (lambda found: found["recipe"].pop("weights"), "weights"),
        (lambda found: found["recipe"].update(extra=1), "unknown entry 'extra'"),
        (lambda found: found.pop("tokens"), "lacks tokens"),
        (lambda found: found.update(recipe=[]), "not a table"),
        (lambda found: found["recipe"]["sampling"].update(speed=1), "llada has no option 'speed'"),
        (lambda found: found["recipe"]["sampling"].update(steps="many"), "steps=many is not a whole number"),
    ],
)
def test_files_that_were_changed(text, run, tmp_path, change, says):
    path = tmp_path / "a.json"
    text("red cup", "--out", path, sizes=("--gen-length", 4))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    _refused(run("text", "--from", path), says)


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [(["a", "--method", "sparsd"], "False False"), (["a", "--model", "/no/folder"], "True False")],
)
def test_answered_before_torch_or_diffusers_is_imported(arguments, loaded):
    code = (
        f"import sys; from diffctrl.cli.app import app\ntry: app(['text', *{arguments}])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'diffusers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"2 {loaded}\n"


def _refused(done, says):
    assert done.exit_code == 2, done.stderr
    assert says in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("diffctrl: ")
    assert done.stdout == ""
