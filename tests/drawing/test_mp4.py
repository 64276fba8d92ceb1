"""Clips as files: the same frames give the same file, close to what was drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from diffctrl.drawing import mp4
from tests.drawing.test_recipe import RECIPE


@pytest.mark.parametrize("side", [32, 64])
def test_the_same_frames_give_the_same_file(tmp_path: Path, side: int) -> None:
    rng = np.random.default_rng(0)
    first = (rng.random((side // 4, side // 4, 3)) * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([np.roll(first, (time // 2, time), (0, 1)) for time in range(33)])
    recipe = dataclasses.replace(RECIPE, frames=33, fps=16)
    files = set()
    for turn in range(16):
        # What was freed before is what an encoder finds that reads beyond its frame.
        freed = [np.full(size, 37 * turn % 255, np.uint8) for size in rng.integers(500, 60_000, 300)]
        del freed
        mp4.write(frames, tmp_path / "a.mp4", recipe)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1
    back = np.stack(list(mp4.read_frames(tmp_path / "a.mp4")))
    assert np.abs(back.mean(3) - frames.mean(3)).mean() < 10  # of colour, half the size is kept
    assert mp4.read_recipe(tmp_path / "a.mp4") == recipe


def test_names_with_a_colon_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("2025-05-01T12:30:00") / "a.mp4"  # to the library of codecs a protocol and its address
    recipe = dataclasses.replace(RECIPE, frames=3, fps=16)
    mp4.write(np.zeros((3, 32, 32, 3), np.uint8), path, recipe)
    assert mp4.read_recipe(path) == recipe
    assert len(list(mp4.read_frames(path))) == 3
