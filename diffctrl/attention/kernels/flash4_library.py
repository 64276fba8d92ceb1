"""What `flash4` needs of the package flash-attn-4: the import, a private cache, block lists in its form."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..convert import FA4Lists, transpose_lists
from ..lists import BlockLists
from .base import Operands
from .flash4_schedule import deal

logger = logging.getLogger("diffctrl.attention")

PACKAGE = "flash-attn-4"


@functools.cache
def installed_version() -> str | None:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def library() -> Any:
    """`flash_attn.cute.interface`, imported once; about two seconds after torch.

    Its compiled kernels are kept on disk in a folder of ours (object code is loaded from there: a private
    one), unless the user has set either variable; both are read at import only, so they are put back.
    """
    names = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    folder = None if any(name in os.environ for name in names) else _private_folder()
    if folder is not None:
        os.environ.update(zip(names, ("1", str(folder)), strict=True))
    try:
        import flash_attn.cute.interface as library
    finally:
        if folder is not None:
            for name in names:
                os.environ.pop(name, None)
    return library


def _private_folder() -> Path | None:
    """A folder that only this user can write or read; None where there is none (then each process compiles
    anew)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffctrl" / "flash4"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    except (OSError, RuntimeError) as error:
        logger.info("flash-attn-4 keeps no compiled kernels on disk: %s", error)
        return None
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not stat.S_ISDIR(found.st_mode) or not mine or found.st_mode & 0o077:
        logger.warning("%s is not private (0700): flash-attn-4 keeps no compiled kernels on disk.", root)
        return None
    return root


@dataclass(slots=True)
class PreparedLists:
    """A mask in the library's form on one device, and what was already made of it there."""

    tensors: Any  # BlockSparseTensorsTorch
    lengths: torch.Tensor | None  # int32 (B,): valid keys per row
    host: FA4Lists
    k_lens: list[int]  # the same lengths, or that of all rows
    entries: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # compiled functions
    schedules: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def dealt(self, batch: int, heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The lists below each other, int32 (lists, W), and the schedule over them (`flash4_schedule`)."""
        found = self.schedules.get((batch, heads))
        if found is None:
            programs = torch.cuda.get_device_properties(device).multi_processor_count
            counts, indices = self.host.full_count, self.host.full_index
            schedule = deal(counts, indices, self.k_lens, batch, heads, programs)
            found = self.tensors.full_block_idx.flatten(0, 2), schedule.to(device)
            self.schedules[batch, heads] = found
        return found


def prepared_lists(operands: Operands, arch: int | None) -> PreparedLists | None:
    mask, query = operands.mask, operands.query
    if mask is None:
        return None
    head_dim = query.shape[3]
    return mask.cached(
        query.device,
        f"flash4 {arch} {head_dim}",
        lambda: make_lists(mask, query.device, arch or 0, head_dim),
    )


def make_lists(mask: BlockLists, device: torch.device, arch: int, head_dim: int) -> PreparedLists:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    lists = mask.clipped().to_fa4(arch, head_dim)
    counts, indices = lists.full_count, lists.full_index
    # Where nothing was converted, one copy serves all kernels.
    if counts is mask.counts and indices is mask.indices:
        counts, indices = mask.on(device).counts, mask.on(device).indices
    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=lists.mask_count.to(device),
        mask_block_idx=lists.mask_index.to(device),
        full_block_cnt=counts.to(device),
        full_block_idx=indices.to(device),
        block_size=lists.block,
    )
    if mask.n_valid is None:
        return PreparedLists(tensors, None, lists, [mask.lengths[1]])
    return PreparedLists(tensors, mask.n_valid.to(device), lists, mask.n_valid.tolist())


def make_transposed(mask: BlockLists, device: torch.device) -> Any:
    """For each key block the query blocks that attend it, block_size still (bq, bk)."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    counts, indices = transpose_lists(mask.counts, mask.indices, mask.n_k_blocks)
    none = torch.zeros_like(counts), torch.zeros(*counts.shape, 1, dtype=torch.int32)
    return BlockSparseTensorsTorch(
        mask_block_cnt=none[0].to(device),
        mask_block_idx=none[1].to(device),
        full_block_cnt=counts.to(device),
        full_block_idx=indices.to(device),
        block_size=mask.block,
    )
