"""Checkpoints of a training: a file each, written whole or not at all, of which the last few are kept."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffctrl.errors import BadRequestError
from diffctrl.lengthening.encoded import differing

logger = logging.getLogger("diffctrl.length")
_FACTS = "facts"


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: made when the first is saved.
        identity: what a training must share to go on from one.
        keep: how many are left; older ones are deleted.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._identity = json.loads(json.dumps(identity))

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint after `step` steps. A run that is killed here leaves the earlier ones whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.safetensors"
        unfinished = self.folder / f".{path.name}.part"
        on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        facts = {"step": step, "identity": self._identity}
        try:
            save_file(on_host, unfinished, metadata={_FACTS: json.dumps(facts)})
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())  # the name must not outlive a power cut without its contents
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        for old in self._paths()[: -self.keep]:
            old.unlink(missing_ok=True)

    def last(self) -> tuple[int, Path | None]:
        """(step, file) of the newest checkpoint that can be read; (0, None) where there is none.

        Raises:
            BadRequestError: it is of a training with other options.
        """
        for path in reversed(self._paths()):
            try:
                with safe_open(path, framework="pt") as file:
                    facts = json.loads((file.metadata() or {})[_FACTS])
                    step, identity = int(facts["step"]), facts["identity"]
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                logger.warning("%s cannot be read; going on from the one before it", path)
                continue
            if identity != self._identity:
                raise BadRequestError(
                    f"the training in {self.folder.parent} has {differing(identity, self._identity)}; go on "
                    "with the same options, or give another --out"
                )
            return step, path
        return 0, None

    @torch.no_grad()
    def load_last(self, tensors: dict[str, Tensor]) -> int:
        """Copy the newest checkpoint into existing tensors; returns its step, 0 where there is none.

        Raises:
            BadRequestError: as `last`.
        """
        step, path = self.last()
        if path is not None:
            saved = load_file(path)
            for name, value in tensors.items():
                value.copy_(saved[name])
        return step

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
