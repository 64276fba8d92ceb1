"""Which kernel first: the static choice table. Never timed in the user's process, so that a seed keeps its
latents.

Measured on one H200 by `scripts/bench/engine.py` (docs/results/engine.json: torch 2.11, CUDA 13.0, Triton
3.6, flash-attn-4 4.0.0b36; 2026-11-29), bf16, head dim 128, batch 1, random lists of 128 x 128 blocks with
equal counts (ragged: 1 to twice the count), useful TFLOP/s of the device:

| kernel                | 4.6k tokens, 24 heads    | 32k, 12 heads            | 119k, 24 heads |
|-----------------------|--------------------------|--------------------------|----------------|
| flash4, dense         | 684                      | 674                      | 653            |
| cudnn, dense          | 641                      | 607                      | 562            |
| sdpa (FA2), dense     | 322                      | 305                      |                |
| lists of density      | 1 / .25 / .11 / .25 rag. | 1 / .25 / .10 / .25 rag. | .25 / .10      |
| flash4                | 689 / 584 / 474 / 608    | 695 / 702 / 639 / 710    | 634 / 629      |
| flash4 of the library | 663 / 520 / 382 / 515    | 715 / 667 / 620 / 652    | 675 / 698      |
| triton                | 543 / 409 / 302 / 423    | 556 / 534 / 485 / 518    | 491 / 452      |
| flex                  | 347 / 293 / 238 / 287    | 336 / 295 / 321 / 296    | 382 / 346      |

With the host included, back to back at 4.6k: flash4 dense 570 through its public function and 629 through
`attend`, cudnn 565; over lists flash4 657 / 551 / 445, triton 497 / 372 / 272. Against the best dense kernel
`attend` over lists reaches 0.85 at 4.6k and density .25, 0.69 at .11, 1.04 at 32k, 0.97 at 119k. There the
card throttles and a row moves by 10 % between runs: in the run before, the library's form was as fast. (The
JSON calls the library's form flash4-stock, and has a persistent one that lost and is no longer here.)

With a backward triton stands after flex and so serves blocks that flex has none for. At head dim 32 and
blocks of 128 it takes 0.73 of flex's time (docs/results/backward.json); at 64 and 128 they were not compared.

A kernel that cannot take a call says so itself (`why_not`): here is only the order.
"""

from __future__ import annotations

from .base import Request

# Names of `chain.KERNEL_MODULES`. The chain takes the first that can and passes its self-test.
LISTS = ("flash4", "triton", "flex", "gathered")
BACKWARD = ("flash4", "flex", "triton", "gathered")
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
