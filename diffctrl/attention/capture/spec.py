"""`CaptureSpec`: what of the attention weights is kept, declared before the forward."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

Quantity = Literal["weights", "row_mass", "column_mass", "column_entropy"]
Tokens = Literal["image", "text"]
Reduce = Literal["mean", "sum", "each"]

_CHOICES = {
    "quantity": ("weights", "row_mass", "column_mass", "column_entropy"),
    "queries": ("image", "text"),
    "keys": ("image", "text"),
    "heads": ("mean", "sum", "each"),
    "blocks": ("mean", "sum", "each"),
    "steps": ("mean", "sum", "each"),
    "rows": ("cond", "uncond", "all"),
}
_SELECTIONS = ("queries", "frames", "keys", "heads", "blocks", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """One tensor that is made of attention weights A = softmax(scale * Q K^T) while a model runs.

    The softmax is over every key that the query attends, also where only some keys are kept: weights of all
    keys of a query add up to one.

    Args:
        quantity: "weights" A of query i and key j, (Q, K); "row_mass" the sum over the kept keys, (Q,);
            "column_mass" the mean over the kept queries, (K,); "column_entropy" how evenly a key's column
            lies on the kept queries, from 0 (one query) to 1 (all alike), (K,): with p = A_ij / sum_i A_ij it
            is -sum p log p / log Q, of the weights after their reduction over heads; 0 without any mass.
        queries, keys: "image" or "text" tokens. In models with separate cross-attention, text keys are read
            there and text queries do not exist. Queries of padding have no weights and are in no mean.
        only_queries, only_keys: indices inside the queries and the keys, in the order wanted; None for all.
        only_frames: latent frames of the image queries; None for all.
        only_heads, only_blocks, only_steps: 0-based indices; None for all. Blocks count over all joint stacks
            (FLUX: double blocks 0-18, then single blocks 19-56), or over the cross-attention layers.
        depth: (low, high) in place of only_blocks: blocks with low <= index / (count - 1) <= high.
        heads, blocks, steps: "mean", "sum", or "each" for an axis of its own. Column entropies are made for
            each block and step, then reduced. Steps are the forwards in which the rows were there.
        rows: batch rows: of the positive prompt ("cond"), the negative one ("uncond"), or "all". Perturbed
            twins are never among them.

    Raises:
        ValueError: a value is not accepted, or two of them do not go together.

    >>> CaptureSpec(only_keys=(3, 4), depth=(0.42, 0.95)).chosen_blocks(57)[:2]
    (24, 25)
    """

    quantity: Quantity = "weights"
    queries: Tokens = "image"
    keys: Tokens = "text"
    only_queries: tuple[int, ...] | None = None
    only_frames: tuple[int, ...] | None = None
    only_keys: tuple[int, ...] | None = None
    only_heads: tuple[int, ...] | None = None
    only_blocks: tuple[int, ...] | None = None
    only_steps: tuple[int, ...] | None = None
    depth: tuple[float, float] | None = None
    heads: Reduce = "mean"
    blocks: Reduce = "mean"
    steps: Reduce = "mean"
    rows: Literal["cond", "uncond", "all"] = "cond"

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name}={value!r} is not accepted; {name} is one of {', '.join(accepted)}.")
        for name in _SELECTIONS:
            self._check_selection(f"only_{name}")
        if self.only_frames is not None and (self.queries != "image" or self.only_queries is not None):
            raise ValueError(
                "only_frames chooses image queries by their frame; it does not go with queries='text' nor "
                "with only_queries."
            )
        if self.depth is not None:
            if self.only_blocks is not None:
                raise ValueError("depth and only_blocks both choose blocks; give one of them.")
            if len(self.depth) != 2 or not 0 <= self.depth[0] <= self.depth[1] <= 1:
                raise ValueError(f"depth={self.depth!r} is not accepted; it is (low, high) within [0, 1].")

    def _check_selection(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, (str, int)):
            raise ValueError(f"{name}={value!r} is not accepted; give several indices, e.g. {name}=(0, 3).")
        indices = tuple(int(index) for index in value)
        if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
            raise ValueError(
                f"{name}={value!r} is not accepted; it holds at least one index, from 0, each once."
            )
        object.__setattr__(self, name, indices)

    def chosen_blocks(self, count: int) -> tuple[int, ...]:
        """The blocks among `count` that are captured.

        Raises:
            ValueError: a block does not exist, or depth holds none.
        """
        if self.depth is not None:
            # A rounding error of the product must not drop a block that lies on the border.
            low, high = (share * (count - 1) for share in self.depth)
            blocks = tuple(range(ceil(low - 1e-9), floor(high + 1e-9) + 1))
            if not blocks:
                raise ValueError(f"depth={self.depth} holds none of {count} blocks; widen it.")
            return blocks
        return within("only_blocks", self.only_blocks, count)


def within(name: str, chosen: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """`chosen`, or all of `count`; ValueError where one of them does not exist."""
    if chosen is None:
        return tuple(range(count))
    if max(chosen) >= count:
        raise ValueError(f"{name} holds {max(chosen)}, but there are {count}: 0 to {count - 1}.")
    return chosen
