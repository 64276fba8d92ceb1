"""Which kernel first: the static choice table. Never timed in the user's process, so that a seed keeps its
latents.

Measured on one H100 80GB HBM3 (torch 2.11, CUDA 13.0, Triton 3.6, flash-attn-4 4.0.0b36; 2026-11-24, commit
67eb4f3), bf16, head dim 128, batch 1, random lists of 128 x 128 blocks with equal counts, useful TFLOP/s:
device time, by graph replay at 4.6k. One short run without intervals: `scripts/bench/engine.py` is the
measurement to replace it, and has not run on a card yet.

| kernel              | 4.6k tokens, 24 heads | 32k, 12 heads    | 119k, 24 heads |
|---------------------|-----------------------|------------------|----------------|
| cudnn, dense        | 635                   | 647              | 523            |
| flash4, dense       | 672                   | 660              | 657            |
| lists of density    | 1.0 / 0.25 / 0.111    | 1.0 / 0.25       | 0.25 / 0.10    |
| flash4              | 662 / 529 / 395       | 680 / 700        | 678 / 633      |
| triton, copy engine | 451 / 403 / 314       | 515 / 562        | 476 / 418      |
| triton, pointers    | 387 / 337 / 280       | 438 / 438        | 382 / 372      |

The same at 4.6k with the host included, back to back: flash4 dense 655, cudnn 594; over lists flash4 530 /
515 / 378, triton 438 / 392 / 296. The host needs no longer for flash4 (directly called) than for triton (135
and 183 us a call from cold), so the short sequence gets the order of the long one. flex, measured before on
another card of the kind: 334 / 410 / 428 at density 0.25.

A kernel that cannot take a call says so itself (`why_not`): here is only the order.
"""

from __future__ import annotations

from .base import Request

# Names of `chain.KERNEL_MODULES`. The chain takes the first that can and passes its self-test.
LISTS = ("flash4", "triton", "flex", "gathered")
BACKWARD = ("flash4", "flex", "gathered")
DENSE = ("flash4", "cudnn", "sdpa")
DENSE_SHORT = ("cudnn", "sdpa")

# Queries and keys from which flash4 was measured to be the faster dense kernel. Shorter or cross attention
# was not: it stays with what torch would take.
DENSE_FLASH4_FROM_TOKENS = 4096


def kernel_order(request: Request) -> tuple[str, ...]:
    """Kernel names in the order in which the chain tries them: a function of the request without its batch
    size."""
    if request.device_type != "cuda":
        return ("gathered",) if request.sparse else ("sdpa",)
    if request.sparse:
        return BACKWARD if request.needs_grad else LISTS
    shortest = min(request.q_len, request.k_len)
    return DENSE if shortest >= DENSE_FLASH4_FROM_TOKENS else DENSE_SHORT
