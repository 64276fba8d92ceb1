"""Block-sparse attention as one operator, so that `torch.compile(fullgraph=True)` sees a single opaque node.

The chain runs inside it, at run time: a compiled region never bakes in a kernel, a list or a length.
"""

from __future__ import annotations

from typing import Any

import torch

from .chain import choose, note
from .kernels.base import Operands
from .lists import BlockLists, DeviceLists, origin_of
from .stats import EngineStats, stats_by_number


def run_chain(
    operands: Operands,
    *,
    needs_lse: bool,
    needs_grad: bool,
    kernel: str | None,
    stats: EngineStats | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Selects and runs; out (B, Sq, H, D), lse (B, H, Sq) or None."""
    request, selection = choose(operands, needs_lse=needs_lse, needs_grad=needs_grad, kernel=kernel)
    note(selection, stats)
    if stats is not None:
        mask = operands.mask
        densities = (None, None) if mask is None else (mask.density(), mask.kernel_density())
        stats.record(selection.kernel.name, *densities)
    return selection.kernel.run(request, operands)


def _operands(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: list[torch.Tensor | None],
    rule_kind: str,
    rule_tensors: list[torch.Tensor],
    block: list[int],
    scale: float,
) -> Operands:
    mask: BlockLists | None = None
    counts, indices, n_valid, partial_counts, partial_indices = lists
    if counts is not None and indices is not None:
        on_device = DeviceLists(
            counts, indices, n_valid, partial_counts, partial_indices,
            rule_kind or None, tuple(rule_tensors), (block[0], block[1]),
        )  # fmt: skip
        mask = origin_of(on_device, (query.shape[1], key.shape[1]))
    return Operands(query, key, value, scale, mask)


@torch.library.custom_op("diffctrl::attend", mutates_args=())
def attend_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor | None,
    indices: torch.Tensor | None,
    n_valid: torch.Tensor | None,
    partial_counts: torch.Tensor | None,
    partial_indices: torch.Tensor | None,
    rule_tensors: list[torch.Tensor],
    rule_kind: str,
    block: list[int],
    scale: float,
    needs_lse: bool,
    needs_grad: bool,
    kernel: str,
    stats_number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` on plain tensors: None for lists that a dense call lacks, "" for no rule and no forced kernel.

    Returns out (B, Sq, H, D) contiguous, and lse (B, H, Sq) if needs_lse or needs_grad (the backward wants
    it) else an empty tensor.
    """
    lists = [counts, indices, n_valid, partial_counts, partial_indices]
    operands = _operands(query, key, value, lists, rule_kind, rule_tensors, block, scale)
    out, lse = run_chain(
        operands,
        needs_lse=needs_lse or needs_grad,
        # Autograd is handled outside of the operator; its backward recomputes or calls the kernel's own.
        needs_grad=False,
        kernel=kernel or None,
        stats=stats_by_number(stats_number),
    )
    return out.contiguous(), query.new_empty(0, dtype=torch.float32) if lse is None else lse


@attend_op.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    needs_lse, needs_grad = args[8], args[9]
    b, sq, h, _ = query.shape
    lse = query.new_empty((b, h, sq) if needs_lse or needs_grad else (0,), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@torch.library.custom_op("diffctrl::attend_backward", mutates_args=())
def attend_backward_op(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor | None,
    indices: torch.Tensor | None,
    n_valid: torch.Tensor | None,
    partial_counts: torch.Tensor | None,
    partial_indices: torch.Tensor | None,
    rule_tensors: list[torch.Tensor],
    rule_kind: str,
    block: list[int],
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value: by the kernel's `backward` if it has one, else through its autograd."""
    lists = [counts, indices, n_valid, partial_counts, partial_indices]
    operands = _operands(query, key, value, lists, rule_kind, rule_tensors, block, scale)
    request, selection = choose(operands, needs_lse=False, needs_grad=True, kernel=kernel or None)
    own = getattr(selection.kernel, "backward", None)
    if own is not None:
        grads = own(operands, grad, out, lse)
    else:
        q, k, v = (t.detach().requires_grad_() for t in (query, key, value))
        # An operator runs below autograd, where torch's own kernels leave no graph; opened as
        # torch.utils.checkpoint opens another key.
        recorded = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with torch.enable_grad(), recorded:
            again, _ = selection.kernel.run(request, Operands(q, k, v, scale, operands.mask))
        grads = torch.autograd.grad(again, (q, k, v), grad)
    dq, dk, dv = (g.contiguous() for g in grads)
    return dq, dk, dv


@attend_backward_op.register_fake
def _(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, *lists = inputs[:8]
    rule_tensors, ctx.rule_kind, ctx.block, ctx.scale, _, _, ctx.kernel, _ = inputs[8:]
    ctx.present = [t is not None for t in lists]
    ctx.save_for_backward(query, key, value, *output, *(t for t in lists if t is not None), *rule_tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, out, lse, *rest = ctx.saved_tensors
    lists = [rest.pop(0) if present else None for present in ctx.present]
    grads = attend_backward_op(
        grad.contiguous(),
        out,
        lse,
        query,
        key,
        value,
        *lists,
        rest,
        ctx.rule_kind,
        ctx.block,
        ctx.scale,
        ctx.kernel,
    )
    # One gradient per input of the operator; the list of rule tensors has a list of them.
    return *grads, None, None, None, None, None, [None] * len(rest), *([None] * 7)


attend_op.register_autograd(_backward, setup_context=_setup_context)
