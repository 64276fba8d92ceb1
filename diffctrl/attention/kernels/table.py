"""Which kernel first: the static choice table. Never timed in the user's process, so that a seed keeps its
latents.

Measured on one H100 80GB HBM3 by `scripts/bench/engine.py` (docs/results/engine.json: torch 2.11, CUDA 13.0,
Triton 3.6, flash-attn-4 4.0.0b36; 2026-11-24, commit d1e0463), bf16, head dim 128, batch 1, random lists of
128 x 128 blocks with equal counts (ragged: 1 to twice the count), useful TFLOP/s of the device:

| kernel              | 4.6k tokens, 24 heads    | 32k, 12 heads            | 119k, 24 heads |
|---------------------|--------------------------|--------------------------|----------------|
| flash4, dense       | 673                      | 674                      | 623            |
| cudnn, dense        | 635                      | 623                      | 534            |
| sdpa (FA2), dense   | 322                      | 301                      |                |
| lists of density    | 1 / .25 / .11 / .25 rag. | 1 / .25 / .10 / .25 rag. | .25 / .10      |
| flash4              | 660 / 515 / 375 / 509    | 696 / 682 / 630 / 691    | 610 / 604      |
| flash4-persistent   | 654 / 531 / 400 / 422    | 697 / 679 / 654 / 519    | 598 / 597      |
| triton              | 436 / 389 / 304 / 421    | 460 / 511 / 482 / 485    | 441 / 415      |
| triton desc-ws-n128 | 530 / 411 / 295 / 405    | 584 / 531 / 488 / 542    | 503 / 531      |
| flex, 4 warps       | 190 / 173 / 144 / 165    | 190 / 167 / 175 / 167    | 202 / 194      |

With the host included, back to back at 4.6k: flash4 dense 556 through its public function and 614 through
`attend`, cudnn 532; over lists flash4 632 / 483 / 354, triton 390 / 330 / 259. The order of the long sequence
is that of the short one. Against the best dense kernel flash4 over lists reaches 0.76 at 4.6k and density
.25, 0.56 at .11 (bar 0.60), 1.04 at 32k, 0.98 at 119k. flex has 8 warps since: with 4 it spilled registers.

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
