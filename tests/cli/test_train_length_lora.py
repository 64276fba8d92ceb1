"""`diffctrl train-length-lora`: a LoRA on disk, which `generate` takes; refusals in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffctrl.zoo import registry
from tests.length.models import save


def test_what_it_trains_is_what_generate_takes(run: Any, tmp_path: Path) -> None:
    model, out = save(tmp_path / "tiny-wan"), tmp_path / "lora"
    done = run(
        "train-length-lora", "--model", model, "--frames", 33, "--clips", 2, "--steps", 1, "--rank", 4,
        "--set", "block=16", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{out / 'length-lora.safetensors'}\n"
    said = (
        "radial LoRA of rank 4 on 12 layers of tiny-wan, 2 clips of 33 frames (17 latent), 32 x 32; 1 steps"
    )
    assert said in done.stderr
    drawn = run(
        "generate", "a red circle", "--model", model, "--frames", 33, "--method", "radial", "--lora", out,
        "--out", tmp_path / "clips",
    )  # fmt: skip
    assert drawn.exit_code == 0, drawn.stderr
    assert "block=128" not in drawn.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", 0), "--steps 0 is out of range"),
        (("--set", "block"), "not NAME=VALUE, as in --set block=64"),
        (("--size", "big"), "HEIGHTxWIDTH"),
        (("--model", "shapes-sd3"), "length LoRAs are trained on WanPipeline, HunyuanVideoPipeline"),
        ((), "the weights of 'shapes-wan' are not in this package; scripts/train_zoo_video.py trains"),
    ],
)
def test_one_sentence_and_exit_code_2(
    run: Any, tmp_path: Path, monkeypatch: Any, arguments: tuple[Any, ...], says: str
) -> None:
    if not arguments:
        monkeypatch.setattr(registry, "_WEIGHTS", tmp_path / "none")
    done = run("train-length-lora", "--frames", 33, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
