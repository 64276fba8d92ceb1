"""Block-sparse attention by compiled FlexAttention. Never eager: that ignores the lists and runs dense."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .base import Operands, Request


@dataclass(frozen=True, slots=True)
class FlexForm:
    """How the forward on a GPU is compiled; None: the table's (`_forward_options`).

    rows, tile, warps, stages: BLOCK_M, BLOCK_N (at most), num_warps and num_stages of torch's template.
    whole: lengths that are multiples of 128 get a kernel without bounds checks; torch sees that for itself
    only where lengths are constants, with a compilation for each. descriptors: loads by the copy engine (sm90
    on). dynamic: lengths are variables of the compiled code.
    """

    rows: int | None = None
    tile: int | None = None
    warps: int | None = None
    stages: int | None = None
    whole: bool = False
    descriptors: bool = False
    dynamic: bool = True

    @property
    def label(self) -> str:
        sizes = (("m", self.rows), ("n", self.tile), ("w", self.warps), ("s", self.stages))
        flags = (("whole", self.whole), ("desc", self.descriptors), ("static", not self.dynamic))
        named = [f"{letter}{size}" for letter, size in sizes if size is not None]
        return "-".join(["flex", *named, *(name for name, on in flags if on)])


class FlexKernel:
    """`form` other than the default: for benchmarks."""

    name = "flex"

    def __init__(self, form: FlexForm = FlexForm()) -> None:
        self.form = form

    def why_not(self, request: Request) -> str | None:
        if not request.sparse:
            return "is used for block lists only"
        if request.rule is not None and request.per_row_lengths:
            return "holds one element rule: n_valid beside partial blocks does not fit"
        if request.device_type == "cpu":
            return _why_not_cpu(request)
        if request.device_type != "cuda":
            return f"runs on CUDA GPUs and CPUs, not on {request.device_type}"
        if request.arch is not None and request.arch < 80:
            return f"needs compute capability 8.0 or newer, not sm{request.arch}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16 on a GPU, not {request.dtype}"  # float32 would run in TF32
        if request.head_dim < 16:
            return f"needs a head dim of at least 16, not {request.head_dim}"
        if _largest(request.block[0], 128) is None or _largest(request.block[1], 64) is None:
            return f"needs blocks that are multiples of 16, not {request.block}"
        if request.needs_grad and (request.block[0] % 128 or request.block[1] % 128):
            return f"has a backward for blocks that are multiples of 128 only, not {request.block}"
        return None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask, device = operands.mask, operands.query.device
        assert mask is not None
        backward = request.needs_grad
        block_mask = mask.cached(device, f"flex {backward}", lambda: mask.to_flex(device, backward=backward))
        q, k, v = (t.transpose(1, 2) for t in (operands.query, operands.key, operands.value))
        options = _kernel_options(request, self.form)
        kind = (*_kind(request), *(options or {}).items())
        run = compiled_flex(str(device), request.dtype, request.head_dim, kind, self.form.dynamic)
        # FlexAttention takes the scale as a float: one graph per value. Grad mode is a guard of dynamo's, so
        # it is set to what matters; the self-test's graph is then the one that real calls run.
        with torch.set_grad_enabled(request.needs_grad):
            out, lse = run(
                q,
                k,
                v,
                block_mask,
                operands.scale,
                request.heads != request.kv_heads,
                request.needs_lse,
                options,
            )
        return out.transpose(1, 2), lse.contiguous() if lse is not None else None


def _why_not_cpu(request: Request) -> str | None:
    if request.needs_grad:
        return "has no backward on a CPU"
    if request.needs_lse:
        return "returns no log-sum-exp on a CPU"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16 on a CPU, not {request.dtype}"
    return None


def _kind(request: Request) -> tuple[Any, ...]:
    """What makes dynamo compile anew: each kind gets a function, and a recompile budget, of its own."""
    return (request.block, request.rule, request.per_row_lengths, request.needs_lse, request.needs_grad,
            request.shared_heads, request.shared_batch, request.heads == request.kv_heads)  # fmt: skip


def _flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: Any,
    scale: float,
    grouped: bool,
    needs_lse: bool,
    options: dict[str, Any] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    kwargs: dict[str, Any] = {"block_mask": block_mask, "scale": scale, "enable_gqa": grouped}
    if options is not None:
        kwargs["kernel_options"] = options
    if not needs_lse:
        return flex_attention(q, k, v, **kwargs), None
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **kwargs)
    return out, aux.lse


@functools.cache
def compiled_flex(
    device: str, dtype: torch.dtype, head_dim: int, kind: tuple[Any, ...], dynamic: bool = True
) -> Callable[..., Any]:
    """A compiled `_flex` with a code object of its own.

    fullgraph: on reaching the recompile limit this raises, where the default would run FlexAttention
    eagerly, that is densely, and say nothing. The limit counts per code object, hence the copy.
    """
    copy = types.FunctionType(_flex.__code__.replace(), _flex.__globals__, f"flex_{head_dim}")
    # dynamic: the shapes of the self-test and those of the call run the very same code, compiled once.
    return torch.compile(copy, fullgraph=True, dynamic=dynamic)


def _kernel_options(request: Request, form: FlexForm) -> dict[str, Any] | None:
    """The kernel's tiles must divide the mask's blocks.

    BACKEND: short queries would otherwise take the decoding kernel, which the self-test does not see.
    """
    if request.device_type != "cuda":
        return None
    rows, tile, warps, stages = _forward_options(request)
    options: dict[str, Any] = {
        "BACKEND": "TRITON",
        "fwd_BLOCK_M": _largest(request.block[0], form.rows or rows),
        "fwd_BLOCK_N": _largest(request.block[1], form.tile or tile),
    }
    if (warps := form.warps or warps) is not None:
        options["fwd_num_warps"] = warps
    if (stages := form.stages or stages) is not None:
        options["fwd_num_stages"] = stages
    if form.whole and request.q_len % 128 == 0 and request.k_len % 128 == 0:
        options["IS_DIVISIBLE"] = True
    if form.descriptors:
        options["fwd_USE_TMA"] = True
    return options


def _forward_options(request: Request) -> tuple[int, int, int | None, int | None]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages), None where torch's choice stands.

    Read from the assembler for sm90, torch 2.11 and Triton 3.6, lengths as variables: at head dim 128 the
    128 x 64 tiles spill 588 bytes with 4 warps, and none with 8 (244 registers); with 4 they ran at half the
    rate (190 TFLOP/s at 4.6k, dense). At head dims up to 64 four warps spill nothing (255).
    """
    if request.head_dim > 128:
        return 64, 64, None, 2
    if request.needs_grad:
        return 128, 64, None, None
    return 128, 64, 4 if request.head_dim <= 64 else 8, 3


def _largest(block: int, limit: int) -> int | None:
    return next((tile for tile in (128, 64, 32, 16) if tile <= limit and block % tile == 0), None)


KERNEL = FlexKernel()
