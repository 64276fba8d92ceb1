"""Some of the tokens of a sequence: a range of them, or an index."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """`count` tokens from `start` on, or those that `index` names.

    Attributes:
        start, count: the range; start is not read where there is an index.
        index: (count,) positions, or (B, count) where they differ from row to row; None for a range.
    """

    start: int
    count: int
    index: torch.Tensor | None = None

    @classmethod
    def at(cls, index: torch.Tensor) -> Tokens:
        return cls(0, index.shape[-1], index)

    def part(self, start: int, stop: int) -> Tokens:
        """Those from `start` to `stop` among them."""
        stop = min(stop, self.count)
        if self.index is None:
            return Tokens(self.start + start, stop - start)
        return Tokens.at(self.index[..., start:stop])

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tokens of a tensor whose axis 0 is the batch (or 1) and whose axis `dim` is the sequence."""
        if self.index is None:
            return tensor.narrow(dim, self.start, self.count)
        if self.index.ndim == 1:
            return tensor.index_select(dim, self.index)
        shape = [1] * tensor.ndim
        shape[0], shape[dim] = self.index.shape
        sizes = list(tensor.shape)
        sizes[0], sizes[dim] = self.index.shape
        tensor = tensor.expand(sizes[0], *tensor.shape[1:])
        return tensor.gather(dim, self.index.view(shape).expand(sizes))

    def positions(self, device: torch.device) -> torch.Tensor:
        """(1 or B, count) positions in the sequence."""
        if self.index is None:
            return torch.arange(self.start, self.start + self.count, device=device)[None]
        return self.index if self.index.ndim == 2 else self.index[None]
