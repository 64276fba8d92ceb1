"""SparseD: head-specific block-sparse attention for diffusion language models.

Source: "SparseD: Sparse Attention for Diffusion Language Models", arXiv 2509.24014 (ICLR 2026). Implemented
from the paper; what the authors' code does differently is mode="authors".
"""

from diffctrl.sparsed.builder import Builder
from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.controller import SparseDController
from diffctrl.sparsed.cost import ModelShape, Prediction, predict
from diffctrl.sparsed.layout import Layout, RowBlocks
from diffctrl.sparsed.patterns import Pattern
from diffctrl.sparsed.schedule import Phase, Schedule
from diffctrl.sparsed.selection import Kept, select

__all__ = [
    "Builder",
    "Kept",
    "Layout",
    "ModelShape",
    "Pattern",
    "Phase",
    "Prediction",
    "RowBlocks",
    "Schedule",
    "SparseDConfig",
    "SparseDController",
    "predict",
    "select",
]
