"""Block scores by one fused pass over Q K^T, in Triton: bf16 and fp16, sm80 and newer.

The host side: which form (a static table, never timed in the user's process), the launch, and the self-test
that the kernel passes before its first use. The device code is in `fused_jit`, which is imported on first use
because triton may be missing.
"""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffctrl.attention.kernels.triton_lists import Scratch, for_copy_engine
from diffctrl.attention.kernels.triton_runtime import arch_of, interpreted, with_triton
from diffctrl.sparsed.pooling import chunked_scores

_LOG2E = math.log2(math.e)
_DTYPES = (torch.bfloat16, torch.float16)
# Largest error of a score relative to the largest score, over inputs of 16 bits with the same log-sum-exp.
BOUND = 2e-3
_LOCK = threading.RLock()
_VERDICTS: dict[tuple[Any, ...], str | None] = {}


@dataclass(frozen=True, slots=True)
class Form:
    """One compiled form.

    rows: BM, query rows of a program. tile: BN, key tokens of a step at most. warps, stages: Triton's.
    descriptor: keys through the bulk copy engine (sm90 on), else by pointers.
    """

    rows: int = 128
    tile: int = 64
    warps: int = 4
    stages: int = 2
    descriptor: bool = False

    @property
    def label(self) -> str:
        kind = "desc" if self.descriptor else "ptr"
        return f"{kind}-m{self.rows}-n{self.tile}-w{self.warps}-s{self.stages}"


# What a benchmark may sweep on Hopper; `table_form` names the one in use.
CANDIDATES = (
    Form(),
    Form(stages=3),
    Form(tile=128, warps=8),
    Form(descriptor=True),
    Form(descriptor=True, stages=3),
    Form(descriptor=True, tile=128, warps=8),
    Form(descriptor=True, tile=128, warps=8, stages=3),
)


def table_form(arch: int, head_dim: int) -> Form:
    """The form for a card and a head dim: a function of nothing else, so that a seed keeps its pattern.

    Registers, spills and shared memory were read from the assembler (tests/sparsed/test_fused.py keeps them
    so): 96 KB, two programs on a Hopper SM at head dim 128. Not measured on a card yet. Outside Hopper and
    sm100 a program may have 99 KB, and 8 warps avoid spilled registers.
    """
    large = arch // 10 in (9, 10)
    if head_dim > 128:
        return Form(tile=32, warps=8) if large else Form(tile=16, warps=8, stages=1)
    if not large:
        return Form(tile=64 if head_dim <= 64 else 32, warps=8)
    return Form(descriptor=arch // 10 == 9 and head_dim in (64, 128))


def why_not(query: Tensor, block: int) -> str | None:
    """None where the kernel can take these queries, else the reason; without the self-test."""
    if not with_triton():
        return "needs triton, which is not installed"
    if query.device.type != "cuda" and not interpreted():
        return f"runs on CUDA GPUs, not on {query.device.type}"
    if torch.version.hip is not None:
        return "was not measured on ROCm"
    arch = arch_of(query.device)
    if arch < 80:
        return f"needs compute capability 8.0 or newer, not sm{arch}"
    if query.dtype not in _DTYPES:
        return f"takes bfloat16 and float16, not {query.dtype}"
    if not 16 <= query.shape[3] <= 256 or query.shape[3] % 8:
        return f"takes head dims that are multiples of 8 from 16 to 256, not {query.shape[3]}"
    if block < 16:
        return f"needs blocks of 16 tokens or more, not {block}"
    return None


def refused(query: Tensor, key: Tensor, block: int) -> str | None:
    """None where the kernel may be used, else the reason; the first call of its kind runs the self-test."""
    reason = why_not(query, block)
    if reason is not None:
        return reason
    grouped = query.shape[2] != key.shape[2]
    kind = (str(query.device), query.dtype, query.shape[3], block, grouped)
    with _LOCK:
        if kind not in _VERDICTS:
            _VERDICTS[kind] = self_test(query.device, query.dtype, query.shape[3], block, grouped)
        return _VERDICTS[kind]


def self_test(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int, grouped: bool
) -> str | None:
    """Compares tiny scores with `chunked_scores`; None or what is wrong."""
    generator = torch.Generator().manual_seed(99)
    heads, kv_heads, tokens = (4, 2, 3 * block + 5) if grouped else (3, 3, 3 * block + 5)

    def draw(count: int) -> Tensor:
        return torch.randn(2, tokens, count, head_dim, generator=generator).to(device, dtype)

    query, key = draw(heads), draw(kv_heads)
    valid, scale = [tokens, block + 3], 1.0 / math.sqrt(head_dim)
    try:
        with torch.inference_mode():
            lse = reference_lse(query, key, valid, scale)
            got = fused_scores(query, key, valid, valid, scale, block, lse)
            expected = chunked_scores(query, key, valid, valid, scale, block, lse)
    except Exception as error:  # whatever a kernel raises is the reason why it is refused
        lines = str(error).strip().splitlines() or [""]
        return f"self-test raised {type(error).__name__}: {lines[0][:300]}"
    wrong = float((got - expected).abs().max() / expected.max())
    return (
        None if wrong <= BOUND else f"self-test: off by {wrong:.1e} of the largest score, allowed {BOUND:.0e}"
    )


def reference_lse(query: Tensor, key: Tensor, valid: list[int], scale: float) -> Tensor:
    """(B, H, S) float32, natural; tiny inputs only. Rows that are no tokens get that of zero scores."""
    groups = query.shape[2] // key.shape[2]
    keys = key.float().repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), keys) * scale
    for b, count in enumerate(valid):
        scores[b, :, :, count:] = float("-inf")
    return torch.logsumexp(scores, -1)


def fused_scores(
    query: Tensor,
    key: Tensor,
    query_valid: list[int],
    key_valid: list[int],
    scale: float,
    block: int,
    lse: Tensor,
    form: Form | None = None,
) -> Tensor:
    """W, exact up to the rounding of 16-bit products summed in fp32; arguments as of `chunked_scores`."""
    query, key = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key))
    batch, q_len, heads, dim = query.shape
    k_len, kv_heads = key.shape[1], key.shape[2]
    n_q, n_k = -(-q_len // block), -(-k_len // block)
    out = query.new_zeros((batch, heads, n_q, n_k), dtype=torch.float32)
    form = form or table_form(arch_of(query.device), dim)
    if form.descriptor:
        key = for_copy_engine(key)
    valid = torch.tensor([query_valid, key_valid], dtype=torch.int32, device=query.device)
    strides = (*query.stride()[:3], *key.stride()[:3])
    unit = 8 if not any(s % 8 for s in strides) else 1
    rows = max(form.rows, block)
    grid = (-(-q_len // rows), heads, batch)
    from diffctrl.sparsed import fused_jit

    on_device = torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext()
    with on_device, Scratch(query.device) if form.descriptor else nullcontext():
        kernel: Any = fused_jit.pool
        kernel[grid](
            query, key, lse.contiguous(), valid[0], valid[1], out, scale * _LOG2E,
            *(s // unit for s in strides), q_len, k_len, heads,
            heads // kv_heads, dim, max(16, 1 << (dim - 1).bit_length()), rows, block, min(block, form.tile),
            unit, form.descriptor,
            num_warps=form.warps, num_stages=form.stages,
        )  # fmt: skip
    return out
