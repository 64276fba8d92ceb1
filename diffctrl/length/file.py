"""The file of a length LoRA: weights as diffusers stores them, and what they were trained with.

Any pipeline of diffusers loads it with `load_lora_weights`, with the right alpha. What only diffctrl reads
is in the file's metadata under one key, and checked entry by entry: the file may come from anywhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffctrl.errors import BadRequestError
from diffctrl.length.masks import DENSE, MASK_FIELDS
from diffctrl.radial import RadialConfig

VERSION = 1
METHODS = ("radial", "dense")
PREFIX = "transformer."
_KEY = "diffctrl_length_lora"
_ADAPTER_KEY = "lora_adapter_metadata"  # diffusers' own
_UP, _DOWN = ".lora_B.weight", ".lora_A.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What identifies the model that a LoRA was trained on.

    Attributes:
        name: as the user gave it; for people only.
        class_name: of the transformer in diffusers.
        config: the transformer's configuration, plain values.
        sample: some weights of the first adapted projection, evenly spaced; another model of the same
            architecture has others. Empty where they were not kept.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    sample: tuple[float, ...] = ()

    def differences(self, class_name: str, config: Mapping[str, Any]) -> list[str]:
        """What of another architecture is not as here."""
        if class_name != self.class_name:
            return [f"class {class_name} (trained on {self.class_name})"]
        names = sorted({*self.config, *config})
        return [
            f"{name}={config.get(name)!r} (trained on {self.config.get(name)!r})"
            for name in names
            if _plain(config.get(name)) != _plain(self.config.get(name))
        ]

    def likeness(self, sample: Sequence[float]) -> float:
        """Cosine between two samples of weights; 1 where one of them was not kept."""
        if len(sample) != len(self.sample):
            return 1.0 if not sample or not self.sample else 0.0
        norms = math.hypot(*sample) * math.hypot(*self.sample)
        return sum(a * b for a, b in zip(sample, self.sample, strict=True)) / norms if norms else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLoRA:
    """What a length LoRA was trained with.

    Attributes:
        method: "radial", under the mask of `radial`, or "dense".
        rank, lora_alpha: as in peft: the update of a weight is (lora_alpha / rank) B A.
        frames: fewest and most pixel frames of the clips that it was trained on.
        latent_frames: the same in the model's latent frames, which a mask counts.
        radial: the settings of `RadialConfig` that make the mask, none of them open, and `dense_fraction`,
            the part of a run whose noise levels it was trained on with dense attention (missing: no part).
            None for method "dense".
        base: the model below it.
        training: how it was made, for people.
    """

    method: str
    rank: int
    lora_alpha: float
    frames: tuple[int, int]
    latent_frames: tuple[int, int]
    radial: Mapping[str, Any] | None
    base: Base
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS or (self.method == "radial") != (self.radial is not None):
            raise ValueError(f"method={self.method!r} with radial={self.radial!r} is no way of training")
        if self.rank < 1 or not self.lora_alpha > 0:
            raise ValueError(f"rank={self.rank!r} and lora_alpha={self.lora_alpha!r} must be positive")
        for name in ("frames", "latent_frames"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}={getattr(self, name)!r} is no range of frames")
        if self.radial is not None:
            if {*self.radial} - {DENSE} != {*MASK_FIELDS} or None in self.radial.values():
                raise ValueError(f"radial={dict(self.radial)!r} does not settle {', '.join(MASK_FIELDS)}")
            RadialConfig(**self.radial)

    @property
    def mask(self) -> RadialConfig | None:
        """The settings that make its mask, and its dense part of a run; None for a dense LoRA."""
        return None if self.radial is None else RadialConfig(**self.radial)

    def summary(self) -> str:
        """One line for people."""
        low, high = self.frames
        span = f"{high} frames" if low == high else f"{low} to {high} frames"
        return f"{self.method} LoRA of rank {self.rank} for {span} on {self.base.name}"


def write(path: Path, tensors: Mapping[str, Any], lora: LengthLoRA) -> None:
    """Write a LoRA file; an interrupted run leaves the previous one, or nothing.

    Args:
        path: of the file, `.safetensors`.
        tensors: module path -> (A (r, in), B (out, r)), any float dtype; stored as float16.
        lora: what it was trained with.

    Raises:
        ValueError: a weight is not finite in float16.
    """
    import torch
    from safetensors.torch import save_file

    stored = {}
    for module, (down, up) in tensors.items():
        for end, value in ((_DOWN, down), (_UP, up)):
            half = value.detach().to("cpu", torch.float16).contiguous()
            if not bool(torch.isfinite(half).all()):
                raise ValueError(f"{module}{end} is not finite in float16; the training has diverged")
            stored[f"{PREFIX}{module}{end}"] = half
    adapter = {
        "r": lora.rank,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(tensors),
    }
    metadata = {
        "format": "pt",
        _ADAPTER_KEY: json.dumps({PREFIX + name: value for name, value in adapter.items()}),
        _KEY: json.dumps({"version": VERSION, **asdict(lora)}, allow_nan=False),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(stored, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> LengthLoRA:
    """What a LoRA file says of itself; its weights are not read.

    Raises:
        BadRequestError: there is no such file, it is no safetensors file, or no length LoRA of diffctrl.
    """
    metadata, keys = _header(path)
    if _KEY not in metadata:
        raise BadRequestError(
            f"{path} is no length LoRA: it does not say which mask and length it was trained with; load a "
            "LoRA of another kind with `pipe.load_lora_weights`"
        )
    try:
        lora = _parsed(json.loads(metadata[_KEY]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRequestError(f"{path} says nothing usable of its training: {error}") from None
    if not keys or not all(key.startswith(PREFIX) and key.endswith((_UP, _DOWN)) for key in keys):
        raise BadRequestError(f"{path} holds other tensors than those of a length LoRA")
    return lora


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by diffusers' names, diffusers' adapter metadata: rank, alpha, target modules).

    Raises:
        BadRequestError: rank or alpha are not those that `read` gives, or a module has one half only.
    """
    from safetensors.torch import load_file

    lora, (_, keys) = read(path), _header(path)
    halves: dict[str, set[str]] = {}
    for key in keys:
        end = _UP if key.endswith(_UP) else _DOWN
        halves.setdefault(key.removeprefix(PREFIX).removesuffix(end), set()).add(end)
    if lame := sorted(module for module, ends in halves.items() if len(ends) < 2):
        raise BadRequestError(f"{path} has one half only of {lame[0]}")
    weights = load_file(path)
    # Made here rather than taken over: alpha is applied once, as peft does, whatever else the file says.
    adapter = {"r": lora.rank, "lora_alpha": lora.lora_alpha, "target_modules": sorted(halves)}
    for key, value in weights.items():
        if value.ndim != 2 or value.shape[0 if key.endswith(_DOWN) else 1] != lora.rank:
            raise BadRequestError(f"{path}: {key} of shape {tuple(value.shape)} is not of rank {lora.rank}")
    return weights, {PREFIX + name: value for name, value in adapter.items()}


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadRequestError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), list(file.keys())
    except (SafetensorError, OSError):
        raise BadRequestError(f"{path} is not a safetensors file that can be read") from None


def _parsed(found: Any) -> LengthLoRA:
    if not isinstance(found, dict) or found.pop("version", None) != VERSION:
        raise ValueError(f"this diffctrl reads version {VERSION}")
    base = found.pop("base")
    for kind, table in ((Base, base), (LengthLoRA, {**found, "base": base})):
        names = {one.name for one in fields(kind)}
        if names != set(table):
            raise ValueError(f"entries {sorted(names ^ set(table))} are missing or unknown")
    frames, latent_frames = _range(found.pop("frames")), _range(found.pop("latent_frames"))
    if type(found["rank"]) is not int or not isinstance(found["lora_alpha"], (int, float)):
        raise TypeError(f"rank {found['rank']!r} and alpha {found['lora_alpha']!r} are not numbers")
    sample = tuple(float(value) for value in base.pop("sample"))
    return LengthLoRA(**found, frames=frames, latent_frames=latent_frames, base=Base(**base, sample=sample))


def _range(found: Any) -> tuple[int, int]:
    low, high = found
    if type(low) is not int or type(high) is not int:
        raise TypeError(f"{found!r} is no range of frames")
    return low, high


def _plain(value: Any) -> Any:
    """As JSON keeps it: tuples become lists."""
    return json.loads(json.dumps(value, default=str))
