"""Attention control for diffusion models: sparse, guided, grounded, on one composing engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffctrl import _checkout

_checkout.install()

if TYPE_CHECKING:
    from diffctrl.attention.capture import CaptureSpec
    from diffctrl.control import ControlHandle, apply, attach, set_attn_processor, summary
    from diffctrl.processors.capture import capture

# Where each public name lives.
_PLACES = {
    "CaptureSpec": "diffctrl.attention.capture",
    "ControlHandle": "diffctrl.control",
    "apply": "diffctrl.control",
    "attach": "diffctrl.control",
    "capture": "diffctrl.processors.capture",
    "set_attn_processor": "diffctrl.control",
    "summary": "diffctrl.control",
}

__all__ = ["CaptureSpec", "ControlHandle", "apply", "attach", "capture", "set_attn_processor", "summary"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import; `import diffctrl` does not wait for it.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'diffctrl' has no attribute {name!r}")
