"""Block-sparse attention in Triton over per-(batch row, head) key block lists: bf16 and fp16, sm80 and newer,
with a backward (`triton_grad`).

The host side: which variant and tile (a static table, never timed in the user's process: another winner would
mean another rounding and so other latents for the same seed) and the launch. The device code is
in `triton_lists_jit`, which is imported on first use because triton may be missing.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..lists import BlockLists
from .base import Operands, Request
from .differentiable import differentiable
from .triton_grad import LARGEST_HEAD_DIM, gradients
from .triton_runtime import arch_of, interpreted, on_device, power_of_two_divisor, with_triton

_LOG2E = math.log2(math.e)
_DTYPES = (torch.bfloat16, torch.float16)
# Below this many queries the programs of one call fit on the card a few times over: there the heaviest rows
# start first.
ORDERED_BELOW = 16384


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of the kernel.

    descriptor: loads by the bulk copy engine (sm90 on), else by pointers. specialize: loads in a warp group
    of their own (descriptor and 4 warps; see `fitted`). rows: BM, query rows of a program at most. tile: BN,
    key tokens of a step at most. warps, stages: as Triton's num_warps, num_stages.
    """

    descriptor: bool = False
    specialize: bool = False
    rows: int = 128
    tile: int = 64
    warps: int = 4
    stages: int = 2

    @property
    def label(self) -> str:
        kind = "desc" if self.descriptor else "ptr"
        rows = "" if self.rows == 128 else f"m{self.rows}-"
        return f"{kind}{'-ws' if self.specialize else ''}-{rows}n{self.tile}-w{self.warps}-s{self.stages}"


HOPPER = Variant(descriptor=True, specialize=True, tile=128)  # at head dims 64 and 128
# What the benchmark measures beside it: the order may be another one under another Triton.
HOPPER_CANDIDATES = (
    Variant(descriptor=True),
    Variant(descriptor=True, specialize=True),
    Variant(descriptor=True, tile=128, warps=8),
)


def table_variant(arch: int, head_dim: int, block: tuple[int, int]) -> Variant:
    """The variant for a card, a head dim and a block: a function of nothing else, so that a seed keeps its
    latents.

    Measured on an H100 and an H200 (table in `table`): the copy engine, which is used where no column is
    padded, beats pointers by 15 to 28 % at head dim 128; loads in a warp group of their own with tiles of 128
    gain another 5 to 20 % on long lists. 32 rows leave half of four warps without work (head dim 32: two take
    0.8 of the time, forward and backward). Registers and shared memory were read from the assembler
    (tests/attention/test_triton_compile.py keeps them so). Outside Hopper and sm100 a program may have 99 KB,
    and 8 warps avoid spilled registers.
    """
    large = arch // 10 in (9, 10)
    if head_dim > 128:
        return Variant(tile=64 if large else 16, warps=8)
    if not large:
        return Variant(tile=64 if head_dim <= 64 else 32, warps=8)
    if arch // 10 == 9 and head_dim <= 32 and max(block) <= 32:
        return Variant(warps=2)
    return HOPPER if arch // 10 == 9 and head_dim in (64, 128) else Variant()


