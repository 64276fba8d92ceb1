"""QK norm and rotary embedding: in plain torch, or both in one read and one write of the states, in Triton.

The host side: when the fused kernel may run, its launch, and the self-test that it passes before its first
use. The device code is in `rotary_jit`, which is imported on first use because triton may be missing.
"""

from __future__ import annotations

import functools
import logging
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from diffctrl.attention.kernels.triton_runtime import arch_of, interpreted, with_triton

logger = logging.getLogger("diffctrl.families")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Norm class -> whether it rounds to the states' dtype before it multiplies by the weight, and not only after.
_NORMS: dict[type, bool] = {RMSNorm: True, MochiRMSNorm: False, nn.RMSNorm: False}
# Channels of a token: beyond, a program's registers do not hold them.
_MOST = 8192
_UNIT = 8  # elements, as in `rotary_jit`
_LOCK = threading.RLock()
_VERDICTS: dict[Form, str | None] = {}


@dataclass(frozen=True, slots=True)
class Form:
    """What the device code is compiled for, and tested for before its first use.

    Attributes:
        device, dtype, heads, dim: of the states.
        norm: the norm's class, or None.
        weighted: whether the norm has a weight.
        across_heads, pairs: as of `normed_and_rotated`.
        rotary: whether some tokens are turned.
        per_head: whether each head has tables of its own.
    """

    device: str
    dtype: torch.dtype
    heads: int
    dim: int
    norm: type | None = None
    weighted: bool = False
    across_heads: bool = False
    rotary: bool = False
    pairs: bool = False
    per_head: bool = False

    @property
    def tiles(self) -> tuple[int, int]:
        """Heads in two powers of two, the second 0 where one of them wastes less than a quarter."""
        whole = 1 << (self.heads - 1).bit_length()
        if 4 * self.heads > 3 * whole or whole == 1:
            return whole, 0
        rest = self.heads - whole // 2
        return whole // 2, 1 << (rest - 1).bit_length()

    @property
    def warps(self) -> int:
        """As few as leave a thread 40 channels: loads of 16 bytes in flight, and registers to spare."""
        channels = sum(self.tiles) * self.padded
        return next(warps for warps in (1, 2, 4, 8) if channels <= 40 * 32 * warps or warps == 8)

    @property
    def padded(self) -> int:
        """The head dim as a power of two."""
        return 1 << (self.dim - 1).bit_length()


def normed(norm: nn.Module | None, states: Tensor) -> Tensor:
    """The states (B, S, H, D) through a norm over each head, which some models of a family lack."""
    return normed_and_rotated(norm, states)


def normed_and_rotated(
    norm: nn.Module | None,
    states: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    first: int = 0,
    stop: int | None = None,
    across_heads: bool = False,
    pairs: bool = False,
) -> Tensor:
    """The states through their norm, and a range of tokens through the rotary embedding.

    On a CUDA device, in eager mode and without gradients, a norm that is known here and the rotary embedding
    run as one kernel, which rounds where plain torch rounds: the results differ by the order in which a row's
    squares are added. Everything else runs in plain torch, module and hooks included.

    Args:
        norm: the norm's module, or None.
        states: (B, S, H, D).
        cos, sin: (B or 1, stop - first, H or 1, D), the tables of the tokens that are turned; None for no
            rotary embedding. The other tokens keep their values.
        first, stop: the range of tokens that is turned; without `stop` to the end.
        across_heads: whether the norm gets (B, S, H * D) instead of (B, S, H, D).
        pairs: whether both channels of a pair take the even one's cosine and the odd one's sine, in the dtype
            that states and tables promote to (Wan); else each channel has its own, in float32.

    Returns:
        (B, S, H, D) in the dtype that the norm gives.

    Raises:
        RuntimeError: the tables are not of as many tokens as the range.
    """
    reason = why_not(norm, states, cos, sin, first=first, stop=stop, across_heads=across_heads)
    if reason is None:
        form = Form(str(states.device), states.dtype, states.shape[2], states.shape[3])
        if norm is not None:
            weighted = norm.weight is not None
            form = replace(form, norm=type(norm), weighted=weighted, across_heads=across_heads)
        if cos is not None:
            form = replace(form, rotary=True, pairs=pairs, per_head=cos.shape[2] > 1)
        reason = refused(form)
        if reason is None:
            return fused(form, norm, states, cos, sin, first)
    if states.is_cuda and not torch.compiler.is_compiling():
        _say(reason)
    return plain(norm, states, cos, sin, first=first, stop=stop, across_heads=across_heads, pairs=pairs)


