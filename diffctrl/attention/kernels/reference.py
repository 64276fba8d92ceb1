"""The slow, readable answer: S x S scores in fp32 (fp64 for fp64). For tests; the chain never picks it."""

from __future__ import annotations

import torch

from .base import Operands, Request


class ReferenceKernel:
    name = "reference"

    def why_not(self, request: Request) -> str | None:
        return None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = operands.query
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        groups = request.heads // request.kv_heads
        q = query.transpose(1, 2).to(work)  # (B, H, Sq, D)
        k = operands.key.transpose(1, 2).to(work).repeat_interleave(groups, 1)
        v = operands.value.transpose(1, 2).to(work).repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * operands.scale
        if operands.mask is not None:
            scores = scores.masked_fill(~operands.mask.to_dense_bool().to(q.device), float("-inf"))
        if operands.attn_mask is not None:
            bias = operands.attn_mask
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        lse = torch.logsumexp(scores, -1)
        # exp(-inf - (-inf)) is NaN: rows without keys subtract 0, and their probabilities are exp(-inf) = 0.
        safe = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
        out = torch.exp(scores - safe.unsqueeze(-1)) @ v
        return out.to(query.dtype).transpose(1, 2), lse.float().contiguous() if request.needs_lse else None


KERNEL = ReferenceKernel()
