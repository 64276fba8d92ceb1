"""Attention control for diffusion models: sparse, quantised, guided, grounded, on one composing engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffctrl import _checkout

_checkout.install()

if TYPE_CHECKING:
    from diffctrl.control import ControlHandle, apply, attach, set_attn_processor, summary

__all__ = ["ControlHandle", "apply", "attach", "set_attn_processor", "summary"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import; `import diffctrl` does not wait for it.
    if name in __all__:
        from diffctrl import control

        return getattr(control, name)
    raise AttributeError(f"module 'diffctrl' has no attribute {name!r}")
