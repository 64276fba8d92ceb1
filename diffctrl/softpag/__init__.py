"""SoftPAG: blend the attention of chosen heads toward another map, and steer away from the result.

Source: "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models",
arXiv 2506.10978 (NeurIPS 2025). Implemented from the paper, not from its code.
"""

from diffctrl.softpag.config import SoftPAGConfig
from diffctrl.softpag.guidance import guidance_delta, guide, perturbation_delta, rescaled
from diffctrl.softpag.heads import Head, parse_head, parse_heads
from diffctrl.softpag.output_form import perturb
from diffctrl.softpag.perturb import blend, blend_identity, blend_zero

__all__ = [
    "Head",
    "SoftPAGConfig",
    "blend",
    "blend_identity",
    "blend_zero",
    "guidance_delta",
    "guide",
    "parse_head",
    "parse_heads",
    "perturb",
    "perturbation_delta",
    "rescaled",
]