class TritonListsKernel:
    """`variant` overrides the table; for benchmarks and tests."""

    name = "triton"
    specialises = True  # on lengths, lists and strides: the self-test has to see each

    def __init__(self, variant: Variant | None = None) -> None:
        self.variant = variant

    def why_not(self, request: Request) -> str | None:
        if not request.sparse:
            return "is used for block lists only"
        if not with_triton():
            return "needs triton, which is not installed"
        if request.device_type != "cuda" and not interpreted():
            return f"runs on CUDA GPUs, not on {request.device_type}"
        if request.arch is not None and request.arch < 80:
            return f"needs compute capability 8.0 or newer, not sm{request.arch}"
        if torch.version.hip is not None:
            return "was not measured on ROCm"
        if request.dtype not in _DTYPES:
            return f"takes bfloat16 and float16, not {request.dtype}"
        if request.needs_grad and request.head_dim > LARGEST_HEAD_DIM:
            return f"has a backward for head dims up to {LARGEST_HEAD_DIM}, not {request.head_dim}"
        if request.rule is not None:
            return f"has no element rules, the mask has partial blocks with rule {request.rule!r}"
        if request.head_dim % 8 or not 16 <= request.head_dim <= 256:
            return f"takes head dims that are multiples of 8 from 16 to 256, not {request.head_dim}"
        if request.block[0] % 16 or request.block[1] % 16:
            return f"needs blocks that are multiples of 16, not {request.block}"
        return None

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        if request.needs_grad:
            out, lse = differentiable(self, request, operands)
        else:
            out, lse = self.forward(request, operands)
        return out, lse if request.needs_lse else None

    def backward(
        self, operands: Operands, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value from what the forward returned."""
        return gradients(operands, grad, out, lse)

    def forward(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """Without gradients; lse is empty where nobody wants it."""
        mask, device = operands.mask, operands.query.device
        assert mask is not None
        if mask.n_valid is not None:  # a loop over the list in the kernel would keep it from specialising
            mask = mask.cached("cpu", "triton clipped", mask.clipped)
        lists = mask.on(device)
        order = None
        if request.q_len < ORDERED_BELOW:
            key = f"triton order {request.heads}"
            order = mask.cached(device, key, lambda: (heavy_first(mask, request.heads, device),))[0]
        return launch(
            operands.query, operands.key, operands.value, lists.counts, lists.indices, lists.n_valid, order,
            lists.block, operands.scale, request.needs_lse, self.variant,
        )  # fmt: skip


def heavy_first(mask: BlockLists, heads: int, device: torch.device) -> torch.Tensor | None:
    """Row order for the launch, int32 (Bm, H * NQ) of pairs h * NQ + q by falling count; None where all are
    equal.

    Without it a long list that happens to start last is the time of the whole call. Ties keep their order, so
    that programs that run together share the keys of a head.
    """
    if int(mask.counts.min()) == int(mask.counts.max()):
        return None
    counts = mask.counts.expand(-1, heads, -1).flatten(1)
    return torch.argsort(counts, dim=1, descending=True, stable=True).to(device, torch.int32)


def _outputs(query: torch.Tensor, needs_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_len, heads, dim = query.shape
    out = query.new_empty((batch, q_len, heads, dim))
    lse = query.new_empty((batch, heads, q_len) if needs_lse else (0,), dtype=torch.float32)
    return out, lse


# --- the launch
# -----------------------------------------------------------------------------------------------

# Constants and alignment of a call -> the compiled kernel. Triton looks its own cache up through all
# arguments, which costs more than the whole launch of a short sequence; everything that it specialises on is
# in this key.
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    n_valid: torch.Tensor | None,
    order: torch.Tensor | None,
    block: tuple[int, int],
    scale: float,
    needs_lse: bool,
    variant: Variant | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (B, Sq, H, D), key and value (B, Sk, Hkv, D), last dim contiguous or copied; counts int32
    (Bm, Hm, NQ), indices int32 (Bm, Hm, NQ, W), n_valid int32 (B,) where no list holds a block past it, order
    int32 (Bm, H * NQ).

    Returns out (B, Sq, H, D) contiguous and lse fp32 (B, H, Sq), empty unless `needs_lse`.
    """
    if scale < 0:  # the running maximum is taken before scaling
        query, scale = -query, -scale
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    if key.shape[1] < 16:  # no tile is smaller; the tail mask hides what is added
        return _padded(query, key, value, counts, indices, n_valid, order, block, scale, needs_lse, variant)
    batch, q_len, heads, dim = query.shape
    k_len = key.shape[1]
    out, lse = _outputs(query, needs_lse)
    if out.numel() == 0:
        return out, lse
    if variant is None:
        variant = table_variant(arch_of(query.device), dim, block)
    if variant.descriptor:
        query, key, value = (for_copy_engine(t) for t in (query, key, value))
    tensors = (
        query, key, value, out, lse if needs_lse else out, counts, indices,
        counts if n_valid is None else n_valid, counts if order is None else order,
    )  # fmt: skip
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    misaligned = 0
    for tensor in tensors:
        misaligned |= tensor.data_ptr()
    unit = 8 if not any(s % 8 for s in strides) else 1
    variant, shape = fitted(variant, block, k_len, dim)
    consts = (
        heads // key.shape[2], dim, *shape,
        counts.shape[0] > 1, counts.shape[1] > 1, needs_lse, n_valid is not None,
        n_valid is not None or k_len % block[1] != 0, order is not None,
        unit, not variant.descriptor and strides[4] == strides[7],
    )  # fmt: skip
    if variant.descriptor:
        consts += (variant.specialize,)
    if order is None:
        grid = (-(-q_len // shape[1]), heads, batch)
    else:
        grid = (counts.shape[2] * shape[2] * heads, 1, batch)
    scalars = (scale * _LOG2E, *(s // unit for s in strides), indices.shape[3], q_len, k_len, heads)
    small = max(strides) < 2**31
    cache_key = (query.device.index, query.dtype, variant, consts) if small and not misaligned % 16 else None
    with on_device(query.device), _scratch(query.device, variant):
        _enqueue(variant, cache_key, grid, (*tensors, *scalars, *consts))
    return out, lse


def for_copy_engine(tensor: torch.Tensor) -> torch.Tensor:
    """Strides and base in units of 16 bytes, by a copy where they are not."""
    batch, token, head, _ = tensor.stride()
    if not (batch | token | head) & 7 and not tensor.data_ptr() & 15:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _enqueue(
    variant: Variant, cache_key: tuple[Any, ...] | None, grid: tuple[int, ...], args: tuple[Any, ...]
) -> None:
    compiled = _COMPILED.get(cache_key) if cache_key is not None else None
    if compiled is not None:
        compiled[grid](*args)
        return
    from . import triton_lists_jit as device_code

    kernel: Any = device_code.lists_descriptor if variant.descriptor else device_code.lists_pointer
    compiled = kernel[grid](*args, num_warps=variant.warps, num_stages=variant.stages)
    if cache_key is not None and compiled is not None:
        _COMPILED[cache_key] = compiled


def fitted(
    variant: Variant, block: tuple[int, int], k_len: int, dim: int
) -> tuple[Variant, tuple[int, int, int, int, int]]:
    """The variant for such blocks, and its tiles. A specialised one needs 128 rows, 64 for each of its two
    groups, and is not worth it below 64 keys; else the plain loop."""
    tiles = _tiles(block, k_len, dim, variant)
    if variant.specialize and (tiles[1] < 128 or tiles[3] < 64):
        variant = Variant(descriptor=True)
        tiles = _tiles(block, k_len, dim, variant)
    return variant, tiles


def _tiles(block: tuple[int, int], k_len: int, dim: int, variant: Variant) -> tuple[int, int, int, int, int]:
    """(DP, BM, QSUB, BN, SPLIT): a program takes BM = bq / QSUB rows, a list entry has SPLIT tiles of BN
    keys."""
    bq, bk = block
    rows = power_of_two_divisor(bq, variant.rows)
    limit = variant.tile
    while limit > k_len:  # a tile must fit into the keys: its loads carry no mask
        limit //= 2
    columns = power_of_two_divisor(bk, limit)
    return max(16, 1 << (dim - 1).bit_length()), rows, bq // rows, columns, bk // columns


def _padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor, indices: torch.Tensor,
    n_valid: torch.Tensor | None, *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fewer than 16 keys: zeros up to 16, hidden by n_valid."""
    k_len = key.shape[1]
    if n_valid is None:
        n_valid = torch.full((key.shape[0],), k_len, dtype=torch.int32, device=key.device)
    key, value = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 16 - k_len)) for t in (key, value))
    return launch(query, key, value, counts, indices, n_valid, *rest)


class Scratch:
    """Gives Triton the few hundred bytes a program needs for its descriptors, and puts the former allocator
    back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        from triton.runtime import _allocation

        self.former = _allocation._allocator.get()
        _allocation.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=self.device)
        )

    def __exit__(self, *error: object) -> None:
        from triton.runtime import _allocation

        _allocation.set_allocator(self.former)


def _scratch(device: torch.device, variant: Variant) -> AbstractContextManager[Any]:
    return Scratch(device) if variant.descriptor else nullcontext()


KERNEL = TritonListsKernel()
