"""flash-attn-4's forward over lists for sm90 with blocks end to end: device code.

Version 4.0.0b36 starts a program per query block, one to an SM, and of the 10 us that a list of four key
blocks takes nearly four are its start and its end: list, Q and K are waited for one after the other, and
both warp groups meet twice to store. (Its own persistent scheduler would let a program take several blocks,
but keeps that order of loads and those meetings: measured, it gains half as much on even lists and loses a
fifth on ragged ones.) This is a kernel of its own around the same steps: the products, the
softmax and the mask are the library's, called in the library's order, so each row gets the bits that it gets
there. Different is:

  - The host deals the blocks out (`flash4_schedule`) with all that is known of each: nothing is looked up.
  - Q has two buffers, and K is loaded before Q: the loads of a block do not wait for the end of the one
    before.
  - Each warp group stores its own 64 rows, through the rows of Q that only it has read. The groups do not
    meet there: one may be in the next block while the other ends this one, and its products fill the gap.

Imports the library at its top, so only `flash4` imports this, lazily; for the pinned version only.
"""

# The bodies are traced: what looks like tensors and numbers here are values of the device.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools
import hashlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync
from cutlass.pipeline import pipeline_init_arrive, pipeline_init_wait
from cutlass.utils import LayoutEnum
from flash_attn.cute import pipeline as library_pipeline
from flash_attn.cute import utils
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned, to_cute_tensor, torch2cute_dtype_map
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.mask import AttentionMask
from flash_attn.cute.named_barrier import NamedBarrierFwd
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from flash_attn.cute.softmax import Softmax
from flash_attn.cute.utils import AuxData
from quack import copy_utils, layout_utils, sm90_utils

from .flash4_schedule import BATCH, COUNT, HEAD, K_LEN, LAST, LIST, Q_BLOCK, TILE

GROUPS = 2  # warp groups that compute, 64 rows each
GROUP_ROWS = TILE // GROUPS
GROUP_THREADS = 128
Q_BUFFERS = 2
KV_BUFFERS = 2


