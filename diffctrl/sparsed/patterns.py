"""What a run keeps of each layer: the pattern as block lists for kernels, and packed for files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.attention import BlockLists
from diffctrl.sparsed.layout import Layout

FORMAT = "diffctrl.sparsed.patterns/1"


@dataclass(slots=True, eq=False)
class Pattern:
    """The pattern of one layer.

    Attributes:
        lists: what kernels read; rows in the order of `Layout.first`.
        mass: float64 (B, H), share of the dense attention that the kept blocks hold; an estimate where the
            builder is one.
        builder: what computed the block scores.
    """

    lists: BlockLists
    mass: Tensor
    builder: str

    @property
    def packed_bytes(self) -> int:
        """Size of `lists.to_bits()`: one bit for each pair of blocks."""
        batch, heads, n = self.lists.counts.shape
        return batch * heads * n * -(-self.lists.n_k_blocks // 8)

    @property
    def list_bytes(self) -> int:
        """Size of the lists, int32, on each device that runs them."""
        return 4 * (self.lists.counts.numel() + self.lists.indices.numel())


def block_lists(counts: Tensor, indices: Tensor, layout: Layout) -> BlockLists:
    """counts int32 (B, H, n), indices int32 (B, H, n, W) -> lists cut at the real tokens of each row."""
    return BlockLists(
        (layout.block, layout.block),
        (layout.tokens, layout.tokens),
        counts,
        indices,
        n_valid=layout.valid.to(torch.int32) if layout.padded else None,
        allow_empty=layout.padded,
    )


def full_lists(layout: Layout) -> BlockLists:
    """Every real key for every query: dense attention of padded rows without an element mask."""
    size = (layout.block, layout.block)
    return BlockLists.full(
        size, (layout.tokens, layout.tokens), n_valid=layout.valid.to(torch.int32), allow_empty=True
    )


def save(path: str | Path, patterns: Mapping[int, Pattern], layout: Layout) -> None:
    """Write patterns as safetensors: uint8 bits (B, H, n, ceil(n / 8)) and mass for each layer, the layout as
    metadata.

    Raises:
        ValueError: there are none.
    """
    from safetensors.torch import save_file

    if not patterns:
        raise ValueError("there are no patterns to save yet; they exist after the last dense step of a run")
    tensors: dict[str, Tensor] = {}
    for layer, pattern in patterns.items():
        tensors[f"layers.{layer}.bits"] = pattern.lists.to_bits()
        tensors[f"layers.{layer}.mass"] = pattern.mass
    about = {
        "format": FORMAT,
        "layout": json.dumps(_described(layout)),
        "builders": json.dumps({str(layer): pattern.builder for layer, pattern in patterns.items()}),
    }
    save_file(tensors, str(path), metadata=about)


def load(path: str | Path) -> tuple[dict[int, Pattern], Layout]:
    """What `save` wrote.

    Raises:
        ValueError: the file is none of ours.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no file of patterns: its format is {about.get('format')!r}, "
                f"accepted is {FORMAT!r}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    layout = _layout(json.loads(about["layout"]))
    builders = json.loads(about["builders"])
    patterns = {}
    for layer, builder in builders.items():
        counted = BlockLists.from_bits(
            tensors[f"layers.{layer}.bits"],
            (layout.block, layout.block),
            (layout.tokens, layout.tokens),
            allow_empty=True,
        )
        lists = block_lists(counted.counts, counted.indices, layout)
        patterns[int(layer)] = Pattern(lists, tensors[f"layers.{layer}.mass"], str(builder))
    return patterns, layout


def _described(layout: Layout) -> dict[str, Any]:
    return {
        "prompts": layout.prompts.tolist(),
        "generation": layout.generation,
        "starts": layout.starts.tolist(),
        "block": layout.block,
        "tokens": layout.tokens,
    }


def _layout(about: Mapping[str, Any]) -> Layout:
    return Layout.of(
        torch.tensor(about["prompts"]),
        about["generation"],
        about["block"],
        torch.tensor(about["starts"]),
        about["tokens"],
    )
