"""SoftPAG: blend the attention of chosen heads toward the identity, and steer away from the result.

Source: "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models",
arXiv 2506.10978 (NeurIPS 2025). Implemented from the paper, not from its code.
"""

from diffctrl.softpag.config import SoftPAGConfig
from diffctrl.softpag.guidance import guide, perturbation_delta
from diffctrl.softpag.heads import Head, parse_head, parse_heads
from diffctrl.softpag.perturb import blend_identity

__all__ = [
    "Head",
    "SoftPAGConfig",
    "blend_identity",
    "guide",
    "parse_head",
    "parse_heads",
    "perturbation_delta",
]
