"""Which kernel runs: a fixed order per kind of call, the first that can and that passed its self-test.

The order is `kernels/table.py`. A kernel that is passed over is noted with its reason in the stats and
logged once per process. Nothing here depends on timing or on the batch size: the same call gets the same
kernel everywhere.
"""

from __future__ import annotations

import importlib
import logging
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from .kernels.base import Kernel, Operands, Request, density_class
from .kernels.table import kernel_order
from .lists import BlockLists, normalised
from .selftest import SelfTestResult, self_test
from .stats import EngineStats

logger = logging.getLogger("diffctrl.attention")

# name -> module below kernels/, imported when first considered: some need packages that may be missing.
KERNEL_MODULES = {
    "flash4": "flash4",
    "cudnn": "cudnn",
    "sdpa": "sdpa",
    "triton": "triton_lists",
    "flex": "flex",
    "gathered": "gathered",
    "xformers": "xformers",
    "reference": "reference",
}

_LOCK = threading.RLock()
_KERNELS: dict[str, Kernel | str] = {}
_TESTED: dict[tuple[object, ...], SelfTestResult] = {}
_SELECTED: dict[tuple[Request, str, str | None, bool], Selection] = {}
# What a call looks like -> its request and choice: building and hashing a Request costs more than the rest.
_CALLS: dict[tuple[object, ...], tuple[Request, Selection]] = {}
_LOGGED: set[str] = set()


@dataclass(frozen=True, slots=True)
class Selection:
    """The kernel of a call, and those before it in the order with the reasons against them."""

    kernel: Kernel
    rejected: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One row of `diffctrl doctor`."""

    name: str
    works: bool
    reason: str | None
    error: float | None


def register(name: str, kernel: Kernel | None) -> None:
    """Puts `kernel` in the place of `name` (None: the built-in one again) and forgets its verdicts."""
    with _LOCK:
        _KERNELS.pop(name, None)
        if kernel is not None:
            _KERNELS[name] = kernel
        _SELECTED.clear()
        _CALLS.clear()
        for key in [key for key in _TESTED if key[0] == name]:
            del _TESTED[key]


def load(name: str) -> Kernel | str:
    """The kernel of that name, or the reason why its file does not load."""
    with _LOCK:
        if name not in _KERNELS:
            if name not in KERNEL_MODULES:
                raise ValueError(f"kernel {name!r} is not known; accepted are {', '.join(KERNEL_MODULES)}.")
            try:
                module = importlib.import_module(f".kernels.{KERNEL_MODULES[name]}", __package__)
                _KERNELS[name] = module.KERNEL
            except ImportError as error:
                _KERNELS[name] = f"does not load: {error}"
        return _KERNELS[name]


def request_for(operands: Operands, *, needs_lse: bool = False, needs_grad: bool = False) -> Request:
    query, key, mask, attn_mask = operands.query, operands.key, operands.mask, operands.attn_mask
    fields = {} if mask is None else mask.cached("cpu", "request", lambda: _mask_fields(mask))
    return Request(
        device_type=query.device.type,
        arch=arch_of(query.device),
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        q_len=query.shape[1],
        k_len=key.shape[1],
        head_dim=query.shape[3],
        needs_lse=needs_lse,
        needs_grad=needs_grad,
        attn_mask="none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "additive",
        **fields,
    )


def _mask_fields(mask: BlockLists) -> dict[str, Any]:
    return {
        "sparse": True,
        "block": mask.block,
        "density_class": density_class(mask.kernel_density()),
        "shared_heads": mask.counts.shape[1] == 1,
        "shared_batch": mask.counts.shape[0] == 1,
        "per_row_lengths": mask.n_valid is not None,
        "rule": None if mask.rule is None else mask.rule.kind,
        "allows_empty": mask.has_empty_rows,
    }


def arch_of(device: torch.device) -> int | None:
    """major * 10 + minor of the compute capability of a CUDA device."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def select_kernel(
    request: Request, device: torch.device | str = "cpu", *, kernel: str | None = None
) -> Selection:
    """The kernel for `request` on `device`; with `kernel`, that one or an error, never another.

    Raises:
        ValueError: the forced kernel is unknown or cannot take the call.
        RuntimeError: the forced kernel failed its self-test, or no kernel can take the call.
    """
    device = normalised(torch.device(device))
    deterministic = request.needs_grad and torch.are_deterministic_algorithms_enabled()
    key = (request, str(device), kernel, deterministic)
    with _LOCK:
        found = _SELECTED.get(key)
        if found is None:
            found = _forced(kernel, request, device) if kernel is not None else _first(request, device)
            if len(_SELECTED) >= 4096:  # a server meets many lengths; choosing again is cheap
                _SELECTED.clear()
            _SELECTED[key] = found
        return found


