"""Which of some (query, key) pairs block lists attend: R x T answers, never S x S."""

from __future__ import annotations

from dataclasses import replace

import torch

from .compose import to_bits, unpack_bits
from .lists import BlockLists
from .rules import Rule


def attended_pairs(lists: BlockLists, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Bool, broadcastable to (B, H, R, T): whether query r attends key t, on the device of `rows`.

    Args:
        lists: the mask.
        rows: (1 or B, R) query tokens.
        columns: (1 or B, T) key tokens.

    >>> lists = BlockLists((2, 2), (4, 4), torch.tensor([[[1, 2]]]), torch.tensor([[[[0, 0], [0, 1]]]]))
    >>> attended_pairs(lists, torch.tensor([[0, 3]]), torch.tensor([[1, 2]]))[0, 0].tolist()
    [[True, False], [True, True]]
    """
    device = rows.device
    full, partial = lists.cached(device, "planes", lambda: _planes(lists, device))
    batch = max(lists.batch, _rule_rows(lists), len(rows), len(columns))
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(full.shape[1], device=device)[:, None, None]
    q, k = rows[:, None, :, None], columns[:, None, None, :]
    place = b % full.shape[0], h, q // lists.block[0], k // lists.block[1]
    allowed = full[place]
    on_device = lists.on(device)
    if partial is not None and lists.rule is not None:
        allowed = allowed | (partial[place] & Rule(lists.rule.kind, on_device.rule_tensors).allowed(b, q, k))
    if on_device.n_valid is not None:
        allowed = allowed & (k < on_device.n_valid[b])
    return allowed


def part_of(lists: BlockLists, batch: range, heads: tuple[int, ...] | None) -> BlockLists:
    """The lists of some batch rows and heads of a call; the same object where all share one list."""
    rule = lists.rule
    if rule is not None and _rule_rows(lists) > 1:
        rule = Rule(rule.kind, (rule.tensors[0][batch.start : batch.stop],))
    by_row = lists.counts.shape[0] > 1
    by_head = lists.counts.shape[1] > 1 and heads is not None
    if not by_row and not by_head and lists.n_valid is None and rule is lists.rule:
        return lists

    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        tensor = tensor[batch.start : batch.stop] if by_row else tensor
        return tensor[:, list(heads or ())] if by_head else tensor

    def make() -> BlockLists:
        return replace(
            lists,
            counts=pick(lists.counts),
            indices=pick(lists.indices),
            partial_counts=pick(lists.partial_counts),
            partial_indices=pick(lists.partial_indices),
            n_valid=None if lists.n_valid is None else lists.n_valid[batch.start : batch.stop],
            rule=rule,
        )

    return lists.cached("cpu", f"part {batch.start}:{batch.stop} {heads}", make)


def _rule_rows(lists: BlockLists) -> int:
    """Batch rows that the element rule tells apart, 1 if none."""
    rule = lists.rule
    return rule.tensors[0].shape[0] if rule is not None and rule.kind == "kv_validity" else 1


def _planes(lists: BlockLists, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The full and the partial blocks as bool (Bm, Hm, NQ, NK): one byte per block."""

    def plane(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return unpack_bits(to_bits(counts, indices, lists.n_k_blocks), lists.n_k_blocks).to(device)

    full = plane(lists.counts, lists.indices)
    if lists.partial_counts is None or lists.partial_indices is None:
        return full, None
    return full, plane(lists.partial_counts, lists.partial_indices)
