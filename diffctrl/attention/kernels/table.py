"""Which kernel first: the static choice table. Nothing is timed at run time: a seed keeps its latents."""

from __future__ import annotations

from .base import Request

# Names are files in this folder. The chain tries them in order and takes the first that can and passes its
# self-test.
SPARSE = ("flash4", "triton", "flex", "gathered")
DENSE = ("flash4", "cudnn", "sdpa")


def kernel_order(request: Request) -> tuple[str, ...]:
    """Kernel names in the order the chain tries them: a function of the request without its batch size."""
    if request.device_type != "cuda":
        return ("gathered",) if request.sparse else ("sdpa",)
    if not request.sparse:
        return DENSE if request.q_len >= 2048 else ("cudnn", "sdpa")
    # Launch cost: flash-attn-4 wins once the work of a call is large (docs: engine, decisions).
    if request.q_len >= 16384 or request.work >= 6e10:
        return SPARSE
    return ("triton", "flash4", "flex", "gathered")
