"""Masks as packed bits: construction, AND, OR, forced bands. One bit per block, never per token pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .lists import BlockLists
from .rules import Rule


def to_bits(counts: torch.Tensor, indices: torch.Tensor, nk: int) -> torch.Tensor:
    """Lists (Bm, Hm, NQ[, W]) -> uint8 (Bm, Hm, NQ, ceil(NK / 8)), least significant bit first."""
    used = (torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    bits = torch.zeros(*counts.shape, -(-nk // 8), dtype=torch.uint8)
    index = indices.long()
    # Blocks of a list are distinct, so adding their bits sets them; an unused entry adds 0.
    return bits.scatter_add_(-1, index // 8, weights[index % 8] * used)


def lists_from_bits(bits: torch.Tensor, nk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (Bm, Hm, NQ, ceil(NK / 8)) -> counts (Bm, Hm, NQ), indices (Bm, Hm, NQ, W), ascending."""
    heads = bits.flatten(0, 1)
    unpacked = [unpack_bits(head, nk) for head in heads]  # one head at a time: NQ x NK bytes at most
    counts = torch.stack([head.sum(-1, dtype=torch.int32) for head in unpacked])
    indices = torch.zeros(*counts.shape, max(int(counts.max()), 1), dtype=torch.int32)
    for h, head in enumerate(unpacked):
        q, k = head.nonzero(as_tuple=True)  # row-major, hence ascending within a row
        starts = counts[h].cumsum(0) - counts[h]
        indices[h, q, torch.arange(len(q)) - starts[q]] = k.to(torch.int32)
    return counts.view(bits.shape[:3]), indices.view(*bits.shape[:3], -1)


def unpack_bits(bits: torch.Tensor, nk: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=nk, bitorder="little")).bool()


