"""Clips as files: the same frames give the same file, close to what was drawn."""

from __future__ import annotations

import dataclasses
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

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


def _filmed(path: Path, *, frames: int = 25, aspect: int = 1) -> bytearray:
    """A clip of 48 x 64 whose top half is bright and whose lower half tells the number of the frame."""
    import av

    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=24, options={"crf": "4", "g": "100"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect, 1)
        for number in range(frames):
            picture = np.full((48, 64, 3), 10 * number, np.uint8)
            picture[:24] = 255
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return bytearray(path.read_bytes())


def test_a_clip_filmed_upright_is_read_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    file = _filmed(path)
    # As telephones write it: a quarter turn clockwise, in the matrix of the track's header.
    matrix = file.find(b"tkhd") + 4 + 40
    file[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(file)
    first = next(mp4.read_frames(path))
    assert first.shape == (64, 48, 3)
    assert first[:, 26:].mean() > 240 > 20 > first[:, :22].mean()  # the top has come to the right


def test_pixels_that_are_wide_are_read_square(tmp_path: Path) -> None:
    _filmed(tmp_path / "a.mp4", aspect=2)
    assert next(mp4.read_frames(tmp_path / "a.mp4")).shape == (48, 128, 3)


def test_frames_that_were_cut_off_without_encoding_anew_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    file, cut = _filmed(path), 8
    scale = {
        name: struct.unpack(">I", file[(at := file.find(name) + 16) : at + 4])[0]
        for name in (b"mvhd", b"mdhd")
    }
    entry = file.find(b"elst") + 12  # of the edit list: how long, and from when
    lasts, begins = struct.unpack(">Ii", file[entry : entry + 8])
    lasts, begins = lasts - cut * scale[b"mvhd"] // 24, begins + cut * scale[b"mdhd"] // 24
    file[entry : entry + 8] = struct.pack(">Ii", lasts, begins)
    path.write_bytes(file)
    frames = list(mp4.read_frames(path))
    assert mp4.frame_count(path) == len(frames) == 25 - cut
    assert frames[0][30:].mean() == pytest.approx(10 * cut, abs=4)
