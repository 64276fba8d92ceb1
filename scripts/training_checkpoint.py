"""Checkpoints of a training: tensors and facts in one file, replaced whole or not at all."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the folder's checkpoint; a crash leaves the previous one whole.

    The facts travel inside the file, so weights and step count can never disagree.
    """
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    partial = folder / "checkpoint.partial"
    save_file(on_host, partial, metadata={"facts": json.dumps(facts)})
    partial.rename(folder / _NAME)


def checkpoint_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the folder's checkpoint, None where there is none."""
    path = folder / _NAME
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["facts"])


@torch.no_grad()
def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the folder's checkpoint into existing tensors, which a captured step keeps using."""
    saved = load_file(folder / _NAME)
    if saved.keys() != tensors.keys():
        different = sorted(saved.keys() ^ tensors.keys())[:5]
        raise SystemExit(
            f"{folder / _NAME} holds other tensors than this run: {different}; use another --state"
        )
    for name, value in tensors.items():
        value.copy_(saved[name])