def from_bits(
    bits: torch.Tensor, block: tuple[int, int], lengths: tuple[int, int], **fields: Any
) -> BlockLists:
    nk = -(-lengths[1] // block[1])
    if bits.dtype != torch.uint8 or bits.ndim != 4 or bits.shape[-1] != -(-nk // 8):
        raise ValueError(
            f"bits must be uint8 (Bm, Hm, NQ, {-(-nk // 8)}) for {nk} key blocks; "
            f"{bits.dtype} {tuple(bits.shape)} was given."
        )
    counts, indices = lists_from_bits(bits.cpu().contiguous(), nk)
    return BlockLists(block, lengths, counts, indices, **fields)


def from_dense_blocks(
    blocks: torch.Tensor, block: tuple[int, int], lengths: tuple[int, int], **fields: Any
) -> BlockLists:
    nq, nk = (-(-length // size) for length, size in zip(lengths, block, strict=True))
    if blocks.dtype != torch.bool or blocks.ndim != 4 or blocks.shape[2:] != (nq, nk):
        raise ValueError(
            f"blocks must be bool (Bm, Hm, {nq}, {nk}) for lengths {lengths} in blocks of {block}; "
            f"{blocks.dtype} {tuple(blocks.shape)} was given."
        )
    packed = np.packbits(blocks.cpu().contiguous().numpy(), axis=-1, bitorder="little")
    counts, indices = lists_from_bits(torch.from_numpy(packed), nk)
    return BlockLists(block, lengths, counts, indices, **fields)


def to_dense_blocks(lists: BlockLists) -> torch.Tensor:
    bits = to_bits(lists.counts, lists.indices, lists.n_k_blocks)
    if lists.partial_counts is not None and lists.partial_indices is not None:
        bits = bits | to_bits(lists.partial_counts, lists.partial_indices, lists.n_k_blocks)
    return unpack_bits(bits, lists.n_k_blocks)


def to_dense_bool(lists: BlockLists) -> torch.Tensor:
    (bq, bk), (sq, sk) = lists.block, lists.lengths

    def spread(bits: torch.Tensor) -> torch.Tensor:
        blocks = unpack_bits(bits, lists.n_k_blocks)
        return blocks.repeat_interleave(bq, 2)[:, :, :sq].repeat_interleave(bk, 3)[..., :sk]

    allowed = spread(to_bits(lists.counts, lists.indices, lists.n_k_blocks))
    batch = lists.batch
    b, q, k = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(sq).view(-1, 1), torch.arange(sk)
    if lists.rule is not None and lists.partial_counts is not None and lists.partial_indices is not None:
        batch_of_rule = lists.rule.tensors[0].shape[0] if lists.rule.kind == "kv_validity" else 1
        b = torch.arange(max(batch, batch_of_rule)).view(-1, 1, 1, 1)
        partial = spread(to_bits(lists.partial_counts, lists.partial_indices, lists.n_k_blocks))
        allowed = allowed | (partial & lists.rule.allowed(b, q, k))
    if lists.n_valid is not None:
        allowed = allowed & (k < lists.n_valid.view(-1, 1, 1, 1))
    return allowed


# --- composition --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Planes:
    """Bits of the full and of the partial blocks, with the rule of the latter."""

    full: torch.Tensor
    partial: torch.Tensor
    rule: Rule | None


def _planes(lists: BlockLists) -> _Planes:
    full = to_bits(lists.counts, lists.indices, lists.n_k_blocks)
    if lists.partial_counts is None or lists.partial_indices is None:
        return _Planes(full, torch.zeros_like(full), None)
    return _Planes(full, to_bits(lists.partial_counts, lists.partial_indices, lists.n_k_blocks), lists.rule)


def intersect(a: BlockLists, b: BlockLists) -> BlockLists:
    _check_alike(a, b, "intersect")
    one, two = _planes(a), _planes(b)
    if bool((one.partial & two.partial).any()):
        _check_one_rule(one.rule, two.rule, "both masks are partial in one block")
    full = one.full & two.full
    partial = (one.full & two.partial) | (one.partial & two.full) | (one.partial & two.partial)
    n_valid = a.n_valid if b.n_valid is None else b.n_valid
    if a.n_valid is not None and b.n_valid is not None:
        n_valid = torch.minimum(a.n_valid, b.n_valid)
    return _from_planes(a, b, full, partial, _joint_rule(one, two, partial), n_valid)


def unite(a: BlockLists, b: BlockLists) -> BlockLists:
    _check_alike(a, b, "unite")
    one, two = _planes(a), _planes(b)
    full = one.full | two.full
    partial = (one.partial | two.partial) & ~full
    if (a.n_valid is None) != (b.n_valid is None) or (
        a.n_valid is not None and b.n_valid is not None and not torch.equal(a.n_valid, b.n_valid)
    ):
        raise ValueError(
            "Masks with different n_valid cannot be united: keys would be valid for some blocks only. "
            "Give both masks the same n_valid first."
        )
    return _from_planes(a, b, full, partial, _joint_rule(one, two, partial), a.n_valid)


def force(lists: BlockLists, rows: tuple[int, int] | None, cols: tuple[int, int] | None) -> BlockLists:
    nq, nk = lists.n_q_blocks, lists.n_k_blocks
    band = torch.zeros(1, 1, nq, nk, dtype=torch.bool)
    for axis, (name, span) in enumerate((("rows", rows), ("cols", cols))):
        if span is None:
            continue
        start, stop = span
        if not 0 <= start <= stop <= lists.lengths[axis]:
            raise ValueError(f"{name} must lie in 0..{lists.lengths[axis]} (tokens), {span} was given.")
        if start < stop:
            size = lists.block[axis]
            blocks = slice(start // size, -(-stop // size))
            band[(slice(None), slice(None), blocks) if axis == 0 else (..., blocks)] = True
    planes = _planes(lists)
    forced = torch.from_numpy(np.packbits(band.numpy(), axis=-1, bitorder="little"))
    full = planes.full | forced
    partial = planes.partial & ~full
    rule = planes.rule if bool(partial.any()) else None
    return _from_planes(lists, lists, full, partial, rule, lists.n_valid)


def _check_alike(a: BlockLists, b: BlockLists, what: str) -> None:
    for name in ("block", "lengths", "order"):
        one, two = getattr(a, name), getattr(b, name)
        if one != two:
            raise ValueError(
                f"Cannot {what} masks of different {name}: {one!r} and {two!r}. Build both in "
                f"the same {name}."
            )
    for axis, name in ((0, "batch"), (1, "head")):
        sizes = {a.counts.shape[axis], b.counts.shape[axis]} - {1}
        if len(sizes) > 1:
            raise ValueError(
                f"Cannot {what} masks of {sorted(sizes)} {name} lists: sizes must be equal or 1."
            )


def _check_one_rule(one: Rule | None, two: Rule | None, where: str) -> None:
    if one is not None and two is not None and not one.same_as(two):
        detail = " with different tensors" if one.kind == two.kind else ""
        raise ValueError(
            f"Cannot combine the rules {one.kind!r} and {two.kind!r}{detail}: {where}, and a mask holds "
            "one rule. Make one of the two masks block-exact first."
        )


def _joint_rule(one: _Planes, two: _Planes, partial: torch.Tensor) -> Rule | None:
    if not bool(partial.any()):
        return None
    rules = [p.rule for p in (one, two) if p.rule is not None and bool((p.partial & partial).any())]
    if len(rules) == 2:
        _check_one_rule(rules[0], rules[1], "partial blocks of both masks remain")
    return rules[0]


def _from_planes(
    a: BlockLists,
    b: BlockLists,
    full: torch.Tensor,
    partial: torch.Tensor,
    rule: Rule | None,
    n_valid: torch.Tensor | None,
) -> BlockLists:
    fields: dict[str, Any] = {"n_valid": n_valid, "rule": rule, "order": a.order}
    if rule is not None:
        p_counts, p_indices = lists_from_bits(partial.expand_as(full), a.n_k_blocks)
        fields |= {"partial_counts": p_counts, "partial_indices": p_indices}
    counts, indices = lists_from_bits(full, a.n_k_blocks)
    return BlockLists(
        a.block, a.lengths, counts, indices, allow_empty=a.allow_empty or b.allow_empty, **fields
    )
