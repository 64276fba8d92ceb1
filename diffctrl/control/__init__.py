"""Attach to a model, publish its context, install controls and take them off."""

from diffctrl.control.context import Context, Rows
from diffctrl.control.control import Contributions, Control, Guidance, Published
from diffctrl.control.install import (
    ControlHandle,
    apply,
    attach,
    context_parallel_plan,
    set_attn_processor,
    summary,
)

__all__ = [
    "Context",
    "Contributions",
    "Control",
    "ControlHandle",
    "Guidance",
    "Published",
    "Rows",
    "apply",
    "attach",
    "context_parallel_plan",
    "set_attn_processor",
    "summary",
]
