"""Radial Attention: what lies far away in time is attended in ever thinner bands, the same in every head.

Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv 2506.19852 (NeurIPS 2025), and the measurements of the published code, from which nothing is copied.
"""

from diffctrl.radial.blocks import block_grid
from diffctrl.radial.config import DenseParts, Pattern, RadialConfig
from diffctrl.radial.layout import Layout
from diffctrl.radial.lists import block_lists, density
from diffctrl.radial.pattern import half_widths
from diffctrl.radial.plot import plot
from diffctrl.radial.presets import Preset, preset
from diffctrl.radial.speed import Prediction, predict

__all__ = [
    "DenseParts",
    "Layout",
    "Pattern",
    "Prediction",
    "Preset",
    "RadialConfig",
    "block_grid",
    "block_lists",
    "density",
    "half_widths",
    "plot",
    "predict",
    "preset",
]
