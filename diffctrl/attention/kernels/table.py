"""Which kernel first: the static choice table. Never timed in the user's process, so that a seed keeps its
latents.

Measured on one H100 80GB (torch 2.11, Triton 3.6, flash-attn-4 4.0.0b36), bf16, head dim 128, random lists of
128 x 128 blocks, useful TFLOP/s, host included; `scripts/bench/engine.py` measures it anew
(docs/results/engine.json):

| kernel                           | 32k x 12 heads | 119k x 24 heads | 4.6k x 24 heads |
|----------------------------------|----------------|-----------------|-----------------|
| flash4, dense                    | 700            | 663-700         | 640             |
| cudnn, dense                     | 634-640        | 612-647         | 603             |
| flash4, lists, density 0.25/0.10 | 654 / 554      | 670 / 653       | 503 / 136       |
| triton, lists, density 0.25      | 495            | 464             | 392             |
| flex, lists, density 0.25        | 410            | 428             | 334             |

A short call of flash4 waits for its Python, not for the card; from 6e10 FLOP on the kernel is the longer of
the two. A kernel that cannot take a call says so itself (`why_not`): here is only the order.
"""

from __future__ import annotations

from .base import Request

# Names of `chain.KERNEL_MODULES`. The chain takes the first that can and passes its self-test.
LONG = ("flash4", "triton", "flex", "gathered")
SHORT = ("triton", "flash4", "flex", "gathered")
BACKWARD = ("flash4", "flex", "gathered")
DENSE = ("flash4", "cudnn", "sdpa")

LONG_FROM_TOKENS = 16384
LONG_FROM_FLOP = 6e10
DENSE_FLASH4_FROM_TOKENS = 2048


def kernel_order(request: Request) -> tuple[str, ...]:
    """Kernel names in the order in which the chain tries them: a function of the request without its batch
    size."""
    if request.device_type != "cuda":
        return ("gathered",) if request.sparse else ("sdpa",)
    if not request.sparse:
        return DENSE if request.q_len >= DENSE_FLASH4_FROM_TOKENS else DENSE[1:]
    if request.needs_grad:
        return BACKWARD
    if request.q_len >= LONG_FROM_TOKENS or request.work >= LONG_FROM_FLOP:
        return LONG
    return SHORT
