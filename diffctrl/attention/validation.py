"""Checks of `BlockLists` at construction: failures say what was given, what is accepted, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .rules import Rule

if TYPE_CHECKING:
    from .lists import BlockLists


def validated_fields(lists: BlockLists) -> dict[str, Any]:
    """The tensor fields as int32 CPU copies, cut to the used width; ValueError on anything wrong."""
    _check_sizes(lists)
    nq, nk = lists.n_q_blocks, lists.n_k_blocks
    counts, indices = _canonical("", lists.counts, lists.indices, nq, nk)
    fields: dict[str, Any] = {"counts": counts, "indices": indices}
    if (lists.partial_counts is None) != (lists.partial_indices is None) or (
        (lists.partial_counts is None) != (lists.rule is None)
    ):
        raise ValueError(
            "partial_counts, partial_indices and rule come together; given were "
            f"{[n for n in ('partial_counts', 'partial_indices', 'rule') if getattr(lists, n) is not None]}."
        )
    rows = counts
    if lists.partial_counts is not None and lists.partial_indices is not None:
        p_counts, p_indices = _canonical("partial_", lists.partial_counts, lists.partial_indices, nq, nk)
        if p_counts.shape != counts.shape:
            raise ValueError(
                f"partial_counts is {tuple(p_counts.shape)}, counts is {tuple(counts.shape)}: "
                "make them equal."
            )
        _check_disjoint(counts, indices, p_counts, p_indices, nk)
        fields |= {"partial_counts": p_counts, "partial_indices": p_indices}
        rows = counts + p_counts
    if not lists.allow_empty and bool((rows == 0).any()):
        b, h, q = (rows == 0).nonzero()[0].tolist()
        raise ValueError(
            f"Query block {q} of batch row {b}, head {h} has no key block. Pass allow_empty=True "
            "if its output shall be 0, else list at least one block for it."
        )
    if lists.n_valid is not None:
        fields["n_valid"] = _checked_n_valid(lists.n_valid, counts.shape[0], lists.lengths[1])
    if lists.rule is not None:
        _check_rule(lists)
        tensors = (t.detach().to("cpu", copy=True).contiguous() for t in lists.rule.tensors)
        fields["rule"] = Rule(lists.rule.kind, tuple(tensors))
    return fields


def _check_sizes(lists: BlockLists) -> None:
    for name in ("block", "lengths"):
        value = getattr(lists, name)
        if not (
            isinstance(value, tuple) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)
        ):
            raise ValueError(f"{name} must be a pair of positive ints (queries, keys), {value!r} was given.")


def _canonical(
    prefix: str, counts: torch.Tensor, indices: torch.Tensor, nq: int, nk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, tensor, ndim in ((f"{prefix}counts", counts, 3), (f"{prefix}indices", indices, 4)):
        if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(
                f"{name} must be an integer tensor, {getattr(tensor, 'dtype', type(tensor))} was given."
            )
        if tensor.ndim != ndim:
            axes = "(Bm, Hm, NQ)" if ndim == 3 else "(Bm, Hm, NQ, W)"
            raise ValueError(f"{name} must have axes {axes}, the shape given is {tuple(tensor.shape)}.")
    if counts.shape != indices.shape[:3] or counts.shape[2] != nq or indices.shape[3] == 0:
        raise ValueError(
            f"{prefix}counts {tuple(counts.shape)} and {prefix}indices {tuple(indices.shape)} must be "
            f"(Bm, Hm, {nq}) and (Bm, Hm, {nq}, W) with W >= 1: NQ = {nq} follows from lengths and block."
        )
    # A copy: the mask is immutable, whatever the caller does with the tensors afterwards.
    counts = counts.detach().to("cpu", torch.int32, copy=True).contiguous()
    indices = indices.detach().to("cpu", torch.int32, copy=True).contiguous()
    low, high = int(counts.min()), int(counts.max())
    if low < 0 or high > indices.shape[3]:
        raise ValueError(f"{prefix}counts run from {low} to {high}; accepted is 0 to W = {indices.shape[3]}.")
    if indices.shape[3] > max(high, 1):
        # A tensor of its own, never a view: compiled code guards on the strides of a view's base.
        indices = indices[..., : max(high, 1)].clone(memory_format=torch.contiguous_format)
    used = torch.arange(indices.shape[3], dtype=torch.int32) < counts.unsqueeze(-1)
    indices.masked_fill_(~used, 0)
    if int(indices.min()) < 0 or int(indices.max()) >= nk:
        bad = indices[(indices < 0) | (indices >= nk)][0]
        raise ValueError(f"{prefix}indices hold block {int(bad)}; accepted is 0 to {nk - 1} (NK = {nk}).")
    wrong = (indices[..., 1:] <= indices[..., :-1]) & used[..., 1:]
    if bool(wrong.any()):
        b, h, q, _ = wrong.nonzero()[0].tolist()
        row = indices[b, h, q, : int(counts[b, h, q])]
        what = "lists a block twice" if len(row.unique()) < len(row) else "is not in ascending order"
        raise ValueError(
            f"{prefix}indices of batch row {b}, head {h}, query block {q} {what}: {_short(row.tolist())}. "
            "Kernels mask the tail in the last entry only and would count a repeated key twice: sort and "
            "deduplicate each list."
        )
    return counts, indices


def _check_disjoint(
    counts: torch.Tensor, indices: torch.Tensor, p_counts: torch.Tensor, p_indices: torch.Tensor, nk: int
) -> None:
    keys = []
    for c, i in ((counts, indices), (p_counts, p_indices)):
        used = torch.arange(i.shape[-1]) < c.unsqueeze(-1)
        row = torch.arange(c.numel()).view(*c.shape, 1)
        keys.append((row * nk + i)[used])
    both = torch.isin(keys[1], keys[0])
    if bool(both.any()):
        block = int(keys[1][both][0]) % nk
        raise ValueError(f"Key block {block} is in indices and in partial_indices of one row: list it once.")


def _checked_n_valid(n_valid: torch.Tensor, mask_batch: int, sk: int) -> torch.Tensor:
    if n_valid.ndim != 1 or n_valid.is_floating_point() or n_valid.dtype == torch.bool:
        raise ValueError(
            f"n_valid must be an integer tensor (B,), {n_valid.dtype} {tuple(n_valid.shape)} was given."
        )
    if mask_batch not in (1, len(n_valid)):
        raise ValueError(
            f"n_valid has {len(n_valid)} rows, the lists have {mask_batch}: use 1 or "
            f"{len(n_valid)} list rows."
        )
    n_valid = n_valid.detach().to("cpu", torch.int32, copy=True)
    if int(n_valid.min()) < 0 or int(n_valid.max()) > sk:
        raise ValueError(f"n_valid is {_short(n_valid.tolist())}; accepted is 0 to Sk = {sk}.")
    return n_valid


def _check_rule(lists: BlockLists) -> None:
    assert lists.rule is not None
    kind, tensors, (sq, sk) = lists.rule.kind, lists.rule.tensors, lists.lengths
    shapes = [tuple(t.shape) for t in tensors]
    fits = {
        "causal": lambda: shapes == [(1,)],
        "frame_bands": lambda: (
            shapes == [(sq,), (sk,), (int(tensors[0].max()) + 2,), (1,)]
            and sq == sk
            and lists.block[0] == lists.block[1]
        ),
        "frame_window": lambda: shapes == [(sq,), (sk,), (1,)],
        "kv_validity": lambda: len(shapes[0]) == 2 and shapes[0][1] == sk and tensors[0].dtype == torch.bool,
    }[kind]()
    if not fits:
        raise ValueError(
            f"Rule {kind!r} has tensors of shapes {shapes}, which do not fit lengths {lists.lengths}."
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"
