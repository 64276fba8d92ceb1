"""Attention processors, one per method. Each is a diffusers AttnProcessor and composes with the others."""

from diffctrl.processors.base import ControlAttnProcessor, NeutralAttnProcessor
from diffctrl.processors.softpag import SoftPAGAttnProcessor
from diffctrl.softpag import SoftPAGConfig

__all__ = ["ControlAttnProcessor", "NeutralAttnProcessor", "SoftPAGAttnProcessor", "SoftPAGConfig"]
