"""Models by name: those inside the package, else folders and hub repositories."""

from __future__ import annotations

import os
from dataclasses import replace

from diffctrl.dlm.checkpoints import Checkpoint
from diffctrl.errors import BadRequestError
from diffctrl.zoo import registry


def is_embedded(name: str) -> bool:
    """Whether this is the name of a model inside the package."""
    return name in registry.EMBEDDED


def open_checkpoint(name: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """An embedded model by its name, else a folder or a hub repository.

    Raises:
        BadRequestError: there is no such model, or it is not one of text.
    """
    name = os.fspath(name)
    if not is_embedded(name):
        return Checkpoint.open(name, revision=revision)
    model = registry.EMBEDDED[name]
    if model.kind != "text":
        raise BadRequestError(f"{name} is a model of kind {model.kind!r}, not of text")
    try:
        return replace(Checkpoint.open(registry.path(name)), name=name)
    except FileNotFoundError as error:
        raise BadRequestError(str(error)) from None
