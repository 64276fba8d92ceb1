"""MP4 files: written whole or not at all, with their recipe; clips read frame by frame."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffctrl.drawing.recipe import Recipe
from diffctrl.errors import BadRequestError

if TYPE_CHECKING:
    import numpy as np

# The one tag that MP4 keeps in full under a common name, so that players show it.
TAG = "comment"
_QUALITY = "12"  # constant rate factor of x264: no loss that one sees
# The same frames shall give the same file. x264's macroblock tree does not keep to that on small frames: of
# 32 x 32 pixels the same clip gave five files in 16 writes, without it one.
_REPEATABLE = {"threads": "1", "x264-params": "mbtree=0"}


def write(frames: np.ndarray, path: Path, recipe: Recipe) -> None:
    """Save a clip with its recipe; an interrupted run leaves nothing behind.

    Args:
        frames: (T, H, W, 3) uint8; H and W even.
        path: of the file.
        recipe: what `info` and `--from` read, and how many frames a second.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(str(unfinished.absolute()), "w", format="mp4") as file:
            file.metadata[TAG] = recipe.to_json()
            options = {"crf": _QUALITY, **_REPEATABLE}
            stream: Any = file.add_stream("libx264", rate=Fraction(recipe.fps or 1), options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"  # what every player shows
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_recipe(path: Path) -> Recipe:
    """The recipe in an MP4 file. The frames are not decoded.

    Raises:
        BadRequestError: there is no such file, it is no MP4, or it carries no recipe.
    """
    with _opened(path) as file:
        text = file.metadata.get(TAG)
    if text is None:
        raise BadRequestError(
            f"{path} carries no recipe: `diffctrl generate` did not write it, or it was re-coded"
        )
    try:
        return Recipe.from_json(text)
    except BadRequestError as error:
        raise BadRequestError(f"{path} cannot be repeated: {error}") from None


def frame_count(path: Path) -> int:
    """Frames of a clip, counted without decoding them.

    Raises:
        BadRequestError: the file is no clip that can be read.
    """
    import av

    with _opened(path) as file:
        try:
            packets = file.demux(video=0)
            return sum(packet.pts is not None and not packet.is_discard for packet in packets)
        except (av.FFmpegError, IndexError):
            raise BadRequestError(f"{path} holds no video that can be read") from None


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a clip in order as a player shows them, (H, W, 3) uint8 each.

    Raises:
        BadRequestError: the file is no clip that can be read.
    """
    import av

    with _opened(path) as file:
        try:
            aspect = float(file.streams.video[0].sample_aspect_ratio or 1)
            for frame in file.decode(video=0):
                yield _as_shown(frame, aspect)
        except (av.FFmpegError, IndexError):
            raise BadRequestError(f"{path} holds no video that can be read") from None


def _as_shown(frame: Any, aspect: float) -> np.ndarray:
    """Pixels made square, and turned as the file says: telephones film upright clips lying on a side."""
    import numpy as np

    wide = {"width": round(frame.width * aspect), "height": frame.height}
    pixels = frame.to_ndarray(format="rgb24", **wide)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _opened(path: Path) -> Any:
    import av

    if not path.is_file():
        raise BadRequestError(f"there is no file {path}")
    try:
        return av.open(str(path.absolute()), "r")
    except (av.FFmpegError, OSError, ValueError):
        raise BadRequestError(f"{path} is not a video file that can be read") from None
