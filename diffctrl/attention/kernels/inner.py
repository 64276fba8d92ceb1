"""One-head dense attention with log-sum-exp: the inner call of the gathered kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (N, R, D), key and value (N, L, D), allowed bool (N, R, L) -> out (N, R, D), lse (N, R).

    lse is fp32 (fp64 for fp64), -inf for a row that may attend nothing, whose out is 0. L >= 1: the CPU op
    of torch divides by zero and ends the process on an empty key axis.
    """
    if query.device.type == "cpu":
        out, lse = _cpu_flash(query, key, value, scale, allowed)
    elif query.device.type == "cuda" and allowed is None and query.dtype in (torch.float16, torch.bfloat16):
        out, lse = _cuda_flash(query, key, value, scale)
    else:
        return _plain(query, key, value, scale, allowed)
    if allowed is not None:
        # The fused ops give out 0 but lse 0 for a row without keys.
        lse = lse.masked_fill(~allowed.any(-1), float("-inf"))
    return out, lse


def _cpu_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None
    if allowed is not None:
        bias = (
            torch.zeros(allowed.shape, dtype=query.dtype).masked_fill_(~allowed, float("-inf")).unsqueeze(1)
        )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), attn_mask=bias, scale=scale
    )
    return out.squeeze(1), lse.squeeze(1)


def _cuda_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dim = query.shape[-1]
    padding = -dim % 8  # the op takes head dims that are multiples of 8
    q, k, v = (F.pad(t, (0, padding)).unsqueeze(1) for t in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out.squeeze(1)[..., :dim], lse[:, 0, : query.shape[1]]


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.bmm(query.to(work), key.to(work).transpose(1, 2)).mul_(scale)
    if allowed is not None:
        scores.masked_fill_(~allowed, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    safe = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    probs = scores.sub_(safe.unsqueeze(-1)).exp_()
    return torch.bmm(probs, value.to(work)).to(query.dtype), lse