class ScheduledForwardSm90(FlashAttentionForwardSm90):  # type: ignore[misc]
    """The library's class for its steps and its tiled products; what calls them is here."""

    @cute.jit
    def __call__(self, mQ, mK, mV, mO, mLSE, softmax_scale: Float32, mIndices, mSchedule, stream=None):
        """mQ, mK, mV, mO (B, S, H, D); mLSE fp32 (B, H, S) or None; mIndices int32 (lists, W); mSchedule as
        `flash4_schedule.deal` gives it."""
        mQ, mK, mV, mO = [
            layout_utils.select(assume_tensor_aligned(t), [1, 3, 2, 0]) for t in (mQ, mK, mV, mO)
        ]
        mLSE = layout_utils.select(mLSE, [2, 1, 0]) if const_expr(mLSE is not None) else None
        tiled_qk, tiled_pv = self._get_tiled_mma()
        # What the library's steps read of the object.
        self.num_threads_per_warp_group = GROUP_THREADS
        self.num_wg_mma = GROUPS
        self.use_scheduler_barrier = True
        self.rescale_O_before_gemm = False

        sQ_layout, sK_layout, sV_layout = [
            sm90_utils.make_smem_layout(t.element_type, LayoutEnum.ROW_MAJOR, (TILE, self.tile_hdim), stages)
            for t, stages in ((mQ, Q_BUFFERS), (mK, KV_BUFFERS), (mV, KV_BUFFERS))
        ]
        tile_bytes = cute.size_in_bytes(mQ.element_type, cute.select(sQ_layout, mode=[0, 1]))
        (atom_Q, tma_Q), (atom_K, tma_K), (atom_V, tma_V) = [
            cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(),
                t,
                cute.select(layout, mode=[0, 1]),
                (TILE, self.tile_hdim),
                1,
            )
            for t, layout in ((mQ, sQ_layout), (mK, sK_layout), (mV, sV_layout))
        ]
        # Out: 16 bytes a thread, eight threads beside each other.
        copy_O = cute.make_tiled_copy_tv(
            cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128),
            cute.make_ordered_layout((GROUP_THREADS // 8, 8), order=(1, 0)),
            cute.make_layout((1, 8)),
        )
        self.kernel(
            tma_Q, tma_K, tma_V, mO, mLSE, atom_Q, atom_K, atom_V, softmax_scale * utils.LOG2_E, mIndices,
            mSchedule, sQ_layout, sK_layout, sV_layout, copy_O, tiled_qk, tiled_pv, tile_bytes,
        ).launch(
            grid=[mSchedule.shape[1], 1, 1],
            block=[GROUP_THREADS * (1 + GROUPS), 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, mQ, mK, mV, mO, mLSE, atom_Q, atom_K, atom_V, scale_log2: Float32, mIndices, mSchedule,
        sQ_layout: cute.ComposedLayout, sK_layout: cute.ComposedLayout, sV_layout: cute.ComposedLayout,
        copy_O: cute.TiledCopy, tiled_qk: cute.TiledMma, tiled_pv: cute.TiledMma,
        tile_bytes: cutlass.Constexpr[int],
    ):  # fmt: skip
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (atom_Q, atom_K, atom_V):
                cpasync.prefetch_descriptor(atom)

        @cute.struct
        class Storage:
            barriers_Q: cute.struct.MemRange[cutlass.Int64, Q_BUFFERS * 2]
            barriers_K: cute.struct.MemRange[cutlass.Int64, KV_BUFFERS * 2]
            barriers_V: cute.struct.MemRange[cutlass.Int64, KV_BUFFERS * 2]
            sQ: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sQ_layout)], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sK_layout)], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sV_layout)], 1024]

        storage = cutlass.utils.SmemAllocator().allocate(Storage)
        one_thread = pipeline.CooperativeGroup(pipeline.Agent.Thread, 1)
        compute_warps = pipeline.CooperativeGroup(pipeline.Agent.Thread, GROUPS * GROUP_THREADS // 32)
        pipeline_q, pipeline_k, pipeline_v = [
            library_pipeline.PipelineTmaAsync.create(
                barrier_storage=barriers.data_ptr(),
                num_stages=stages,
                producer_group=one_thread,
                consumer_group=compute_warps,
                tx_count=tile_bytes,
                defer_sync=True,
            )
            for barriers, stages in (
                (storage.barriers_Q, Q_BUFFERS), (storage.barriers_K, KV_BUFFERS),
                (storage.barriers_V, KV_BUFFERS),
            )
        ]  # fmt: skip
        pipeline_init_arrive(cluster_shape_mn=(1, 1), is_relaxed=True)
        sQ = storage.sQ.get_tensor(sQ_layout.outer, swizzle=sQ_layout.inner)
        sK = storage.sK.get_tensor(sK_layout.outer, swizzle=sK_layout.inner)
        sV = storage.sV.get_tensor(sV_layout.outer, swizzle=sV_layout.inner)
        pipeline_init_wait(cluster_shape_mn=(1, 1))

        if warp < GROUP_THREADS // 32:
            cute.arch.setmaxregister_decrease(24)
            if warp == 0:
                self.load(
                    mQ, mK, mV, sQ, sK, sV, atom_Q, atom_K, atom_V, pipeline_q, pipeline_k, pipeline_v,
                    mIndices, mSchedule,
                )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(240)
            self.attend(
                tiled_qk, tiled_pv, mO, mLSE, sQ, sK, layout_utils.transpose_view(sV), pipeline_q,
                pipeline_k, pipeline_v, copy_O, scale_log2, mSchedule,
            )  # fmt: skip

    @cute.jit
    def load(
        self, mQ, mK, mV, sQ, sK, sV, atom_Q, atom_K, atom_V, pipeline_q, pipeline_k, pipeline_v, mIndices,
        mSchedule,
    ):  # fmt: skip
        """One warp: K of the first key block, Q, then K of each further block and V of the one before."""
        program, _, _ = cute.arch.block_idx()
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, Q_BUFFERS)
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, KV_BUFFERS)
        turn = Int32(0)
        count = mSchedule[turn, program, COUNT]
        while count >= 0:
            batch, head = mSchedule[turn, program, BATCH], mSchedule[turn, program, HEAD]
            listed = mIndices[mSchedule[turn, program, LIST], None]
            kv_head = head // self.qhead_per_kvhead
            load_Q, load_K, load_V = [
                copy_utils.tma_producer_copy_fn(
                    copy_utils.tma_get_copy_fn(
                        atom,
                        0,
                        cute.make_layout(1),
                        cute.local_tile(mX[None, None, h, batch], (TILE, self.tile_hdim), (None, 0)),
                        sX,
                    )[0],
                    p,
                )
                for atom, mX, sX, h, p in (
                    (atom_Q, mQ, sQ, head, pipeline_q), (atom_K, mK, sK, kv_head, pipeline_k),
                    (atom_V, mV, sV, kv_head, pipeline_v),
                )
            ]  # fmt: skip
            block = mSchedule[turn, program, LAST]  # lists are taken from their end
            if count > 0:
                pipeline_k.producer_acquire(kv_state)
                load_K(src_idx=block, producer_state=kv_state)
            pipeline_q.producer_acquire(q_state)
            load_Q(src_idx=mSchedule[turn, program, Q_BLOCK], producer_state=q_state)
            q_state.advance()
            for i in cutlass.range(1, count, unroll=1):
                former, former_state = block, kv_state.clone()
                block = listed[count - 1 - i]
                kv_state.advance()
                pipeline_k.producer_acquire(kv_state)
                load_K(src_idx=block, producer_state=kv_state)
                pipeline_v.producer_acquire(former_state)
                load_V(src_idx=former, producer_state=former_state)
            if count > 0:
                pipeline_v.producer_acquire(kv_state)
                load_V(src_idx=block, producer_state=kv_state)
                kv_state.advance()
            turn += 1
            count = mSchedule[turn, program, COUNT]

    @cute.jit
    def attend(
        self, tiled_qk: cute.TiledMma, tiled_pv: cute.TiledMma, mO, mLSE, sQ, sK, sVt, pipeline_q, pipeline_k,
        pipeline_v, copy_O: cute.TiledCopy, scale_log2: Float32, mSchedule,
    ):  # fmt: skip
        """Two warp groups, each with its 64 rows of every block."""
        program, _, _ = cute.arch.block_idx()
        thread = cute.arch.thread_idx()[0] - GROUP_THREADS
        group = cute.arch.make_warp_uniform(thread // GROUP_THREADS)
        first_thread = cute.make_layout(GROUPS, stride=GROUP_THREADS)(group)
        thread_qk = tiled_qk.get_slice(thread)
        _, tSrQ, tSrK = sm90_utils.partition_fragment_ABC(
            tiled_qk.get_slice(first_thread), (TILE, TILE, self.tile_hdim), sQ, sK
        )
        acc_O, tOrP, tOrVt = sm90_utils.partition_fragment_ABC(
            tiled_pv.get_slice(first_thread), (TILE, self.tile_hdim, TILE), None, sVt
        )
        softmax = Softmax.create(scale_log2, num_rows=acc_O.shape[0][0] * acc_O.shape[1])
        shared = {
            "pipeline_k": pipeline_k, "acc_O": acc_O, "tOrP": tOrP, "softmax": softmax,
            "smem_copy_params": SimpleNamespace(smem_thr_copy_P=None, tPsP=None),
        }  # fmt: skip
        multiply_V = partial(sm90_utils.gemm_w_idx, tiled_pv, acc_O, tOrP, tOrVt)

        self.mma_init()
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, Q_BUFFERS)
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, KV_BUFFERS)
        turn = Int32(0)
        count = mSchedule[turn, program, COUNT]
        batch, head = mSchedule[turn, program, BATCH], mSchedule[turn, program, HEAD]
        q_block = mSchedule[turn, program, Q_BLOCK]
        last, k_len = mSchedule[turn, program, LAST], mSchedule[turn, program, K_LEN]
        while count >= 0:
            # Loaded now, looked at after this block.
            turn += 1
            next_count = mSchedule[turn, program, COUNT]
            next_batch, next_head = mSchedule[turn, program, BATCH], mSchedule[turn, program, HEAD]
            next_q_block = mSchedule[turn, program, Q_BLOCK]
            next_last, next_k_len = mSchedule[turn, program, LAST], mSchedule[turn, program, K_LEN]

            seqlen = SeqlenInfoQK.create(batch, mO.shape[0], k_len)
            mask = partial(
                AttentionMask(TILE, TILE, seqlen).apply_mask,
                batch_idx=batch, head_idx=head, m_block=q_block, thr_mma=thread_qk, mask_causal=False,
                aux_data=AuxData(), fastdiv_mods=None,
            )  # fmt: skip
            pipeline_q.consumer_wait(q_state, pipeline_q.consumer_try_wait(q_state))
            multiply_K = partial(
                sm90_utils.gemm_zero_init, tiled_qk, (TILE, TILE), tSrQ, tSrK, A_idx=q_state.index
            )
            if count > 0:
                kv_state = self.first_half_block_overlap(
                    n_block=last, mma_qk_fn=multiply_K, kv_consumer_state=kv_state, seqlen=seqlen,
                    mask_fn=mask, is_first_block=True, **shared,
                )  # fmt: skip
                for i in cutlass.range(1, count):
                    kv_state = self.mma_one_n_block_intrawg_overlap(
                        kv_state,
                        n_block=0,  # read by masks, and there is none here
                        mma_qk_fn=multiply_K,
                        mma_pv_fn=partial(multiply_V, zero_init=i == 1),
                        pipeline_v=pipeline_v,
                        seqlen=seqlen,
                        **shared,
                    )
                kv_state = self.last_half_block_overlap(
                    kv_state, pipeline_v, multiply_V, zero_init=count == 1
                )
            else:
                softmax.reset()
                acc_O.fill(0.0)
            row_scale = softmax.finalize()
            softmax.rescale_O(acc_O, row_scale)
            self.store(
                acc_O, softmax.row_sum, mO, mLSE, sQ[None, None, q_state.index], copy_O, tiled_pv, thread,
                group, batch, head, q_block, pipeline_q, q_state,
            )  # fmt: skip
            q_state.advance()
            count, batch, head, q_block = next_count, next_batch, next_head, next_q_block
            last, k_len = next_last, next_k_len

    @cute.jit
    def store(
        self, acc_O, lse, mO, mLSE, sO, copy_O: cute.TiledCopy, tiled_pv: cute.TiledMma, thread, group, batch,
        head, q_block, pipeline_q, q_state,
    ):  # fmt: skip
        """A warp group's rows of out by way of its rows of Q, and its log-sum-exp; gives Q's buffer back."""
        barrier = int(NamedBarrierFwd.PFull) + group
        rounded = cute.make_fragment_like(acc_O, self.dtype)
        rounded.store(acc_O.load().to(self.dtype))
        cute.arch.barrier(barrier_id=barrier, number_of_threads=GROUP_THREADS)  # all have read Q
        atom = utils.get_smem_store_atom(90, self.dtype)
        to_shared = cute.make_tiled_copy_C(atom, tiled_pv).get_slice(thread)
        cute.copy(atom, to_shared.retile(rounded), to_shared.partition_D(sO))
        cute.arch.barrier(barrier_id=barrier, number_of_threads=GROUP_THREADS)  # all have written out
        from_shared = copy_O.get_slice(thread % GROUP_THREADS)
        rows = from_shared.partition_S(cute.local_tile(sO, (GROUP_ROWS, self.tile_hdim), (group, 0)))
        held = cute.make_fragment_like(rows, self.dtype)
        cute.autovec_copy(rows, held)
        # The next write to this buffer comes from the copy engine.
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        pipeline_q.consumer_release(q_state)

        places = cute.make_identity_tensor((GROUP_ROWS, self.tile_hdim))
        place = from_shared.partition_S(places)
        half = q_block * GROUPS + group
        target = from_shared.partition_D(
            cute.local_tile(mO[None, None, head, batch], (GROUP_ROWS, self.tile_hdim), (half, 0))
        )
        for i in cutlass.range_constexpr(cute.size(held.shape[1])):
            if place[0, i, 0][0] < mO.shape[0] - half * GROUP_ROWS:
                cute.copy(copy_O, held[None, i, None], target[None, i, None])
        if const_expr(mLSE is not None):
            own = layout_utils.reshape_acc_to_mn(
                tiled_pv.get_slice(thread).partition_C(cute.make_identity_tensor((TILE, self.tile_hdim)))
            )
            if own[0, 0][1] == 0:  # of the four threads with a row, the one with its first column
                for r in cutlass.range_constexpr(cute.size(lse)):
                    row = q_block * TILE + own[r, 0][0]
                    if row < mO.shape[0]:
                        mLSE[row, head, batch] = lse[r]


