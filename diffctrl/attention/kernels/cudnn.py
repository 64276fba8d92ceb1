"""Dense attention by cuDNN, through torch."""

from __future__ import annotations

import torch

from .base import Operands, Request
from .sdpa import sdpa


class CudnnKernel:
    name = "cudnn"

    def why_not(self, request: Request) -> str | None:
        if request.device_type != "cuda" or torch.version.hip is not None:
            return "needs an NVIDIA GPU"
        if request.sparse:
            return "dense only: cannot take block lists"
        if request.arch is None or request.arch < 80:
            return f"needs compute capability 8.0 or newer, not sm{request.arch}"
        if not torch.backends.cudnn.is_available():
            return "this build of torch has no cuDNN"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {request.dtype}"
        if request.head_dim % 8 or request.head_dim > 128:
            return f"takes head dims that are multiples of 8 up to 128, not {request.head_dim}"
        if request.attn_mask != "none":
            return (
                "is not used with attn_mask: a mask tensor loses its speed, and torch's own choice handles it"
            )
        if request.heads != request.kv_heads:
            return "does not take grouped key/value heads here"
        if request.needs_grad and torch.are_deterministic_algorithms_enabled():
            return "has no deterministic backward"
        return None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if not request.needs_lse:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return sdpa(operands.query, operands.key, operands.value, operands.scale, False), None
        # Wrong results on strided inputs when called directly: it wants contiguous (B, H, S, D).
        q, k, v = (t.transpose(1, 2).contiguous() for t in (operands.query, operands.key, operands.value))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, scale=operands.scale
        )
        # (B, H, S, 1) since torch 2.9.
        return out.transpose(1, 2), lse.reshape(q.shape[:3]).float().contiguous()


KERNEL = CudnnKernel()
