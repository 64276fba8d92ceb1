"""flash-attn-4's forward for sm90 as a persistent kernel: one program per SM takes one block after another.

Version 4.0.0b36 starts a program per query block. On a short list the start (lists, Q and the first K are
waited for) and the end (out is written) are 4 of 10 us, and only one program fits on an SM, so nothing hides
them. The kernel's loops are written for many blocks per program; what is missing is room: out is staged where
Q lies, and the loads for the next block would overwrite it. Here it has 32 KB of its own, and the loads of
the next block run during the end of this one.

Imports the library at its top, so only `flash4` imports this, lazily. It replaces two names of the library
while it compiles: for the pinned version only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cutlass
import cutlass.cute as cute
from flash_attn.cute import flash_fwd_sm90, interface
from flash_attn.cute.named_barrier import NamedBarrierFwd
from flash_attn.cute.tile_scheduler import StaticPersistentTileScheduler

# The library's cache of compiled functions, also the one on disk, knows nothing of this file. sm90 does not
# use the argument num_threads but keeps it in the cache's key: to be counted up by 32 with every change here.
CACHE_MARK = 416

_Stock = flash_fwd_sm90.FlashAttentionForwardSm90


class PersistentForwardSm90(_Stock):  # type: ignore[misc]
    def _get_shared_storage_cls(self) -> Any:
        def aligned(layout: Any, parts: int = 1) -> Any:
            size = cute.cosize(layout) * parts
            return cute.struct.Align[cute.struct.MemRange[self.dtype, size], self.buffer_align_bytes]

        query, key, value = aligned(self.sQ_layout, 2), aligned(self.sK_layout), aligned(self.sV_layout)
        probabilities = (
            cute.struct.Align[cute.struct.MemRange[self.dtype, 0], 1024]
            if self.sP_layout is None
            else aligned(self.sP_layout)
        )
        one = cute.struct.MemRange[cutlass.Int64, 2]
        per_stage = cute.struct.MemRange[cutlass.Int64, self.num_stages * 2]

        class Storage:
            pass

        Storage.__annotations__ = {
            "mbar_ptr_Q": one,
            "mbar_ptr_K": per_stage,
            "mbar_ptr_V": per_stage,
            "sV": value,
            "sQ": query,  # and out behind it
            "sK": key,
            "sP": probabilities,
        }
        return cute.struct(Storage)

    @cute.jit
    def epilogue(
        self, acc_O, lse, mO, mLSE, sO, seqlen, gmem_tiled_copy_O, tma_atom_O, tiled_mma, tidx, m_block,
        head_idx, batch_idx,
    ):  # fmt: skip
        # All compute groups have left the previous block's end, the warp that stores out included, before any
        # of them enters this one: the library's two barriers share an id with different counts.
        cute.arch.barrier(barrier_id=int(NamedBarrierFwd.PEmpty), number_of_threads=self.num_epilogue_threads)
        own = cute.make_tensor(sO.iterator + self.tile_m * self.tile_hdim, sO.layout)
        _Stock.epilogue(
            self, acc_O, lse, mO, mLSE, own, seqlen, gmem_tiled_copy_O, tma_atom_O, tiled_mma, tidx, m_block,
            head_idx, batch_idx,
        )  # fmt: skip


@contextmanager
def persistent() -> Iterator[None]:
    """While it lasts, the library compiles the persistent form; the caller holds the lock."""
    former = interface.FlashAttentionForwardSm90, flash_fwd_sm90.SingleTileScheduler
    interface.FlashAttentionForwardSm90 = PersistentForwardSm90
    flash_fwd_sm90.SingleTileScheduler = StaticPersistentTileScheduler
    try:
        yield
    finally:
        interface.FlashAttentionForwardSm90, flash_fwd_sm90.SingleTileScheduler = former
