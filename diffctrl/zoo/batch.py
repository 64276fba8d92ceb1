"""Batches of generated scenes and clips: dataclasses whose tensors have the sample as their first axis."""

from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class TensorBatch:
    """Base of frozen dataclasses with the fields `count`, (B,) int64, and `shape`, (B, N) int64."""

    __slots__ = ()

    count: Tensor
    shape: Tensor

    def __len__(self) -> int:
        return self.count.shape[0]

    @property
    def device(self) -> torch.device:
        return self.count.device

    @property
    def present(self) -> Tensor:
        """(B, N) bool: which object places are drawn."""
        return torch.arange(self.shape.shape[1], device=self.device) < self.count[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field name."""
        own: Any = self
        values = {field.name: getattr(self, field.name) for field in fields(own)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> Self:
        """The same samples on another device."""
        return self._with({name: value.to(device) for name, value in self.tensors().items()})

    def select(self, indices: Tensor | list[int] | slice) -> Self:
        """The samples at `indices`: an int64 or bool tensor on the batch's device, a list, or a slice."""
        return self._with({name: value[indices] for name, value in self.tensors().items()})

    def _with(self, tensors: dict[str, Tensor]) -> Self:
        own: Any = self
        return replace(own, **tensors)


def joined(parts: list[Any]) -> dict[str, Tensor]:
    """The tensors of several batches, in their order."""
    return {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
