"""Clips as files: the same frames give the same file, close to what was drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from diffctrl.drawing import mp4
from tests.drawing.test_recipe import RECIPE


@pytest.mark.parametrize("side", [32, 64, 96])
def test_the_same_frames_give_the_same_file(tmp_path: Path, side: int) -> None:
    rng = np.random.default_rng(side)
    steps = rng.integers(-2, 3, (33, side // 8, side // 8, 3)).cumsum(0) + 128
    frames = steps.clip(0, 255).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    recipe = dataclasses.replace(RECIPE, frames=33, fps=16)
    files = set()
    for turn in range(12):
        # What was freed before is what an encoder reads that goes beyond its frame.
        freed = [np.full(size, turn, np.uint8) for size in rng.integers(500, 60_000, 200)]
        del freed
        mp4.write(frames, tmp_path / "a.mp4", recipe)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1
    back = np.stack(list(mp4.read_frames(tmp_path / "a.mp4")))
    assert np.abs(back.astype(int) - frames).mean() < 4  # colour is kept at half the size
    assert mp4.read_recipe(tmp_path / "a.mp4") == recipe
