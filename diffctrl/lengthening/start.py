"""A training that begins with the weights of an earlier LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffctrl.errors import BadRequestError
from diffctrl.length import LengthLoRA, read, read_weights
from diffctrl.length.file import PREFIX
from diffctrl.pipelines.length import check_base, find, unlike


@dataclass(frozen=True, slots=True)
class Start:
    """The LoRA to begin with, of the same layers, rank and alpha; attention, length and optimizer are new.

    Attributes:
        path: of its file.
        lora: what it was trained with.
        digest: of the file: a killed training goes on from the same one only.
    """

    path: Path
    lora: LengthLoRA
    digest: str

    @classmethod
    def of(
        cls, source: str, model: nn.Module, targets: Sequence[str], *, rank: int, lora_alpha: float
    ) -> Start:
        """Read it.

        Args:
            source: name of an embedded LoRA, a file, or the folder of a training.
            model: the transformer, weights not needed.
            targets: layers that are trained.

        Raises:
            BadRequestError: there is no such LoRA, or it does not fit.
        """
        path = find(source)
        lora = read(path)
        config: Any = model.config
        check_base(lora, type(model).__name__, dict(config), path)
        if (lora.rank, lora.lora_alpha) != (rank, lora_alpha):
            raise BadRequestError(
                f"--start-from {source} has rank {lora.rank} and alpha {lora.lora_alpha:g}; give --rank "
                f"{lora.rank} --lora-alpha {lora.lora_alpha:g}"
            )
        layers = set(read_weights(path)[1][f"{PREFIX}target_modules"])
        if layers != set(targets):
            raise BadRequestError(
                f"--start-from {source} adapts {len(layers)} layers, and {len(targets)} are to be trained; "
                "--added, --no-added and --cross choose them"
            )
        return cls(path, lora, hashlib.sha256(path.read_bytes()).hexdigest()[:16])

    @torch.no_grad()
    def load(self, model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Copy its weights.

        Args:
            model: the transformer.
            weights: path of each adapted layer -> (A, B).

        Raises:
            BadRequestError: it was trained on other weights than the model's.
        """
        if (complaint := unlike(self.lora, model, self.path)) is not None:
            raise BadRequestError(f"--start-from: {complaint}")
        saved, _ = read_weights(self.path)
        for layer, halves in weights.items():
            for half, name in zip(halves, ("lora_A", "lora_B"), strict=True):
                half.copy_(saved[f"{PREFIX}{layer}.{name}.weight"])

    def described(self) -> dict[str, Any]:
        """What the file of the new LoRA says of it."""
        earlier = self.lora.training
        steps = earlier.get("steps", 0) + earlier.get("earlier_steps", 0)
        return {"started_from": self.lora.summary(), "earlier_steps": steps}
