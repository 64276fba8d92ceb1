"""flash-attn-4 (the package `flash-attn-4`, imported as `flash_attn.cute`): dense, and over block lists on
sm90 and sm100.

What this file knows about version 4.0.0b36, and checks before it trusts:
  - On sm80 to sm89 the block lists are ignored without a word, on sm120 they are refused: lists are gated by
    arch here.
  - The end of the keys is masked in the last entry of a list only: lists must ascend (`BlockLists` sees to
    it), and with per-row lengths end with the block of the last valid key (`clipped`).
  - A partial list is mandatory, and block_size must be given, else it is guessed from the shapes.
  - Without the transposed lists the backward is wrong by orders of magnitude; over lists it is never
    deterministic ("not implemented", found on an H100).
  - A call costs 80 to 100 us of Python, more than the kernel of a short sequence. The compiled function
    behind it is called directly where the version is the one this was written for; see `_Entry`.
  - One program per query block, one program per SM: a short list does not hide its start and end. Ours does
    (`flash4_scheduled`), with the same bits, for the head dims and blocks that it was written for.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ..convert import fa4_block
from .base import Operands, Request
from .differentiable import differentiable
from .flash4_library import (
    PACKAGE,
    PreparedLists,
    installed_version,
    library,
    make_transposed,
    prepared_lists,
)

logger = logging.getLogger("diffctrl.attention")

PINNED = "4.0.0b36"
_LOCK = threading.RLock()


class Flash4Kernel:
    """`scheduled`: with `flash4_scheduled` wherever it can be; without for benchmarks and tests."""

    name = "flash4"
    specialises = True  # on lengths, lists and strides: the self-test has to see each

    def __init__(self, scheduled: bool = True) -> None:
        self.scheduled = scheduled

    def is_scheduled(self, request: Request, lists: PreparedLists | None) -> bool:
        """Whether a call runs `flash4_scheduled`. No row has to know of the others: both forms give the same
        bits (`test_gpu.py::test_the_scheduled_form_gives_the_bits_of_the_library`)."""
        if not self.scheduled or lists is None or request.arch != 90 or installed_version() != PINNED:
            return False
        return request.head_dim in (64, 128) and lists.tensors.block_size == (128, 128)

    def why_not(self, request: Request) -> str | None:
        if request.device_type != "cuda" or torch.version.hip is not None:
            return "needs an NVIDIA GPU"
        if request.arch is None or request.arch // 10 not in (9, 10):
            return f"is used on sm90 and sm100 only, not on sm{request.arch}"
        if installed_version() is None:
            return f"needs the package {PACKAGE}: pip install 'diffctrl[gpu]' (or [gpu-cu13])"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {request.dtype}"
        if request.attn_mask != "none":
            return "takes no attn_mask"
        largest = 256 if request.arch // 10 == 9 else 128
        if request.head_dim % 8 or not 8 <= request.head_dim <= largest:
            return f"takes head dims that are multiples of 8 up to {largest} here, not {request.head_dim}"
        if request.needs_grad and torch.are_deterministic_algorithms_enabled():
            return "has no checked deterministic backward, and none at all over lists"
        return _why_not_lists(request) if request.sparse else None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        if request.needs_grad:
            out, lse = differentiable(self, request, operands)
            return out, lse if request.needs_lse else None
        return self.forward(request, operands)

    def forward(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Without gradients."""
        query, key, value = operands.query, operands.key, operands.value
        lists = prepared_lists(operands, request.arch)
        scheduled = self.is_scheduled(request, lists)
        return _forward(query, key, value, operands.scale, request.needs_lse, lists, request.arch, scheduled)

    def backward(
        self, operands: Operands, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value from what the forward returned."""
        return _backward(operands, grad, out, lse)


def _why_not_lists(request: Request) -> str | None:
    assert request.arch is not None
    try:
        fa4_block(request.block, request.arch, request.head_dim)
    except ValueError as error:
        return str(error)
    if request.rule is not None:
        return f"has no element rules here, the mask has partial blocks with rule {request.rule!r}"
    if request.per_row_lengths and (request.arch // 10 != 9 or request.needs_grad):
        return "takes per-row lengths with lists in the forward on sm90 only"
    if not request.needs_grad:
        return None
    if request.arch // 10 != 9:
        return "has a checked backward over lists on sm90 only"
    rows = 128 if request.head_dim <= 64 else 64
    if request.head_dim > 128 or request.block[1] != 128 or request.block[0] % rows:
        return (
            f"has a backward over lists for head dims up to 128 with blocks (multiple of {rows}, 128), "
            f"not for head dim {request.head_dim} with {request.block}"
        )
    return None


# --- forward
# --------------------------------------------------------------------------------------------------------

_DENSE_ENTRIES: dict[tuple[Any, ...], Any] = {}


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    needs_lse: bool,
    lists: PreparedLists | None,
    arch: int | None,
    scheduled: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Gradients are handled in `differentiable`; a tensor that asks for one would change the compiled
    # function.
    query, key, value = query.detach(), key.detach(), value.detach()
    if scheduled:
        assert lists is not None
        return _scheduled(query, key, value, scale, needs_lse, lists)
    entries = _DENSE_ENTRIES if lists is None else lists.entries
    direct = arch == 90 and _direct_calls() and all(_as_the_kernel_wants(t) for t in (query, key, value))
    entry_key = (
        query.dtype, query.shape[0], query.shape[2], key.shape[2], query.shape[3], needs_lse,
        query.device.index,
    )  # fmt: skip
    entry = entries.get(entry_key) if direct else None
    if entry is not None:
        try:
            return entry(query, key, value, scale, needs_lse, None if lists is None else lists.lengths)
        except (TypeError, ValueError) as error:  # what the binding raises where arguments do not fit
            _REFUSED.append(str(error))
            logger.warning("flash-attn-4 refuses direct calls, each call now pays its Python: %s", error)
            direct = False
    if not direct:
        return _library_call(query, key, value, scale, needs_lse, lists)
    package = library()
    with _LOCK, _Recorder(package._flash_attn_fwd) as recorder:
        out, lse = _library_call(query, key, value, scale, needs_lse, lists)
    if recorder.met is not None:
        sparse = None if lists is None else _expanded(lists.tensors, query.shape[0], query.shape[2])
        entries[entry_key] = _Entry(recorder.met, sparse, package.AuxData(None, None))
    return out, lse


def _library_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, needs_lse: bool,
    lists: PreparedLists | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    kwargs: dict[str, Any] = {"softmax_scale": scale, "return_lse": needs_lse}
    if lists is not None:
        kwargs["block_sparse_tensors"] = lists.tensors
    package = library()
    function = package.flash_attn_func
    if lists is not None and lists.lengths is not None:
        function, kwargs["seqused_k"] = package.flash_attn_varlen_func, lists.lengths
    return function(query, key, value, **kwargs)


def _scheduled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, needs_lse: bool,
    lists: PreparedLists,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    library()  # first: it sees to the cache on disk
    from . import flash4_scheduled

    query, key, value = (t if _as_the_kernel_wants(t) else t.contiguous() for t in (query, key, value))
    batch, q_len, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32) if needs_lse else None
    indices, schedule = lists.dealt(batch, heads, query.device)
    function = flash4_scheduled.compiled(query, key, value, out, lse, indices, schedule)
    function(query, key, value, out, lse, scale, indices, schedule)
    return out, lse


def _as_the_kernel_wants(tensor: torch.Tensor) -> bool:
    """Last dim contiguous, 16-byte strides and base, nothing broadcast: what the public function passes on
    unchanged."""
    strides = tensor.stride()
    return (
        strides[3] == 1
        and not (strides[0] | strides[1] | strides[2]) & 7
        and 0 not in strides
        and not tensor.data_ptr() & 15
    )


_REFUSED: list[str] = []


def _direct_calls() -> bool:
    return not _REFUSED and installed_version() == PINNED


class _Recorder:
    """Stands in for the library's cache of compiled functions during one public call and notes which one it
    used."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.cache, self.met = owner, owner.compile_cache, None

    def __enter__(self) -> _Recorder:
        self.owner.compile_cache = self
        return self

    def __exit__(self, *error: object) -> None:
        self.owner.compile_cache = self.cache

    def __contains__(self, key: Any) -> bool:
        return key in self.cache

    def __setitem__(self, key: Any, function: Any) -> None:
        self.cache[key] = function

    def __getitem__(self, key: Any) -> Any:
        self.met = self.cache[key]
        return self.met


@dataclass(frozen=True, slots=True)
class _Entry:
    """A compiled forward of sm90, called as version 4.0.0b36 calls it: outputs are made here, the rest is
    fixed.

    Private to the library, so: only for the pinned version, and the self-test of the chain runs through it
    (its second and third call of a shape come here) before the kernel is used.
    """

    function: Any
    sparse: tuple[Any, ...] | None
    aux: Any

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        needs_lse: bool,
        lengths: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, q_len, heads, _ = query.shape
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = query.new_empty((batch, heads, q_len), dtype=torch.float32) if needs_lse else None
        self.function(
            query, key, value, out, lse, scale,
            None, None, None, lengths,  # cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
            None, None, None, None,  # page table, window left and right, sink
            self.sparse, self.aux, None, None,
        )  # fmt: skip
        return out, lse


def _expanded(tensors: Any, batch: int, heads: int) -> tuple[Any, ...]:
    """The lists with their shared dims expanded to B and H (stride 0, no copy), in the order of the compiled
    call."""
    lists = (
        tensors.mask_block_cnt, tensors.mask_block_idx, tensors.full_block_cnt, tensors.full_block_idx,
    )  # fmt: skip
    return (*(t.expand(batch, heads, *t.shape[2:]) for t in lists), None, None, None, None)


# --- backward
# ---------------------------------------------------------------------------------------------------------


def _backward(
    operands: Operands, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask, device = operands.mask, operands.query.device
    transposed = None
    if mask is not None:
        transposed = mask.cached(device, "flash4 backward", lambda: make_transposed(mask, device))
    dq, dk, dv = library()._flash_attn_bwd(
        operands.query.detach(), operands.key.detach(), operands.value.detach(), out, grad.contiguous(), lse,
        softmax_scale=operands.scale, block_sparse_tensors=transposed,
    )  # fmt: skip
    return dq, dk, dv


KERNEL = Flash4Kernel()
