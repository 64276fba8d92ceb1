"""What a kernel is: a name, a reason why it cannot take a call, and a run.

Axis letters of the package: B batch, H query heads, Hkv key/value heads, S tokens (Sq queries, Sk keys), D
head dim, NQ and NK number of query and key/value blocks, W width of the index lists.

A kernel file defines one object that satisfies `Kernel` and binds it to the module name `KERNEL`; `chain.py`
imports the file lazily, by name. Packages that may be missing (triton, flash_attn, xformers, diffusers) are
imported inside the functions of that file, never at its top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from ..lists import BlockLists

DENSITY_CLASSES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.85, 1.0)


def density_class(density: float) -> float:
    """The upper edge of the class of `density`: kernel choice may depend on this, never on more."""
    return next((edge for edge in DENSITY_CLASSES if density <= edge + 1e-9), 1.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One attention call, described without its tensors: all that `why_not` and the choice table may look at.

    `arch` is major * 10 + minor of the CUDA compute capability (90 for H100), None elsewhere. `batch` is
    there for shape checks; the choice of a kernel must not depend on it (a seed gives the same latents in any
    batch). `sparse` says that block lists are given; `block`, `density_class`, `rule`, `per_row_lengths` and
    the `shared_*` flags describe those lists, at their defaults for a dense call.
    """

    device_type: str
    arch: int | None
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    needs_lse: bool = False
    needs_grad: bool = False
    attn_mask: Literal["none", "bool", "additive"] = "none"
    sparse: bool = False
    block: tuple[int, int] = (0, 0)  # (bq, bk)
    density_class: float = 1.0
    shared_heads: bool = False  # one list for all heads (Hm == 1)
    shared_batch: bool = False  # one list for all batch rows (Bm == 1)
    per_row_lengths: bool = False  # n_valid is given: keys from n_valid[b] on are invalid in row b
    rule: str | None = None  # kind of the element rule of partial blocks, None without partial blocks
    allows_empty: bool = False  # a query block may have no key block, or n_valid may be 0

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block[0]) if self.sparse else 0


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of a call.

    query: (B, Sq, H, D); key, value: (B, Sk, Hkv, D), any strides; `scale` is resolved (never None).
    mask: the block lists (host object; `mask.on(device)` gives cached device tensors, `mask.cached(device,
    consumer, make)` caches whatever else a kernel derives from the lists), None for a dense call.
    attn_mask: bool or additive, broadcastable to (B, H, Sq, Sk); only ever given to dense kernels.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: BlockLists | None = None
    attn_mask: torch.Tensor | None = None


@runtime_checkable
class Kernel(Protocol):
    """One way to compute attention.

    A kernel that compiles anew by lengths, lists or strides says `specialises = True`: its self-test then
    runs a second form of call.
    """

    name: str

    def why_not(self, request: Request) -> str | None:
        """None if `run` can take this call, else one readable reason (device, dtype, missing package, ...).

        Called often: cheap, and it never runs a kernel.
        """
        ...

    def run(self, request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns out (B, Sq, H, D) in the dtype of query and, if `request.needs_lse`, lse (B, H, Sq).

        lse: fp32, natural log, scale included, -inf for a row without keys (whose out is 0); contiguous.
        Where `request.needs_grad`, out must be differentiable by autograd (eager, first order; lse carries no
        gradient). Tensors of `operands` are never written to.
        """
        ...
