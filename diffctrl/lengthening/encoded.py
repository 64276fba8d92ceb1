"""Clips as the transformer is trained on them: latents and embeddings, made once and kept in a folder.

Autoencoder and text encoders are not needed afterwards, and a training that goes on finds its clips encoded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffctrl.errors import BadRequestError

if TYPE_CHECKING:
    from diffctrl.lengthening.plan import TrainPlan
    from diffctrl.pipelines.length_models import VelocityModel

_IDENTITY, _EMPTY = "identity.json", "empty.safetensors"
_LATENTS = "latents"


class EncodedClips:
    """The clips of a plan, read from the folder by number; nothing is kept in memory.

    Args:
        plan: of the training.

    Raises:
        BadRequestError: the folder holds clips that were encoded for another plan.
    """

    def __init__(self, plan: TrainPlan) -> None:
        self._clips, self.folder = plan.clips, plan.out / "encoded"
        self._empty: dict[str, Tensor] | None = None
        _claim(self.folder / _IDENTITY, plan.encoding(), "the clips in")

    def __len__(self) -> int:
        return len(self._clips)

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Blocks that this process has to encode, each of `world` processes its share."""
        return [block for block in range(rank, self._clips.blocks, world) if not self._path(block).is_file()]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to encode."""
        return not self.missing() and (self.folder / _EMPTY).is_file()

    @torch.no_grad()
    def encode(
        self,
        model: VelocityModel,
        blocks: Sequence[int],
        device: torch.device,
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode blocks, with the model's encoders on the device."""
        _write(self.folder / _EMPTY, model.embeddings([""], device))
        for block in blocks:
            pixels = self._clips.pixels(block, device)
            latents = model.latents(pixels * 2 - 1).half()
            if not bool(torch.isfinite(latents).all()):
                raise BadRequestError(
                    f"the autoencoder gives no finite latents of clip {self._clips.members(block)[0]}; its "
                    "weights are broken, or --dtype does not suit it"
                )
            text = model.embeddings(self._clips.captions(block), device)
            _write(self._path(block), {_LATENTS: latents, **text})
            on_block()

    def batch(self, numbers: Sequence[int], empty: Sequence[bool]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and embeddings on the CPU.

        Args:
            numbers: of the clips.
            empty: for each, whether its caption is left out.

        Returns:
            (B, C, F, h, w) float16, and the arguments of the transformer by name, first axis B.
        """
        if self._empty is None:
            with safe_open(self.folder / _EMPTY, framework="pt") as file:
                self._empty = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rows: list[dict[str, Tensor]] = []
        for number, left_out in zip(numbers, empty, strict=True):
            block, place = divmod(number, self._clips.per_block)
            with safe_open(self._path(block), framework="pt") as file:
                row = {name: file.get_slice(name)[place : place + 1] for name in file.keys()}  # noqa: SIM118
            rows.append(row | self._empty if left_out else row)
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return joined.pop(_LATENTS), joined

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.safetensors"


def _claim(path: Path, identity: dict[str, Any], what: str) -> None:
    """Note in a folder what it holds, or check that it holds that.

    Raises:
        BadRequestError: it holds something else.
    """
    wanted = json.loads(json.dumps(identity))
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        if found != wanted:
            raise BadRequestError(
                f"{what} {path.parent} were made with {differing(found, wanted)}; go on with the same "
                "options, or give another --out"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    unfinished.write_text(json.dumps(wanted), encoding="utf-8")
    os.replace(unfinished, path)


def differing(found: Any, wanted: dict[str, Any]) -> str:
    """What another plan had otherwise, in words."""
    if not isinstance(found, dict):
        return "another version of diffctrl"
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return ", ".join(
        f"{name} {_short(found.get(name))} (not {_short(wanted.get(name))})" for name in names[:3]
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, unfinished)
        os.replace(unfinished, path)
    except SafetensorError as error:  # no space left
        raise BadRequestError(f"{path} cannot be written ({error})") from None
    finally:
        unfinished.unlink(missing_ok=True)