def choose(
    operands: Operands, *, needs_lse: bool, needs_grad: bool, kernel: str | None
) -> tuple[Request, Selection]:
    """`request_for` and `select_kernel`, remembered for calls that look alike."""
    query, mask, attn_mask = operands.query, operands.mask, operands.attn_mask
    fields = None if mask is None else mask.cached("cpu", "fields", lambda: tuple(_mask_fields(mask).items()))
    key = (
        query.device, query.dtype, query.shape, operands.key.shape, needs_lse, needs_grad,
        None if attn_mask is None else attn_mask.dtype, fields, kernel,
        needs_grad and torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    found = _CALLS.get(key)
    if found is None:
        request = request_for(operands, needs_lse=needs_lse, needs_grad=needs_grad)
        found = request, select_kernel(request, query.device, kernel=kernel)
        if len(_CALLS) >= 4096:
            _CALLS.clear()
        _CALLS[key] = found
    return found


def _forced(name: str, request: Request, device: torch.device) -> Selection:
    kernel = load(name)
    if isinstance(kernel, str):
        raise ValueError(f"kernel {name!r} {kernel}. Leave kernel=None for the best one that works here.")
    reason = kernel.why_not(request)
    if reason is not None:
        raise ValueError(f"kernel {name!r} {reason}. Leave kernel=None for the best one that works here.")
    result = tested(name, kernel, request, device)
    if not result.ok:
        raise RuntimeError(f"kernel {name!r} is refused: {result.reason}.")
    return Selection(kernel)


def _first(request: Request, device: torch.device) -> Selection:
    rejected: list[tuple[str, str]] = []
    for name in kernel_order(request):
        kernel = load(name)
        reason = kernel if isinstance(kernel, str) else kernel.why_not(request)
        if reason is None and not isinstance(kernel, str):
            result = tested(name, kernel, request, device)
            if result.ok:
                return Selection(kernel, tuple(rejected))
            reason = result.reason
        rejected.append((name, reason or "unknown reason"))
    reasons = "; ".join(f"{name} {reason}" for name, reason in rejected)
    raise RuntimeError(f"No attention kernel can take this call on {device}: {reasons}.")


def tested(name: str, kernel: Kernel, request: Request, device: torch.device) -> SelfTestResult:
    """The self-test's verdict for this kind of request on this device, from the first time it was asked."""
    if name == "reference":
        return SelfTestResult(None, 0.0)
    key = (
        name, str(device), request.dtype, request.head_dim, request.sparse, request.block, request.needs_lse,
        request.needs_grad, request.heads != request.kv_heads, request.shared_heads, request.shared_batch,
        request.per_row_lengths, request.rule, request.allows_empty,
    )  # fmt: skip
    with _LOCK:
        result = _TESTED.get(key)
        if result is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"Kernel {name!r} meets this kind of call for the first time while a CUDA graph is "
                    "captured, and its self-test cannot run there. Run the model once before the capture."
                )
            result = _TESTED[key] = self_test(kernel, replace(request, attn_mask="none"), device)
        return result


def note(selection: Selection, stats: EngineStats | None) -> None:
    """Counts the kernels that were passed over."""
    for name, reason in selection.rejected:
        note_fallback(f"{selection.kernel.name} instead of {name}, which {reason}", stats)


def note_fallback(text: str, stats: EngineStats | None) -> None:
    """Counts a fallback, and logs it once per process."""
    if stats is not None:
        stats.record_fallback(text)
    if text not in _LOGGED:
        _LOGGED.add(text)
        logger.warning("Attention runs on %s", text)


def kernel_report(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, head_dim: int = 64
) -> list[KernelReport]:
    """What `diffctrl doctor` prints: each kernel, whether it works here or why not, its self-test error."""
    device = normalised(torch.device(device))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = []
    for name in KERNEL_MODULES:
        if name == "reference":
            continue
        kernel = load(name)
        if isinstance(kernel, str):
            rows.append(KernelReport(name, False, kernel, None))
            continue
        reasons = []
        for sparse in (True, False):
            request = Request(
                device.type, arch_of(device), dtype, 1, 3, 3, 389, 389, head_dim,
                sparse=sparse, block=(128, 128) if sparse else (0, 0), shared_batch=sparse,
            )  # fmt: skip
            reasons.append((kernel.why_not(request), request))
        usable = [request for reason, request in reasons if reason is None]
        if not usable:
            # The telling reason concerns what the kernel is for: neither "dense only" nor "lists only".
            texts = [reason for reason, _ in reasons if reason]
            text = next((t for t in texts if "block lists" not in t), texts[0])
            rows.append(KernelReport(name, False, text, None))
            continue
        result = tested(name, kernel, usable[0], device)
        rows.append(KernelReport(name, result.ok, result.reason, result.error))
    return rows
