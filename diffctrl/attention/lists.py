"""`BlockLists`: for every head and query block, the key blocks that it attends. Never an S x S tensor.

Axis letters: B batch, H query heads, Sq/Sk query and key tokens, bq/bk block sizes, NQ = ceil(Sq / bq),
NK = ceil(Sk / bk), W width of an index list. Bm is 1 or B, Hm is 1 or H: a size of 1 is shared, never
expanded.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .accounting import areas, digest_of, has_empty_rows, is_full
from .rules import Rule

if TYPE_CHECKING:
    from .convert import FA4Lists

_LOCK = threading.RLock()
# Device tensor of counts -> weak reference to the BlockLists it came from. A compiled region sees
# tensors only; with this its kernels find plans and densities again, with no read from the device.
_ORIGINS = WeakIdKeyDictionary()


@dataclass(frozen=True, slots=True)
class DeviceLists:
    """The tensors of a `BlockLists` on one device: what compiled code passes around and what kernels read.

    counts int32 (Bm, Hm, NQ); indices int32 (Bm, Hm, NQ, W), ascending, entries past the count are 0;
    n_valid int32 (B,) or None; partial_counts, partial_indices like counts, indices or None, with the rule's
    kind and tensors; block (bq, bk).
    """

    counts: torch.Tensor
    indices: torch.Tensor
    n_valid: torch.Tensor | None
    partial_counts: torch.Tensor | None
    partial_indices: torch.Tensor | None
    rule_kind: str | None
    rule_tensors: tuple[torch.Tensor, ...]
    block: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class BlockLists:
    """Which key blocks each query block attends, as ascending compact lists. Immutable, made on the CPU.

    Args:
        block: (bq, bk), tokens of a query block and of a key block.
        lengths: (Sq, Sk), tokens; need not be multiples of the block, the last block is cut.
        counts: integer (Bm, Hm, NQ): entries used of each list.
        indices: integer (Bm, Hm, NQ, W): key blocks, strictly ascending in the first `count` entries; these
            blocks are attended in full. Kept as int32, cut to the width that is used.
        n_valid: integer (B,) or None: in batch row b only keys 0 .. n_valid[b] - 1 exist.
        partial_counts, partial_indices, rule: further lists of the same form, of blocks in which only the
            pairs that `rule` allows are attended. No block may be in both lists of a row.
        order: name of the row order (permutation) in which the lists are written, None for the model's own
            order.
        allow_empty: whether a query block may have no key block at all (its output is 0).

    >>> lists = BlockLists((2, 2), (4, 4), torch.tensor([[[1, 2]]]), torch.tensor([[[[0, 0], [0, 1]]]]))
    >>> lists.density()
    0.75
    """

    block: tuple[int, int]
    lengths: tuple[int, int]
    counts: torch.Tensor
    indices: torch.Tensor
    n_valid: torch.Tensor | None = None
    partial_counts: torch.Tensor | None = None
    partial_indices: torch.Tensor | None = None
    rule: Rule | None = None
    order: str | None = None
    allow_empty: bool = False
    host: DeviceLists = field(init=False, repr=False)
    _cache: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        from .validation import validated_fields

        for name, value in validated_fields(self).items():
            object.__setattr__(self, name, value)
        host = _device_lists(self, torch.device("cpu"))
        object.__setattr__(self, "host", host)
        _ORIGINS[host.counts] = weakref.ref(self)

    # --- shape and identity ---------------------------------------------------------------------------------

    @property
    def n_q_blocks(self) -> int:
        return -(-self.lengths[0] // self.block[0])

    @property
    def n_k_blocks(self) -> int:
        return -(-self.lengths[1] // self.block[1])

    @property
    def batch(self) -> int:
        """B if the lists or n_valid name one, else 1 (fits any batch)."""
        return self.counts.shape[0] if self.n_valid is None else max(self.counts.shape[0], len(self.n_valid))

    @property
    def heads(self) -> int:
        """H if the lists differ per head, else 1 (fits any number of heads)."""
        return self.counts.shape[1]

    @property
    def digest(self) -> str:
        """Hash of the contents: equal masks have equal digests, in any process."""
        return self._cached_value("digest", lambda: digest_of(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLists) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def is_full(self) -> bool:
        """True if every query attends every key, so that a dense kernel computes exactly this."""
        return self._cached_value("is_full", lambda: is_full(self))

    @property
    def has_empty_rows(self) -> bool:
        """True if some query may end up without any key."""
        return self._cached_value("has_empty_rows", lambda: has_empty_rows(self))

    def density(self) -> float:
        """Attended share of the real (query, key) pairs: tails and n_valid weighted, partial blocks whole."""
        return self._cached_value("density", lambda: areas(self)[0])

    def kernel_density(self) -> float:
        """Listed blocks over all blocks, each counted as full: what a kernel that rounds up computes."""
        return self._cached_value("kernel_density", lambda: areas(self)[1])

    # --- construction and conversion ------------------------------------------------------------------------

    @classmethod
    def from_dense_blocks(
        cls, blocks: torch.Tensor, block: tuple[int, int], lengths: tuple[int, int], **fields: Any
    ) -> BlockLists:
        """From bool (Bm, Hm, NQ, NK), one entry per block; `fields` are further constructor arguments."""
        from .compose import from_dense_blocks

        return from_dense_blocks(blocks, block, lengths, **fields)

    @classmethod
    def full(cls, block: tuple[int, int], lengths: tuple[int, int], **fields: Any) -> BlockLists:
        """Every block, shared by all heads and batch rows."""
        nq, nk = (-(-length // size) for length, size in zip(lengths, block, strict=True))
        return cls.from_dense_blocks(torch.ones(1, 1, nq, nk, dtype=torch.bool), block, lengths, **fields)

    @classmethod
    def from_bits(
        cls, bits: torch.Tensor, block: tuple[int, int], lengths: tuple[int, int], **fields: Any
    ) -> BlockLists:
        """From uint8 (Bm, Hm, NQ, ceil(NK / 8)), least significant bit first."""
        from .compose import from_bits

        return from_bits(bits, block, lengths, **fields)

    def to_bits(self) -> torch.Tensor:
        """The full blocks as uint8 (Bm, Hm, NQ, ceil(NK / 8)), least significant bit first."""
        from .compose import to_bits

        return to_bits(self.counts, self.indices, self.n_k_blocks)

    def to_dense_blocks(self) -> torch.Tensor:
        """All listed blocks, full and partial, as bool (Bm, Hm, NQ, NK)."""
        from .compose import to_dense_blocks

        return to_dense_blocks(self)

    def to_dense_bool(self) -> torch.Tensor:
        """The element mask, bool (B or Bm, Hm, Sq, Sk). S x S: for references and tests only."""
        from .compose import to_dense_bool

        return to_dense_bool(self)

    def __and__(self, other: BlockLists) -> BlockLists:
        """Pairs that both masks attend."""
        from .compose import intersect

        # Kept: processors combine the same masks in every layer and step.
        return self._cached_value(("and", other.digest), lambda: intersect(self, other))

    def __or__(self, other: BlockLists) -> BlockLists:
        """Pairs that at least one of the masks attends."""
        from .compose import unite

        return self._cached_value(("or", other.digest), lambda: unite(self, other))

    def force(self, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> BlockLists:
        """The mask plus every block that touches a query token in `rows` or a key token in `cols`.

        rows, cols: token ranges (start, stop). The forced blocks count in `density()` as any other.
        """
        from .compose import force

        return force(self, rows, cols)

    def transpose(self) -> BlockLists:
        """For each key block the query blocks that attend it (block and lengths swapped)."""
        from .convert import transpose

        return transpose(self)

    def clipped(self) -> BlockLists:
        """The same mask, listing in no batch row a block past its n_valid."""
        from .convert import clipped

        return clipped(self)

    def to_flex(self, device: torch.device | str = "cpu", *, backward: bool = True) -> Any:
        """A FlexAttention `BlockMask` with a non-trivial `mask_mod`; `backward` adds the transposed lists.

        For a compiled `flex_attention`: an eager one ignores the lists and attends all.
        """
        from .convert import to_flex

        return to_flex(self, torch.device(device), backward=backward)

    def to_fa4(self, arch: int, head_dim: int, *, allow_merge: bool = False) -> FA4Lists:
        """Plain CPU tensors in the block size that flash-attn-4 takes on this arch; see `FA4Lists`."""
        from .convert import to_fa4

        return to_fa4(self, arch, head_dim, allow_merge=allow_merge)

    # --- device tensors -------------------------------------------------------------------------------------

    def on(self, device: torch.device | str) -> DeviceLists:
        """The tensors on `device`, copied once and kept as long as this object (or until `free`)."""
        device = normalised(torch.device(device))
        if device.type == "cpu":
            return self.host
        return self.cached(device, "lists", lambda: _remembered(self, _device_lists(self, device)))

    def cached(self, device: torch.device | str, consumer: str, make: Callable[[], Any]) -> Any:
        """What `consumer` (a kernel and whatever tells its forms apart) derived for `device`."""
        device = normalised(torch.device(device))
        return self._cached_value((device.type, device.index, consumer), make)

    def ready(self, device: torch.device) -> DeviceLists | None:
        """What `on` gave for this device, else None. For compiled code, which makes nothing."""
        return self.host if device.type == "cpu" else self._cache.get((device.type, device.index, "lists"))

    def pin(self, device: torch.device | str) -> BlockLists:
        """Copies the tensors now, for instance before a CUDA graph is captured; returns self."""
        self.on(device)
        return self

    def free(self) -> None:
        """Drops everything derived from the lists on any device; it is made again when it is needed."""
        with _LOCK:
            self._cache.clear()

    def _cached_value(self, key: Any, make: Callable[[], Any]) -> Any:
        value = self._cache.get(key)
        if value is None:
            with _LOCK:
                value = self._cache.get(key)
                if value is None:
                    value = self._cache[key] = make()
        return value


def normalised(device: torch.device) -> torch.device:
    """`cuda` without an index is the current device: two spellings must not make two copies."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def origin_of(lists: DeviceLists, lengths: tuple[int, int]) -> BlockLists:
    """The `BlockLists` these tensors came from; rebuilt from them (a copy to the host) if it is gone."""
    with _LOCK:
        known = _ORIGINS.get(lists.counts)
        origin = known() if isinstance(known, weakref.ref) else known
        if origin is not None and origin.lengths == lengths and _same_parts(origin, lists):
            return origin
        origin = _rebuilt(lists, lengths)
        # Nobody else holds the rebuilt object: keep it as long as the device tensor lives.
        _ORIGINS[lists.counts] = origin
        return origin


