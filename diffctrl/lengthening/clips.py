"""What a length LoRA is trained on: a folder of clips with captions, or the generated world of clips."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffctrl.drawing import mp4
from diffctrl.errors import BadRequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INDEX = "metadata.jsonl"
_FILE_KEYS, _CAPTION_KEYS = ("file_name", "file", "video"), ("caption", "text", "prompt")


class Source(ABC):
    """Captioned clips in numbered blocks, all of one length and size.

    Attributes:
        per_block: clips of a block; the last one may hold fewer.
        frames: of every clip.
        height, width: in pixels.
    """

    per_block: ClassVar[int]
    frames: int
    height: int
    width: int

    @abstractmethod
    def __len__(self) -> int:
        """Clips."""

    @property
    def blocks(self) -> int:
        return -(-len(self) // self.per_block)

    def members(self, block: int) -> range:
        """The clips of a block."""
        return range(block * self.per_block, min(len(self), (block + 1) * self.per_block))

    @abstractmethod
    def captions(self, block: int) -> list[str]:
        """One for each clip of the block."""

    @abstractmethod
    def pixels(self, block: int, device: torch.device) -> Tensor:
        """(B, T, 3, H, W) float32 in [0, 1] on the device."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What two trainings on the same clips share; plain values."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A file and what it shows."""

    path: Path
    caption: str


class ClipFolder(Source):
    """Clips of a folder: the middle of each, scaled until it fills the size, and cut at its borders."""

    per_block = 1

    def __init__(self, clips: tuple[Clip, ...], *, frames: int, height: int, width: int) -> None:
        self.clips = clips
        self.frames, self.height, self.width = frames, height, width

    def __len__(self) -> int:
        return len(self.clips)

    def captions(self, block: int) -> list[str]:
        return [self.clips[block].caption]

    def pixels(self, block: int, device: torch.device) -> Tensor:
        import torch

        path = self.clips[block].path
        first = (mp4.frame_count(path) - self.frames) // 2
        frames = list(islice(mp4.read_frames(path), max(first, 0), max(first, 0) + self.frames))
        if len(frames) < self.frames:
            raise BadRequestError(f"{path} has fewer frames than it says, {len(frames)} of {self.frames}")
        video = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]).to(device)
        return self._fitted(video.float() / 255)[None]

    def _fitted(self, video: Tensor) -> Tensor:
        from torch.nn.functional import interpolate

        rows, columns = video.shape[-2:]
        factor = max(self.height / rows, self.width / columns)
        size = max(self.height, round(rows * factor)), max(self.width, round(columns * factor))
        video = interpolate(video, size, mode="bilinear", antialias=True, align_corners=False)
        top, left = (size[0] - self.height) // 2, (size[1] - self.width) // 2
        return video[..., top : top + self.height, left : left + self.width].clamp(0, 1)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for clip in self.clips:
            digest.update(f"{clip.path.name} {clip.path.stat().st_size} {clip.caption}\n".encode())
        return {"clips": len(self), "sha256": digest.hexdigest()}


class World(Source):
    """Clips of the generated world, half of them captioned in full."""

    per_block = 16

    def __init__(self, count: int, *, seed: int, frames: int, pixels: int) -> None:
        self.count, self.seed, self.frames = count, seed, frames
        self.height = self.width = pixels

    def __len__(self) -> int:
        return self.count

    def _scenes(self, block: int) -> Any:
        from diffctrl.zoo import clips

        return clips.sample(len(self.members(block)), seed=self.seed, index=block, frames=self.frames)

    def captions(self, block: int) -> list[str]:
        import torch

        from diffctrl.zoo import clips

        scenes = self._scenes(block)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        uniforms = torch.rand(len(scenes), clips.CAPTION_UNIFORMS, generator=draw)
        uniforms = clips.detailed(uniforms, torch.arange(len(scenes)) % 2 == 0)
        return clips.to_text(clips.caption_words(scenes, uniforms))

    def pixels(self, block: int, device: torch.device) -> Tensor:
        from diffctrl.zoo import clips

        return clips.render(self._scenes(block).to(device), self.height)[0]

    def identity(self) -> dict[str, Any]:
        return {"world": "clips", "clips": self.count, "seed": self.seed}


def read_folder(folder: Path, frames: int) -> tuple[Clip, ...]:
    """The clips of a folder that are long enough to train on.

    Captions stand in `metadata.jsonl`, one line for a clip ({"file_name": "a.mp4", "caption": "..."}), or
    beside each clip in a text file of its name. Links are followed, as downloads of the hub are made of them.

    Raises:
        BadRequestError: there is no such folder, a caption or clip is missing or cannot be read, or a clip is
            too short.
    """
    if not folder.is_dir():
        raise BadRequestError(f"--data {folder} is no folder")
    index = folder / _INDEX
    clips = _indexed(folder, index) if index.is_file() else _beside(folder)
    if not clips:
        raise BadRequestError(
            f"--data {folder} holds no clips: it takes MP4 files with a text file of the same name beside "
            f"each, or {_INDEX}"
        )
    short = [clip.path.name for clip in clips if mp4.frame_count(clip.path) < frames]
    if short:
        more = f" and {len(short) - 3} more" if len(short) > 3 else ""
        raise BadRequestError(
            f"{', '.join(short[:3])}{more} in {folder} are shorter than --frames {frames}; take them out, or "
            "train for fewer frames"
        )
    return clips


def _beside(folder: Path) -> tuple[Clip, ...]:
    clips = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() != ".mp4" or path.name.startswith("."):
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise BadRequestError(f"{path} has no caption: there is no {text.name} beside it")
        clips.append(Clip(path, _caption(_read(text), path.name)))
    return tuple(clips)


def _indexed(folder: Path, index: Path) -> tuple[Clip, ...]:
    clips = []
    for number, line in enumerate(_read(index).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = next(entry[key] for key in _FILE_KEYS if key in entry)
            caption = next(entry[key] for key in _CAPTION_KEYS if key in entry)
            if not (isinstance(name, str) and isinstance(caption, str)):
                raise TypeError
        except (ValueError, TypeError, StopIteration):
            raise BadRequestError(
                f'{index}, line {number} is not {{"file_name": "...", "caption": "..."}}'
            ) from None
        path = Path(os.path.normpath(folder / name))
        if not path.is_relative_to(os.path.normpath(folder)) or not path.is_file():
            raise BadRequestError(f"{index}, line {number} names {name}, which is not in the folder")
        clips.append(Clip(path, _caption(caption, name)))
    return tuple(clips)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequestError(f"{path} is no text in UTF-8") from None


def _caption(text: str, name: str) -> str:
    if not text.strip():
        raise BadRequestError(f"the caption of {name} is empty")
    return " ".join(text.split())
