"""Dense attention exactly as stock diffusers computes it: the dispatcher, whatever backend is set."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..lse import logsumexp_of
from .base import Operands, Request

_FLASH = 1  # torch._fused_sdp_choice: the fused kernel (on a CPU the one that also gives the log-sum-exp)


def active_backend(backend: str | None) -> str:
    """The diffusers backend a call will take: the one given, else the process's active one."""
    if backend is not None:
        return str(getattr(backend, "value", backend))
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active: Any = _AttentionBackendRegistry.get_active_backend()[0]  # an enum member, whatever its annotation
    return active.value


def stock_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """(B, S, H, D) in and out. Bitwise what a stock attention processor gives: it makes this very call."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attn_mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        backend=backend,  # type: ignore[arg-type]  # the dispatcher takes names too
        parallel_config=parallel_config,
    )


def four_dims(attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """attn_mask as (B|1, H|1, Sq|1, Sk); (B, Sk) is key validity, as the stock dispatcher reads it."""
    if attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        return attn_mask[:, None, None, :]
    return attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)


def stock_attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `stock_attention`, unchanged, and lse (B, H, Sq).

    Where the stock kernel is the CPU's fused one, that one is called directly and gives both. Elsewhere a
    second pass over Q and K computes lse: asking for it never changes the kernel behind the output.
    """
    mask = None if attn_mask is None else four_dims(attn_mask, query, key)
    traced = torch.compiler.is_compiling()  # the choice of the kernel is no tensor, so it cannot be traced
    if not traced and fused_on_cpu(query, key, value, mask, backend):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return _cpu_fused(q, k, v, mask, scale)
    out = stock_attention(query, key, value, attn_mask, scale, backend)
    with torch.no_grad():
        return out, logsumexp_of(query, key, scale, mask).float()


def fused_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    backend: str | None,
) -> bool:
    """Whether the stock kernel is the CPU's fused one, which gives the log-sum-exp with its output."""
    grouped = query.shape[2] != key.shape[2]
    if query.device.type != "cpu" or grouped or active_backend(backend) != "native":
        return False
    mask = None if attn_mask is None else four_dims(attn_mask, query, key)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return torch._fused_sdp_choice(q, k, v, mask, 0.0, False) == _FLASH


def _cpu_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )
    if bias is not None:
        # The op gives 0 for a row that may attend nothing.
        lse = lse.masked_fill((bias == float("-inf")).all(-1), float("-inf"))
    return out.transpose(1, 2), lse.float().contiguous()


class SdpaKernel:
    """torch's scaled_dot_product_attention through the stock dispatcher: the dense fallback everywhere."""

    name = "sdpa"

    def why_not(self, request: Request) -> str | None:
        return "dense only: cannot take block lists" if request.sparse else None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        o = operands
        if request.needs_lse:
            return stock_attention_with_lse(o.query, o.key, o.value, o.attn_mask, o.scale, "native")
        return stock_attention(o.query, o.key, o.value, o.attn_mask, o.scale, "native"), None


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, grouped: bool
) -> torch.Tensor:
    """F.scaled_dot_product_attention on (B, S, H, D) tensors; the transposes are views."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped).transpose(1, 2)


KERNEL = SdpaKernel()
