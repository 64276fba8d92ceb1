"""What a picture is drawn with: versions of packages, threads, the device by name."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import diffctrl

_RECORDED = ("torch", "diffusers", "transformers")


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None. The package is not imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions that a recipe records."""
    found = {"diffctrl": diffctrl.__version__, "python": platform.python_version()}
    return found | {name: package_version(name) or "missing" for name in _RECORDED}


def hardware(device: Any) -> str:
    """The card's name, or the instruction set that torch uses on this CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