def plain(
    norm: nn.Module | None,
    states: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    first: int = 0,
    stop: int | None = None,
    across_heads: bool = False,
    pairs: bool = False,
) -> Tensor:
    """`normed_and_rotated` as the stock models compute it, pass by pass."""
    if norm is not None and across_heads:
        states = norm(states.flatten(2)).unflatten(-1, states.shape[2:])
    elif norm is not None:
        states = norm(states)
    if cos is None or sin is None:
        return states
    turn = rotated_pairs if pairs else rotated
    if first == 0 and (stop is None or stop == states.shape[1]):
        return turn(states, cos, sin)
    stop = states.shape[1] if stop is None else stop
    parts = states[:, :first], turn(states[:, first:stop], cos, sin), states[:, stop:]
    return torch.cat([part for part in parts if part.shape[1]], dim=1)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs, in float32; cos and sin broadcast to the states."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (states.float() * cos + turned.float() * sin).to(states.dtype)


def rotated_pairs(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the dtype that the states and the tables promote to, as Wan has it."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(states)


@functools.cache
def _say(reason: str) -> None:
    """Once for each reason: the same result, more slowly."""
    logger.info("QK norm and rotary embedding run in plain torch: the fused kernel %s", reason)


# --- when the kernel may run --------------------------------------------------------------------------------


def why_not(
    norm: nn.Module | None,
    states: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    first: int = 0,
    stop: int | None = None,
    across_heads: bool = False,
) -> str | None:
    """None where the kernel can take this call, else the reason; without the self-test. Arguments as of
    `normed_and_rotated`."""
    # First of all, so that nothing below is traced: inductor fuses the plain passes itself.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "is left to the compiler"
    if norm is None and cos is None:
        return "has nothing to do"
    return (
        _why_not_here(states)
        or _why_not_states(states)
        or (None if norm is None else _why_not_norm(norm, states, across_heads))
        or (None if cos is None or sin is None else _why_not_tables(states, cos, sin, first, stop))
        or _why_not_gradients(states, cos, sin, None if norm is None else norm.weight)
    )


def _why_not_here(states: Tensor) -> str | None:
    if type(states) is not Tensor:
        return f"takes plain tensors, not {type(states).__name__}"
    if not with_triton():
        return "needs triton, which is not installed"
    if states.device.type != "cuda" and not (states.device.type == "cpu" and interpreted()):
        return f"runs on CUDA GPUs, not on {states.device.type}"
    if torch.version.hip is not None:
        return "was not written for ROCm"
    arch = arch_of(states.device)
    if arch < 80:
        return f"needs compute capability 8.0 or newer, not sm{arch}"
    if torch.is_autocast_enabled(states.device.type):
        return "knows no autocast"  # which changes the dtype that a norm gives
    if maybe_current_level() is not None:
        return "knows no transform of functorch"
    if torch.autograd.forward_ad._current_level >= 0:
        return "knows no forward-mode derivatives"
    if _get_current_dispatch_mode() is not None:
        return "would hide its operators from a dispatch mode"
    return None


def _why_not_states(states: Tensor) -> str | None:
    if states.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, not {states.dtype}"
    if states.ndim != 4 or not states.numel() or states.shape[:2].numel() >= 1 << 31:  # programs of a launch
        return f"takes states (B, S, H, D) that are not empty, not {tuple(states.shape)}"
    heads, dim = states.shape[2:]
    if dim % _UNIT or heads * (1 << (dim - 1).bit_length()) > _MOST:
        return f"takes head dims that are multiples of {_UNIT} and {_MOST} channels, not {heads} x {dim}"
    return None if _aligned(states) else "reads 16 bytes at a time, and these states are not aligned to them"


def _why_not_norm(norm: nn.Module, states: Tensor, across_heads: bool) -> str | None:
    if type(norm) not in _NORMS:
        return f"knows {', '.join(sorted(kind.__name__ for kind in _NORMS))}, not {type(norm).__name__}"
    # Offloading and the like replace `forward` of the instance.
    if "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks or _has_any_global_hook():
        return "would skip the hooks of the norm"
    if norm._compiled_call_impl is not None:
        return "would skip what the norm was compiled to"
    if not isinstance(norm.eps, float):
        return "needs an eps of its own in the norm"
    row = states.shape[2] * states.shape[3] if across_heads else states.shape[3]
    if tuple(getattr(norm, "normalized_shape", (row,))) != (row,):
        return f"norms rows of {row} channels"
    if getattr(norm, "bias", None) is not None:
        return "knows no bias"
    weight = norm.weight
    if weight is None:
        return None
    if type(weight) not in (nn.Parameter, Tensor) or weight.device != states.device:
        return "takes a plain weight on the device of the states"
    if weight.dtype != states.dtype or weight.shape != (row,) or not weight.is_contiguous():
        return f"takes a weight of {row} x {states.dtype}"
    return None if weight.data_ptr() % 16 == 0 else "reads 16 bytes of the weight at a time"


def _why_not_tables(states: Tensor, cos: Tensor, sin: Tensor, first: int, stop: int | None) -> str | None:
    batch, tokens, heads, dim = states.shape
    for table in (cos, sin):
        if type(table) is not Tensor or table.dtype != torch.float32 or table.device != states.device:
            return "takes tables in float32 on the device of the states"
        if table.ndim != 4 or table.shape != cos.shape or table.stride() != cos.stride():
            return "takes tables (B or 1, R, H or 1, D) of the same shape and strides"
        if not _aligned(table):
            return "reads 16 bytes of the tables at a time"
    b, count, h, d = cos.shape
    fits = 0 <= first < first + count <= tokens and first + count == (tokens if stop is None else stop)
    if b not in (1, batch) or h not in (1, heads) or d != dim or not fits:
        return f"has no place for tables {tuple(cos.shape)} from token {first} of {tuple(states.shape)}"
    return None


def _why_not_gradients(*tensors: Tensor | None) -> str | None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "has no gradients"
    return None


def _aligned(tensor: Tensor) -> bool:
    """Whether each row of channels is contiguous and starts at 16 bytes."""
    steps = (stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    *outer, inner = (*steps,) or (1,)
    return inner == 1 and not any(step % _UNIT for step in outer) and tensor.data_ptr() % 16 == 0


def fused(
    form: Form, norm: nn.Module | None, states: Tensor, cos: Tensor | None, sin: Tensor | None, first: int
) -> Tensor:
    """`normed_and_rotated` in one pass, for what `why_not` lets through; (B, S, H, D), contiguous."""
    batch, tokens, heads, dim = states.shape
    out = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    count, steps = 0, [0, 0, 0]
    if cos is not None:  # an axis of size 1 is shared
        count = cos.shape[1]
        steps = [cos.stride(axis) // _UNIT if cos.shape[axis] > 1 else 0 for axis in range(3)]
    # Without tables or a weight, the states stand in as a pointer that is not read.
    weight: Any = states if norm is None or norm.weight is None else norm.weight
    from diffctrl.families import rotary_jit

    on_device = torch.cuda.device(states.device) if states.device.type == "cuda" else nullcontext()
    with on_device:
        kernel: Any = rotary_jit.norm_rotate
        kernel[(batch * tokens,)](
            states, out, weight, states if cos is None else cos, states if sin is None else sin,
            0.0 if norm is None else norm.eps,
            *(step // _UNIT for step in states.stride()[:3]), *steps, tokens, first, count,
            heads, dim, form.padded, *form.tiles,
            form.norm is not None, form.norm is not None and _NORMS[form.norm], form.across_heads,
            form.weighted, form.rotary, form.pairs, form.per_head,
            num_warps=form.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def refused(form: Form) -> str | None:
    """None where the kernel may be used, else the reason; the first call of a form runs the self-test."""
    with _LOCK:
        if form not in _VERDICTS:
            if form.device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
                return "cannot be tested while a CUDA graph is captured"  # the next call may
            _VERDICTS[form] = verdict = self_test(form)
            if verdict is not None:
                logger.warning("QK norm and rotary embedding run in plain torch for %s: %s", form, verdict)
        return _VERDICTS[form]


def self_test(form: Form) -> str | None:
    """Compares small states with `plain`; None or what is wrong."""
    try:
        with torch.no_grad():
            return _tested(form)
    except Exception as error:  # whatever a kernel raises is the reason why it is refused
        lines = str(error).strip().splitlines() or [""]
        return f"self-test raised {type(error).__name__}: {lines[0][:300]}"


def _tested(form: Form) -> str | None:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, dtype: torch.dtype = form.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return drawn.to(form.device, dtype)

    norm: Any = None
    if form.norm is not None:
        row = form.heads * form.dim if form.across_heads else form.dim
        norm = form.norm(row, eps=1e-6, elementwise_affine=form.weighted)
        if form.weighted:
            norm.weight = nn.Parameter(draw(row), requires_grad=False)
    states, tables, first = draw(2, 6, form.heads, form.dim), (None, None), 2
    if form.rotary:
        shape = 1, 3, form.heads if form.per_head else 1, form.dim
        tables = draw(*shape, dtype=torch.float32), draw(*shape, dtype=torch.float32)
    got = fused(form, norm, states, *tables, first)
    across, pairs = form.across_heads, form.pairs
    expected = plain(norm, states, *tables, first=first, stop=5, across_heads=across, pairs=pairs)
    return difference(got, expected)


def difference(got: Tensor, expected: Tensor) -> str | None:
    """None where they differ by no more than another order of adding squares makes them; else by how much.

    In 16 bits a value that another order moves lands on the neighbouring one, which is rare, and what it is
    turned into may round otherwise too; a product that is rounded elsewhere moves a tenth of all.
    """
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    off = float((got.double() - expected.double()).abs().max()) / (scale or 1.0)
    narrow = got.dtype != torch.float32
    bound = 2 * torch.finfo(got.dtype).eps if narrow else 1e-6
    if not off <= bound:
        return f"off by {off:.1e} of the largest value, allowed {bound:.1e}"
    moved = float((got != expected).double().mean())
    return None if not narrow or moved <= 0.01 else f"{moved:.1%} of the values differ, allowed 1%"
