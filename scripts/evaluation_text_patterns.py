"""Fixed patterns to compare SparseD with, and how much patterns have in common."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffctrl.attention import BlockLists
from diffctrl.families.text import TextModel
from diffctrl.processors import SparseDAttnProcessor
from diffctrl.sparsed import Kept, Layout, ModelShape, Pattern, SparseDConfig, SparseDController
from diffctrl.sparsed.layout import RowBlocks
from diffctrl.sparsed.patterns import block_lists
from diffctrl.sparsed.pooling import chunked_scores
from diffctrl.sparsed.selection import quota, retained_mass, stacked

Shape = Literal["window", "streaming"]


def fixed_blocks(shape: Shape, row: RowBlocks, config: SparseDConfig) -> Tensor:
    """The key blocks of each query block, bool (n, n), as many of them as SparseD keeps.

    "window" keeps the nearest blocks on both sides, "streaming" the first block (StreamingLLM's attention
    sink, arXiv 2309.17453) and the nearest.
    """
    if shape not in get_args(Shape):
        raise ValueError(f"shape={shape!r} is unknown; accepted: {', '.join(get_args(Shape))}")
    kept = quota(row.split, config) + quota(row.count - row.split, config)
    block = torch.arange(row.count)
    distance = (block[:, None] - block).abs()
    if shape == "streaming":
        distance[:, 0] = -1
    nearest = distance.argsort(dim=1, stable=True)[:, :kept]
    return torch.zeros(row.count, row.count, dtype=torch.bool).scatter(1, nearest, True)


class FixedPatternController(SparseDController):
    """SparseD's steps, rows and kernels with a pattern that does not look at the attention."""

    def __init__(
        self, fixed: Shape, config: SparseDConfig, shape: ModelShape, device: Callable[[], torch.device]
    ) -> None:
        super().__init__(config, shape, device)
        self.fixed: Shape = fixed

    def pattern(
        self, query: Tensor, key: Tensor, layout: Layout, scale: float, lse: Tensor | None
    ) -> Pattern:
        """The fixed pattern, and the share of the attention that it holds; arguments as of SparseD's."""
        heads, valid = query.shape[2], layout.valid.tolist()
        scores = chunked_scores(query, key, valid, valid, scale, layout.block, lse)
        kept, mass = [], []
        for own, row in zip(scores, layout.rows(), strict=True):
            blocks = fixed_blocks(self.fixed, row, self.config)
            width = int(blocks.sum(dim=1)[0])
            indices = blocks.nonzero()[:, 1].view(row.count, width).to(torch.int32).expand(heads, -1, -1)
            counts = torch.full((heads, row.count), width, dtype=torch.int32)
            found = Kept(counts.to(own.device), indices.to(own.device))
            mass.append(retained_mass(own, found))
            kept.append(found)
        counts, indices = stacked(kept, layout.blocks)
        return Pattern(block_lists(counts, indices, layout), torch.stack(mass).cpu(), self.fixed)


class FixedPatternAttnProcessor(SparseDAttnProcessor):
    """A sliding window or StreamingLLM's pattern with the density and the dense steps of a SparseD config.

    Args:
        shape: "window" or "streaming".
        config: of the SparseD to compare with; keywords change single fields.
    """

    def __init__(self, shape: Shape, config: SparseDConfig, **settings: Any) -> None:
        super().__init__(config, **settings)
        self.shape: Shape = shape

    def state(self, model: TextModel) -> SparseDController:
        sizes = ModelShape(
            len(model.sites), model.heads, model.kv_heads, model.head_dim, model.linear_weights
        )
        return FixedPatternController(self.shape, self.config, sizes, lambda: model.device)

    def describe(self) -> str:
        return f"{self.shape}({super().describe()})"


def overlap(first: BlockLists, second: BlockLists) -> float:
    """Blocks in both patterns over blocks in either one, mean over rows and heads; 1 where they are equal."""
    one, other = first.to_dense_blocks(), second.to_dense_blocks()
    both, either = (one & other).sum(dim=(-1, -2)), (one | other).sum(dim=(-1, -2))
    return float((both / either).mean())


def overlap_of_heads(lists: BlockLists) -> float:
    """Mean `overlap` of all pairs of different heads of one layer; 1 where all heads keep the same blocks.

    Two random patterns of density d have d / (2 - d) in common.
    """
    blocks = lists.to_dense_blocks().float().flatten(2)  # (B, H, n n)
    both = blocks @ blocks.mT
    size = blocks.sum(dim=2)
    either = size[:, :, None] + size[:, None] - both
    heads = blocks.shape[1]
    pairs = ~torch.eye(heads, dtype=torch.bool)
    return float((both / either)[:, pairs].mean())
