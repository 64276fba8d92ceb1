"""Whether Triton can run here, for every kernel that is written in it. Imports triton on first use alone."""

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


@functools.cache
def with_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """TRITON_INTERPRET=1: the device code runs on a CPU, slowly; for tests."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def arch_of(device: torch.device) -> int:
    """Compute capability times ten; 90 for the interpreter, on a CPU."""
    return _arch(device.index or 0) if device.type == "cuda" else 90


@functools.cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def power_of_two_divisor(number: int, limit: int) -> int:
    """The largest power of two that divides `number`, at most `limit`, itself a power of two."""
    return min(number & -number, limit)
