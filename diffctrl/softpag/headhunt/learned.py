"""Learned scorers from weights that the user has: PickScore, CLIP, and an aesthetic head on CLIP.

They are CLIP models of `transformers`. Only folders are read, never the network; safetensors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffctrl.errors import BadRequestError

# CLIP's own statistics, for folders without a preprocessor_config.json.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEAD_FILE = "aesthetic.safetensors"
_END_BYTES = 2**20


class _ClipScorer:
    """What the three share: a CLIP model, its tokenizer, and pictures prepared as it was trained."""

    def __init__(self, name: str, folder: Path, device: str, version: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.name, self.version = name, version
        options: dict[str, Any] = {"local_files_only": True}
        try:
            self._model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, **options)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise BadRequestError(f"{name}: {folder} holds no CLIP model of transformers ({first})") from None
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._device = device
        statistics = _preprocessor(folder)
        self._mean, self._std = (torch.tensor(each, device=device)[:, None, None] for each in statistics)
        self._size = int(self._model.config.vision_config.image_size)

    def _images(self, images: Tensor) -> Tensor:
        """(N, D) of unit length."""
        pictures = images.to(self._device, torch.float32)
        height, width = pictures.shape[-2:]
        factor = self._size / min(height, width)
        sides = (max(self._size, round(height * factor)), max(self._size, round(width * factor)))
        pictures = F.interpolate(pictures, sides, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (sides[0] - self._size) // 2, (sides[1] - self._size) // 2
        pictures = pictures[:, :, top : top + self._size, left : left + self._size]
        pooled = self._model.vision_model((pictures - self._mean) / self._std).pooler_output
        return F.normalize(self._model.visual_projection(pooled).float(), dim=-1)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) of unit length."""
        # As many tokens as the text tower has positions: a tokenizer's own limit may be missing.
        length = int(self._model.config.text_config.max_position_embeddings)
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self._device)
        pooled = self._model.text_model(**tokens).pooler_output
        return F.normalize(self._model.text_projection(pooled).float(), dim=-1)

    def _cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return (self._images(images) * self._texts(prompts)).sum(-1)


class PickScore(_ClipScorer):
    """PickScore (arXiv 2305.01569): the cosine times the model's learned temperature."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        return (self._model.logit_scale.exp().float() * self._cosines(images, prompts)).tolist()


class ClipScore(_ClipScorer):
    """100 times the cosine of picture and prompt."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        return (100 * self._cosines(images, prompts)).tolist()


class Aesthetic(_ClipScorer):
    """An aesthetic head on CLIP's picture embedding: a chain of linear layers, as LAION's predictor has.

    The layers come from `aesthetic.safetensors` in the folder ("layers.N.weight", "layers.N.bias"). LAION
    publishes a pickle, which is not read: convert it once with safetensors.
    """

    def __init__(self, name: str, folder: Path, device: str, version: str) -> None:
        from safetensors.torch import load_file

        super().__init__(name, folder, device, version)
        weights = load_file(folder / _HEAD_FILE, device=device)
        order = sorted({int(key.split(".")[1]) for key in weights})
        self._layers = nn.Sequential(*(_linear(weights, index) for index in order)).to(device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        with torch.no_grad():
            return self._layers(self._images(images))[:, 0].tolist()


def _linear(weights: dict[str, Tensor], index: int) -> nn.Linear:
    weight, bias = weights[f"layers.{index}.weight"].float(), weights[f"layers.{index}.bias"].float()
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return layer


_CLASSES = {"pickscore": PickScore, "clip": ClipScore, "aesthetic": Aesthetic}


def load(name: str, folder: str, device: str) -> Any:
    """A learned objective.

    Raises:
        BadRequestError: the folder is not there, or lacks what the scorer needs.
    """
    path = Path(folder).expanduser()
    needed = ["config.json", *([_HEAD_FILE] if name == "aesthetic" else [])]
    missing = [file for file in needed if not (path / file).is_file()]
    if missing:
        raise BadRequestError(
            f"the objective {name} needs {' and '.join(missing)} in {folder}; download the model's folder "
            "first (diffctrl does not), in transformers' format with safetensors"
        )
    return _CLASSES[name](name, path, device, _version(path))


def _version(folder: Path) -> str:
    """Identifies the weights: names, sizes and both ends of every weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_END_BYTES))
            opened.seek(max(0, size - _END_BYTES))
            digest.update(opened.read(_END_BYTES))
    return digest.hexdigest()[:16]


def _preprocessor(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return _MEAN, _STD
    values = json.loads(file.read_text(encoding="utf-8"))
    return tuple(values.get("image_mean", _MEAN)), tuple(values.get("image_std", _STD))
