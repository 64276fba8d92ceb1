"""Attention over a sequence that devices share (Ulysses): all tokens of some heads instead of some tokens of
all.

A block list speaks of the whole sequence, so that it can only be read where the whole sequence is. Before
attention each device hands its tokens of the others' heads to them and gets the other tokens of its own
heads, after it the way back. Gradients take the same ways. What every device has a copy of (text, parameters)
gets a part of its gradient on each: their sum is the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .lists import BlockLists, DeviceLists, origin_of


@dataclass(frozen=True, slots=True)
class Shard:
    """What one device holds of a sequence.

    Attributes:
        start, stop: the device's tokens that are its share of the split part. Those before and after it
            (text) are on every device.
        total: tokens of the split part over all devices.
    """

    start: int
    stop: int
    total: int

    def replicates(self, length: int) -> bool:
        """Whether some of the `length` tokens of this device are on every device."""
        return self.stop - self.start < length


@dataclass(frozen=True, slots=True)
class Exchange:
    """The two ways of one attention call.

    Attributes:
        shard: of this device.
        sizes: tokens of the split part on each device.
        group, rank: of the devices.
    """

    shard: Shard
    sizes: tuple[int, ...]
    group: Any
    rank: int

    @classmethod
    def of(cls, parallel_config: Any, shard: Shard, query: Tensor, key: Tensor) -> Exchange:
        """Checks that this is possible.

        Args:
            parallel_config: what diffusers' `enable_parallelism` stored in a processor.
            shard: of this device.
            query, key: (B, S, H, D) and (B, S, Hkv, D) of this device.

        Raises:
            ValueError: ring attention, heads or tokens that do not divide.
        """
        config = parallel_config.context_parallel_config
        if config.ring_degree > 1:
            raise ValueError(
                f"ring_degree={config.ring_degree}: in ring attention a device never sees all keys of its "
                "queries at once, and each turn would need lists of its own; use ulysses_degree alone"
            )
        group = config._ulysses_mesh.get_group()
        devices, rank = dist.get_world_size(group), dist.get_rank(group)
        for name, heads in (("query", query.shape[2]), ("key", key.shape[2])):
            if heads % devices:
                raise ValueError(
                    f"{heads} {name} heads do not divide among {devices} devices: choose a ulysses_degree "
                    f"that divides {heads}"
                )
        # As diffusers splits: in equal parts, or (`ulysses_anything`) the first ones one token longer.
        sizes = tuple(shard.total // devices + (r < shard.total % devices) for r in range(devices))
        if sizes[rank] != shard.stop - shard.start:
            raise ValueError(
                f"device {rank} of {devices} has {shard.stop - shard.start} of {shard.total} tokens, but its "
                f"share is {sizes[rank]}: the sequence is not split as diffusers does it"
            )
        return cls(shard, sizes, group, rank)

    # --- tensors --------------------------------------------------------------------------------------------

    def gather(self, states: Tensor) -> Tensor:
        """(B, tokens of this device, H, D) -> (B, all tokens, H / devices, D)."""
        devices, own = len(self.sizes), self.sizes[self.rank]
        before, split, after = states.tensor_split((self.shard.start, self.shard.stop), dim=1)
        sent = split.unflatten(2, (devices, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        split = self._all_to_all(sent, [own] * devices, list(self.sizes)).transpose(0, 1)
        if not self.shard.replicates(states.shape[1]):
            return split
        heads = slice(self.rank * split.shape[2], (self.rank + 1) * split.shape[2])
        return torch.cat([before[:, :, heads], split, after[:, :, heads]], dim=1)

    def scatter(self, output: Tensor) -> Tensor:
        """(B, all tokens, H / devices, D) -> (B, tokens of this device, H, D)."""
        devices, start = len(self.sizes), self.shard.start
        before, split, after = output.tensor_split((start, start + self.shard.total), dim=1)
        everywhere = before.shape[1] + after.shape[1]
        parts = [part for share in split.split(self.sizes, dim=1) for part in (before, share, after)]
        sent = torch.cat(parts, dim=1).transpose(0, 1)
        given = [everywhere + size for size in self.sizes]
        taken = [given[self.rank]] * devices
        received = self._all_to_all(sent, given, taken)  # (devices * tokens, B, H / devices, D)
        return received.unflatten(0, (devices, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _all_to_all(self, sent: Tensor, given: list[int], taken: list[int]) -> Tensor:
        received: Tensor = _AllToAll.apply(sent, given, taken, self.group)
        return received

    # --- masks ----------------------------------------------------------------------------------------------

    def length(self, local: int) -> int:
        """Tokens of the whole sequence, of which this device has `local`."""
        return local - (self.shard.stop - self.shard.start) + self.shard.total

    def lists(self, mask: BlockLists | DeviceLists, length: int) -> BlockLists | DeviceLists:
        """The lists of this device's heads; `length` tokens attend themselves."""
        if mask.counts.shape[1] == 1:
            return mask
        if torch.compiler.is_compiling():
            raise ValueError(
                "Lists that differ from head to head do not run across devices inside compiled code: leave "
                "the attention blocks eager, or use one list for all heads."
            )
        whole = origin_of(mask, (length, length)) if isinstance(mask, DeviceLists) else mask
        heads = whole.heads // len(self.sizes)
        own = slice(self.rank * heads, (self.rank + 1) * heads)
        return whole.cached("cpu", f"heads {own.start} to {own.stop}", lambda: _of_heads(whole, own))

    def key_mask(self, mask: Tensor | None, local: int) -> Tensor | None:
        """A mask of keys, for this device's tokens or for all, as one for all; the split part is valid."""
        if mask is None or mask.shape[-1] == self.length(local):
            return mask
        if mask.shape[-1] != local or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            raise ValueError(
                f"attn_mask {tuple(mask.shape)} cannot be read across devices: pass a mask of keys, "
                f"(B, 1, 1, {local}) or (B, 1, 1, {self.length(local)})"
            )
        valid = mask.new_full((*mask.shape[:3], self.shard.total), mask.dtype == torch.bool)
        parts = mask[..., : self.shard.start], valid, mask[..., self.shard.stop :]
        return torch.cat(parts, dim=-1)


class _AllToAll(torch.autograd.Function):
    """torch's own collective has a backward in some versions only. A gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
        ctx.ways = given, taken, group
        return _exchanged(sent, given, taken, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        given, taken, group = ctx.ways
        return _exchanged(grads[0], taken, given, group), None, None, None


def _exchanged(sent: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
    """Of axis 0, `given[r]` rows to device r and `taken[r]` from it."""
    from torch.distributed import _functional_collectives as funcol  # compiled code takes these in

    return funcol.wait_tensor(funcol.all_to_all_single(sent.contiguous(), taken, given, group))


def _of_heads(lists: BlockLists, heads: slice) -> BlockLists:
    names = "counts", "indices", "partial_counts", "partial_indices"
    parts = {name: getattr(lists, name) for name in names}
    return replace(lists, **{name: None if part is None else part[:, heads] for name, part in parts.items()})
