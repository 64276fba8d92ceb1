"""Autograd over a kernel that has a forward and a backward of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch

from .base import Operands, Request


class WithBackward(Protocol):
    """A kernel's two halves, both without autograd."""

    def forward(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out (B, Sq, H, D), and lse (B, H, Sq) if `request.needs_lse`."""
        ...

    def backward(
        self, operands: Operands, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key, value; `out` and `lse` as `forward` gave them."""
        ...


def differentiable(
    kernel: WithBackward, request: Request, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `kernel.forward`; out has first-order gradients, lse none. Only q, k, v, out and lse are
    kept for them."""
    request = replace(request, needs_lse=True)  # the backward wants it
    out, lse = _Attention.apply(operands.query, operands.key, operands.value, kernel, request, operands)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: WithBackward,
        request: Request, operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out, lse = kernel.forward(request, operands)
        assert lse is not None
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel, ctx.mask, ctx.scale = kernel, operands.mask, operands.scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph; `once_differentiable` drops the second order in cases
            raise RuntimeError("This attention kernel has first-order gradients only: no create_graph=True.")
        query, key, value, out, lse = ctx.saved_tensors
        operands = Operands(query, key, value, ctx.scale, ctx.mask)
        return *ctx.kernel.backward(operands, grads[0], out, lse), None, None, None