@functools.cache
def _cache() -> Any:
    """The library's cache of compiled functions, in a place of its own for each state of this file."""
    return get_jit_cache("diffctrl-" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16])


def compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None,
    indices: torch.Tensor, schedule: torch.Tensor,
) -> Any:  # fmt: skip
    """The forward for tensors like these, to be called with (query, key, value, out, lse, scale, indices,
    schedule): lengths, batch and heads may differ, dtype, head dim, heads to a key head and lse may not."""
    group = query.shape[2] // key.shape[2]
    cache, cache_key = _cache(), (str(query.dtype), query.shape[3], group, lse is None)
    if cache_key not in cache:
        dim = query.shape[3]
        kernel = ScheduledForwardSm90(
            torch2cute_dtype_map[query.dtype], dim, dim, group, pack_gqa=False, tile_m=TILE, tile_n=TILE,
            num_stages=KV_BUFFERS, num_threads=GROUP_THREADS * (1 + GROUPS), intra_wg_overlap=True,
            mma_pv_is_rs=True,
        )  # fmt: skip
        tensors = [to_cute_tensor(t) for t in (query, key, value, out)]
        lists = [to_cute_tensor(t, assumed_align=4) for t in (indices, schedule)]
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        cache[cache_key] = cute.compile(
            kernel, *tensors, to_cute_tensor(lse, assumed_align=4), Float32(1.0), *lists, stream,
            options="--enable-tvm-ffi",
        )  # fmt: skip
    return cache[cache_key]
