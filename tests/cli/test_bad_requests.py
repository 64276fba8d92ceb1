"""Bad input: one clear sentence, exit code 2, no traceback, before weights are loaded."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from diffctrl.drawing.source import KINDS, ModelSource

LONG = "a red star " * 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a red star", "--method", "softpeg"), "did you mean softpag?"),
        (("a red star", "--method", "softpag", "--set", "scop=joint"), "did you mean scope?"),
        (("a red star", "--method", "softpag", "--set", "radial.u=1"), "in use: softpag"),
        (("a red star", "--method", "softpag", "--set", "u=2"), "not in [0, 1]"),
        (("a red star", "--method", "softpag", "--set", "u=strong"), "not a number"),
        (("a red star", "--method", "softpag", "--set", "scope=all"), "not one of joint, image_rows"),
        (("a red star", "--method", "softpag", "--set", "heads=top"), "there is no head set 'top'"),
        (("a red star", "--method", "softpag", "--set", "heads=L9"), "head L9 does not exist"),
        (
            (
                "a red star",
                "--method",
                "softpag",
                "--set",
                "start_fraction=0.4",
                "--set",
                "stop_fraction=0.6",
            ),
            "stop_fraction=0.6 holds none of the 3 steps",
        ),
        (("a red star", "--method", "softpag", "--set", "u"), "not NAME=VALUE"),
        (("a red star", "--method", "softpag", "--method", "none"), "cannot be combined"),
        (("a red star", "--set", "u=0.5"), "add --method"),
        (("a red star", "--compare"), "needs a method"),
        (("a red star", "--size", "30x32"), "the nearest is 32"),
        (("a red star", "--height", "128"), "up to 64"),
        (("a red star", "--width", "0"), "the nearest is 8"),
        (("a red star", "--size", "big"), "HEIGHTxWIDTH"),
        (("a red star", "--size", "32x32", "--height", "32"), "give one of them"),
        (("a red star", "--seed", "-1"), "range of seeds"),
        (("a red star", "--num", "0"), "starts at 1"),
        (("a red star", "--guidance-scale", "nan"), "finite"),
        (("a red star", "--guidance-scale", "1", "--negative", "blue"), "no effect"),
        (("a red star", "--device", "tpu9"), "no device"),
        (("a red star", "--device", "cuda:99"), "no device"),
        (("a red star", "--dtype", "int4"), "float32, bfloat16, float16"),
        ((LONG,), "too long"),
        (("a red star", "--negative", LONG), "negative prompt is too long"),
        ((" ",), "no prompt"),
        (("a red \udcff star",), r"the prompt 'a red \udcff star' is not UTF-8"),
        (("a red star", "--negative", "\udcff"), "the negative prompt '\\udcff' is not UTF-8"),
        ((), "no prompt"),
        (("a red star", "--from", "missing.png"), "no file missing.png"),
    ],
)
def test_one_sentence_and_exit_code_2(generate, no_weights, tmp_path, arguments, says):
    _refused(generate(*arguments), says)
    assert list(tmp_path.iterdir()) == []


def test_no_steps(generate, no_weights):
    _refused(generate("a red star", steps=0), "starts at 1")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/no/such/folder", "no folder"),
        ("shapes-sd", "did you mean shapes-sd3?"),
        ("scenes-lm", "use it with `diffctrl text`"),
        ("a b", "no hub repository"),
        ("owner/name", "no folder owner/name here"),  # the tests are offline
    ],
)
def test_models_that_are_not_there(generate, no_weights, model, says):
    _refused(generate("a red star", model=model), says)


def test_folder_without_a_pipeline(generate, no_weights, tmp_path):
    (tmp_path / "empty").mkdir()
    _refused(generate("a red star", model=tmp_path / "empty"), "no model_index.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "AudioLDMPipeline"}, "is a AudioLDMPipeline"),
        ({"vae": ["my_code", "Autoencoder"]}, "comes from 'my_code'"),
    ],
)
def test_pipelines_that_are_not_drawn_with(generate, no_weights, tiny_model, tmp_path, change, says):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    _refused(generate("a red star", model=folder), says)


def test_the_safety_checker_of_diffusers_is_no_strangers_code(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    change = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    assert ModelSource.find(str(folder)).kind is KINDS["StableDiffusionPipeline"]


def test_weights_other_than_safetensors(generate, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.bin"
    )
    _refused(generate("a red star", model=folder), "cannot be loaded")


def test_pictures_without_a_recipe(generate, no_weights, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    _refused(generate("--from", tmp_path / "plain.png"), "carries no recipe")
    (tmp_path / "text.png").write_text("no picture")
    _refused(generate("--from", tmp_path / "text.png"), "not a PNG file")


def test_out_that_is_a_file(generate, no_weights, tmp_path):
    (tmp_path / "taken").write_text("")
    _refused(generate("a red star", out=tmp_path / "taken"), "cannot be a folder")


def test_prompt_that_one_encoder_cuts_is_told(generate):
    done = generate("a red star " * 20)
    assert done.exit_code == 0
    assert "tokenizer of" in done.stderr
    assert "reads 32 of the prompt's 62 tokens" in done.stderr


def test_misspelt_method_is_answered_before_torch_is_imported():
    code = (
        "import sys; from diffctrl.cli.app import app\n"
        "try: app(['generate', 'a red star', '--method', 'softpeg'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'diffusers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False False\n"


def _refused(done, says):
    assert done.exit_code == 2, done.stderr
    assert says in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("diffctrl: ")
    assert done.stdout == ""
