"""`diffctrl generate` with a video model: an MP4 with its recipe, repeated to the same frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from diffctrl.drawing import mp4, prompts, reading
from diffctrl.errors import BadRequestError
from diffctrl.zoo import clips, registry
from tests.length.models import FRAMES, lora_file, save, wan

PROMPT = "a red circle moves right"


@pytest.fixture(scope="session")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny-wan")


@pytest.fixture(scope="session")
def length_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    lora_file(folder / "dense.safetensors", wan(), method="dense")
    return lora_file(folder / "long.safetensors", wan())


@pytest.fixture
def clip(run: Callable[..., Any], video_model: Path, tmp_path: Path) -> Callable[..., Any]:
    def clip(*arguments: Any, model: Any = video_model, out: Path = tmp_path / "out") -> Any:
        return run("generate", *arguments, "--model", model, "--out", out)

    return clip


def _only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def _frames(path: Path) -> np.ndarray:
    return np.stack(list(mp4.read_frames(path)))


def test_a_clip_is_drawn_as_its_card_says(clip: Any, tmp_path: Path) -> None:
    done = clip(PROMPT, "--seed", 3)
    assert done.exit_code == 0, done.stderr
    path = _only(tmp_path / "out")
    assert done.stdout == f"{path}\n"
    assert path.name.startswith("tiny-wan-stock-3-")
    assert path.suffix == ".mp4"
    assert _frames(path).shape == (FRAMES, 32, 32, 3)
    recipe = mp4.read_recipe(path)
    assert (recipe.frames, recipe.fps, recipe.steps, recipe.lora) == (FRAMES, 16, 3, None)
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 16


def test_the_long_clip_of_the_readme_is_repeated_from_its_file(
    clip: Any, run: Any, length_lora: Path, tmp_path: Path
) -> None:
    options = ("--frames", 33, "--method", "radial", "--lora", length_lora, "--set", "dense_last_steps=0")
    done = clip(PROMPT, *options)
    assert done.exit_code == 0, done.stderr
    path = _only(tmp_path / "out")
    shown = run("info", path)
    assert shown.exit_code == 0
    said = "".join(shown.stdout.split())  # the table folds long values
    for text in (PROMPT, "33, 16 a second", "radial(", "long.safetensors"):
        assert text.replace(" ", "") in said
    assert json.loads(run("info", path, "--json").stdout)["lora"]["name"] == str(length_lora)
    again = run("generate", "--from", path, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert "may differ" not in again.stderr
    repeated = _only(tmp_path / "again")
    assert (repeated.name, mp4.read_recipe(repeated)) == (path.name, mp4.read_recipe(path))
    assert np.array_equal(_frames(repeated), _frames(path))
    for more in (("--lora", "none"), ("--method", "none"), ("--frames", 17)):
        folder = tmp_path / more[0].strip("-")
        other = run("generate", "--from", path, *more, "--out", folder)
        assert other.exit_code == 0, other.stderr
        found = _frames(_only(folder))
        assert found.shape != _frames(path).shape or not np.array_equal(found, _frames(path))


def test_compare_shows_both_clips(clip: Any, length_lora: Path, tmp_path: Path) -> None:
    done = clip(PROMPT, "--lora", length_lora, "--compare")
    assert done.exit_code == 0, done.stderr
    assert "was trained under a radial mask; add --method radial" in done.stderr
    frames = _frames(_only(tmp_path / "out"))
    assert frames.shape[0] == FRAMES
    left, right = frames[:, 12 : 12 + 384, 12 : 12 + 384], frames[:, 12 : 12 + 384, 408 : 408 + 384]
    assert np.abs(left.astype(int) - right).mean() > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--frames", 16), "--frames 16 is not a length of"),
        (("--frames", 0), "the nearest is 1"),
        (("--size", "30x32"), "multiples of 16"),
        (("--lora", "length-4y"), "there is no length LoRA 'length-4y'"),
        (("--method", "radial", "--set", "decay_factor=0.5", "--lora", "LORA"), "decay_factor=0.5 (trained"),
        (
            ("--method", "radial", "--set", "radial.block=128", "--lora", "LORA"),
            "block=128 (trained with 16)",
        ),
        (
            ("--method", "radial", "--lora", "DENSE"),
            "was trained with dense attention; leave --method radial",
        ),
        (
            ("--method", "softpag", "--set", "rescale=0.5", "--guidance-scale", 3),
            "rescale=0.5 needs the guided prediction, and",
        ),
        (("--method", "radial", "--set", "dense_blocks=3"), "leaves none of the 3 blocks"),
    ],
)
def test_bad_requests(
    clip: Any, no_weights: None, length_lora: Path, tmp_path: Path, arguments: tuple[Any, ...], says: str
) -> None:
    files = {"LORA": length_lora, "DENSE": length_lora.with_name("dense.safetensors")}
    done = clip(PROMPT, *(files.get(a, a) for a in arguments))
    assert done.exit_code == 2
    assert says in done.stderr.replace(str(length_lora), "LORA")
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_pictures_have_no_length_and_no_length_lora(run: Any, tiny_model: Path, length_lora: Path) -> None:
    for more, says in ((("--frames", 9), "draws pictures"), (("--lora", length_lora), "draws pictures")):
        done = run("generate", "a red star", "--model", tiny_model, *more)
        assert done.exit_code == 2
        assert says in done.stderr


def test_a_lora_of_another_model_is_refused(clip: Any, no_weights: None, length_lora: Path, video_model: Path,
                                            tmp_path: Path) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(video_model, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 5}))
    done = clip(PROMPT, "--lora", length_lora, model=folder)
    assert done.exit_code == 2
    assert "num_layers=5 (trained on 3)" in done.stderr


def test_a_model_whose_weights_are_not_there_says_what_to_do(
    clip: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path / "none")
    done = clip(PROMPT, "--frames", 129, "--method", "radial", "--lora", "length-4x", model="shapes-wan")
    assert done.exit_code == 2
    assert "the weights of 'shapes-wan' are not in this package; scripts/train_zoo_video.py" in done.stderr


def test_a_clip_is_read_by_the_judge() -> None:
    scenes = clips.sample(1, seed=4, forms=("plain",))
    video = (clips.render(scenes, 64)[0][0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    every_word = clips.detailed(torch.rand(1, clips.CAPTION_UNIFORMS), torch.tensor([True]))
    (caption,) = clips.to_text(clips.caption_words(scenes, every_word))
    assert reading.read_clip(video, caption).verdict == "as asked"
    assert reading.read_clip(video, "a red dragon").obeys is None
    assert reading.read_clip(video[:9], caption).obeys is None
    assert prompts.unknown_words(caption, clips=True) == []
    assert prompts.unknown_words("a red dragon moves right", clips=True) == ["dragon"]


def test_the_embedded_model_and_lora_by_their_names(
    run: Any, video_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    weights = tmp_path / "weights"
    monkeypatch.setattr(registry, "_WEIGHTS", weights)
    shutil.copytree(video_model, weights / "shapes-wan")
    lora_file(weights / "loras" / "length-4x.safetensors", wan(), latent_frames=(65, 65))
    done = run(
        "generate", "a red dragon moves right", "--model", "shapes-wan", "--frames", 129,
        "--method", "radial", "--lora", "length-4x", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    path = _only(tmp_path / "out")
    assert mp4.frame_count(path) == 129
    recipe = mp4.read_recipe(path)
    assert recipe.lora is not None
    assert (recipe.model, recipe.lora.name) == ("shapes-wan", "length-4x")
    assert "never saw 'dragon'" in done.stderr
    assert "not judged" in done.stderr  # the judge does not know dragons
    assert "trained on clips of" not in done.stderr
    assert "length-4x" in run("info").stdout
    assert "radial LoRA of rank 4" in json.loads(run("info", "--json").stdout)["loras"]["length-4x"]
    wrong = run("generate", "a red circle", "--model", "shapes-wan", "--lora", "length-4y")
    assert "did you mean length-4x?" in wrong.stderr


@pytest.mark.parametrize("card", ["no json", "{}", '{"call": {"height": "32"}}'])
def test_a_card_that_cannot_be_read(clip: Any, video_model: Path, tmp_path: Path, card: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(video_model, folder)
    (folder / "diffctrl.json").write_text(card)
    done = clip(PROMPT, model=folder)
    assert done.exit_code == 2
    assert "names no arguments of a call" in done.stderr


def test_files_that_are_no_clips(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no clip")
    done = run("info", tmp_path / "a.mp4")
    assert done.exit_code == 2
    assert "not a video file" in done.stderr
    with av.open(str(tmp_path / "plain.mp4"), "w") as file:
        stream: Any = file.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for shade in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * shade, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert mp4.frame_count(tmp_path / "plain.mp4") == 5
    with pytest.raises(BadRequestError, match="carries no recipe"):
        mp4.read_recipe(tmp_path / "plain.mp4")
    with pytest.raises(BadRequestError, match="no file"):
        mp4.frame_count(tmp_path / "none.mp4")


def test_an_interrupted_clip_leaves_no_file(clip: Any, tmp_path: Path, monkeypatch: Any) -> None:
    clip(PROMPT)
    recipe = mp4.read_recipe(_only(tmp_path / "out"))
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    stock = av.VideoFrame.from_ndarray
    drawn = []

    def from_ndarray(*arguments: Any, **options: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return stock(*arguments, **options)

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", from_ndarray)
    with pytest.raises(KeyboardInterrupt):
        mp4.write(frames, tmp_path / "new" / "a.mp4", recipe)
    assert list((tmp_path / "new").iterdir()) == []