def _same_parts(origin: BlockLists, lists: DeviceLists) -> bool:
    known = origin.on(lists.counts.device)
    return known.indices is lists.indices or (
        known.indices.data_ptr() == lists.indices.data_ptr() and known.indices.shape == lists.indices.shape
    )


def _rebuilt(lists: DeviceLists, lengths: tuple[int, int]) -> BlockLists:
    rule = Rule(lists.rule_kind, tuple(t.cpu() for t in lists.rule_tensors)) if lists.rule_kind else None
    return BlockLists(
        lists.block, lengths, lists.counts, lists.indices, lists.n_valid,
        lists.partial_counts, lists.partial_indices, rule, allow_empty=True,
    )  # fmt: skip


def _remembered(lists: BlockLists, on_device: DeviceLists) -> DeviceLists:
    _ORIGINS[on_device.counts] = weakref.ref(lists)
    return on_device


def _device_lists(lists: BlockLists, device: torch.device) -> DeviceLists:
    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return DeviceLists(
        counts=_any_size(lists.counts.to(device), (2,)),
        indices=_any_size(lists.indices.to(device), (2, 3)),
        n_valid=move(lists.n_valid),
        partial_counts=_any_size(move(lists.partial_counts), (2,)),
        partial_indices=_any_size(move(lists.partial_indices), (2, 3)),
        rule_kind=None if lists.rule is None else lists.rule.kind,
        rule_tensors=() if lists.rule is None else tuple(t.to(device) for t in lists.rule.tensors),
        block=lists.block,
    )


@overload
def _any_size(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor: ...


@overload
def _any_size(tensor: None, dims: tuple[int, ...]) -> None: ...


def _any_size(tensor: torch.Tensor | None, dims: tuple[int, ...]) -> torch.Tensor | None:
    """Tells dynamo that NQ and W change from mask to mask, so that they never cost a graph of their own.

    Where dynamo is not imported nothing is compiled yet: then a later mask tells it, one graph later.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if tensor is not None and dynamo is not None and hasattr(dynamo, "maybe_mark_dynamic"):
        dynamo.maybe_mark_dynamic(tensor, dims)
    return tensor
