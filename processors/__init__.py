"""Attention processors, one per method. Each is a diffusers AttnProcessor and composes with the others."""

from diffctrl.processors.base import ControlAttnProcessor, NeutralAttnProcessor
from diffctrl.processors.capture import CaptureAttnProcessor
from diffctrl.processors.softpag import SoftPAGAttnProcessor
from diffctrl.softpag import SoftPAGConfig

__all__ = [
    "CaptureAttnProcessor",
    "ControlAttnProcessor",
    "NeutralAttnProcessor",
    "SoftPAGAttnProcessor",
    "SoftPAGConfig",
]
