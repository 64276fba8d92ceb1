"""Attention processors, one per method. Each is a diffusers AttnProcessor and composes with the others."""

from diffctrl.processors.base import ControlAttnProcessor, NeutralAttnProcessor
from diffctrl.processors.capture import CaptureAttnProcessor
from diffctrl.processors.radial import RadialAttnProcessor
from diffctrl.processors.refam import RefAMAttnProcessor
from diffctrl.processors.softpag import SoftPAGAttnProcessor
from diffctrl.processors.sparsed import SparseDAttnProcessor
from diffctrl.radial import RadialConfig
from diffctrl.refam import RefAMConfig
from diffctrl.softpag import SoftPAGConfig
from diffctrl.sparsed import SparseDConfig

__all__ = [
    "CaptureAttnProcessor",
    "ControlAttnProcessor",
    "NeutralAttnProcessor",
    "RadialAttnProcessor",
    "RadialConfig",
    "RefAMAttnProcessor",
    "RefAMConfig",
    "SoftPAGAttnProcessor",
    "SoftPAGConfig",
    "SparseDAttnProcessor",
    "SparseDConfig",
]
