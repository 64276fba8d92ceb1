"""Pictures and videos of any kind and size, as the model takes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffctrl.pipelines.refam_readers import Reader


def pixels_of(picture: Any) -> Tensor:
    """(F, 3, H, W) float32 in [0, 1] of a picture or a video, see `frames_of`."""
    return unit(frames_of(picture))


def unit(frames: Tensor) -> Tensor:
    """What `frames_of` gives as float32 in [0, 1]."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames


def frames_of(picture: Any) -> Tensor:
    """(F, 3, H, W) of a picture or a video, float32 in [0, 1] or uint8 as it came; a picture has one frame.

    Args:
        picture: a PIL image; an array (H, W, 3) or (F, H, W, 3), uint8 or float in [0, 1]; a tensor (3, H, W)
            or (F, 3, H, W), float in [0, 1]; or a list of such pictures.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(picture, (list, tuple)):
        if not picture:
            raise ValueError("the video has no frames")
        frames = [frames_of(frame) for frame in picture]
        if any(frame.shape != frames[0].shape or frame.shape[0] != 1 for frame in frames):
            raise ValueError("the frames of a video must be single pictures of one size")
        alike = all(frame.dtype == frames[0].dtype for frame in frames)
        return torch.cat(frames if alike else [unit(frame) for frame in frames])
    if hasattr(picture, "convert"):  # a PIL image
        picture = np.asarray(in_colour(picture))
    if isinstance(picture, np.ndarray):
        if picture.ndim not in (3, 4) or picture.shape[-1] != 3:
            raise ValueError(
                f"an array of shape {picture.shape} is no picture (H, W, 3) and no video (F, H, W, 3)"
            )
        values = torch.from_numpy(np.array(picture)).movedim(-1, -3)
        if picture.dtype == np.uint8:
            return values.reshape(-1, *values.shape[-3:])
        picture = values.float()
    if not isinstance(picture, Tensor):
        raise TypeError(
            f"a {type(picture).__name__} is no picture; give a PIL image, an array (H, W, 3), a tensor "
            "(3, H, W) in [0, 1], or a list or stack of them for a video"
        )
    if picture.ndim not in (3, 4) or picture.shape[-3] != 3 or not picture.is_floating_point():
        raise ValueError(
            f"a {picture.dtype} tensor of shape {tuple(picture.shape)} is no picture: (3, H, W) or (F, 3, "
            f"H, W), "
            "float in [0, 1]"
        )
    pixels = picture.reshape(-1, *picture.shape[-3:]).float().cpu()
    if not bool(((pixels >= -1e-3) & (pixels <= 1 + 1e-3)).all()):
        raise ValueError("the picture has values outside of [0, 1], or such that are no numbers")
    return pixels


def in_colour(picture: Any) -> Any:
    """A PIL image in mode "RGB"; 16 bits of grey become 8, where PIL's own conversion cuts them off at 255.

    Raises:
        ValueError: the picture does not say which value is white.
    """
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        picture = Image.fromarray(grey.astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"a picture of mode {picture.mode!r} does not say which of its values is white; save it as PNG "
            "with 8 or 16 bits a pixel"
        )
    return picture.convert("RGB")


def fitted_size(height: int, width: int, reader: Reader) -> tuple[int, int]:
    """The size at which a model sees a picture: its own area, about, and the picture's proportions."""
    scale = math.sqrt(reader.area / (height * width))
    longest = reader.longest_side or math.inf

    def side(value: int) -> int:
        wanted = max(1, round(value * scale / reader.multiple)) * reader.multiple
        return int(min(wanted, longest))

    return side(height), side(width)


def check_size(size: tuple[int, int], reader: Reader) -> tuple[int, int]:
    """A size that the user gave.

    Raises:
        ValueError: the model cannot take it.
    """
    for name, value in zip(("height", "width"), size, strict=True):
        too_long = reader.longest_side is not None and value > reader.longest_side
        if value < reader.multiple or value % reader.multiple or too_long:
            up_to = "" if reader.longest_side is None else f", up to {reader.longest_side}"
            raise ValueError(
                f"{name} {value} does not fit this {type(reader.pipe).__name__}: multiples of "
                f"{reader.multiple}{up_to}"
            )
    return size


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(F, 3, H, W) at another size, smoothed where it gets smaller."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def clip_length(frames: int, reader: Reader, wanted: int | None, latent_frames: int = 7) -> int:
    """How many frames of a video are read: 1 + whole chunks, at most `wanted` or the latent frames'."""
    if reader.frame_step == 0:
        return 1
    most = min(frames, wanted if wanted is not None else 1 + reader.frame_step * (latent_frames - 1))
    return 1 + (max(most, 1) - 1) // reader.frame_chunk * reader.frame_chunk


def middle_frame_of(latent_frame: int, step: int) -> int:
    """The middle frame of those that a latent frame stands for; latent frame 0 is frame 0."""
    return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * step + step // 2
