"""`attend`: the one entry to attention."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from .chain import choose, note_fallback
from .kernels.base import Operands
from .kernels.sdpa import active_backend, fused_on_cpu, stock_attention, stock_attention_with_lse
from .lists import BlockLists, DeviceLists, origin_of
from .ops import attend_op, run_chain
from .scores import without_autocast
from .stats import EngineStats
from .ulysses import Exchange, Shard

_HALF = (torch.float16, torch.bfloat16)
_CAST = (torch.float32, *_HALF)  # by autocast
_SECOND_PASS = ("sdpa", "xformers")  # kernels that give no log-sum-exp of their own


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: BlockLists | DeviceLists | None = None,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    precision: Literal["native"] = "native",
    return_lse: bool = False,
    backend: str | None = None,
    parallel_config: Any = None,
    shard: Shard | None = None,
    kernel: str | None = None,
    stats: EngineStats | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * query key^T) value over the pairs that the mask attends.

    Without a mask this is what the stock processors compute, bitwise, on a CPU, in fp32, and wherever a
    backend is set; on CUDA in 16 bits with no backend set it is the best dense kernel of the card. With
    block lists it is the first kernel of the chain that can take the call (see `chain.py`), and the work
    follows the density.

    Args:
        query: (B, Sq, H, D), floating point, any strides.
        key, value: (B, Sk, Hkv, D), same dtype and device; H is a multiple of Hkv. Under autocast all are
            brought to its dtype first, as it does to the stock call.
        mask: block lists. Inside a compiled region pass what `mask.on(device)` returned.
        attn_mask: bool (True is attended) or additive, broadcastable to (B, H, Sq, Sk), or (B, Sk). Dense
            calls only: block lists carry per-row key lengths as `n_valid`.
        scale: of the scores, 1 / sqrt(D) by default.
        precision: "native", the dtype of the inputs.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: attention backend of diffusers for dense calls; what `set_attention_backend` stored in a
            processor. Block lists do not run on one: the chain takes the call then, counted and logged.
        parallel_config: a processor's `_parallel_config`. Dense calls hand it to the stock dispatcher; lists
            (for the whole sequence), and calls with a shard, exchange tokens for heads over all devices
            (Ulysses).
        shard: which tokens of this device are its share; all are, where a mask is given and no shard.
        kernel: name of the one kernel to use; an error where it cannot be used, never another one instead.
        stats: where the call is counted.

    Returns:
        out (B, Sq, H, D), 0 where a query attends nothing; with return_lse also lse (B, H, Sq), fp32, natural
        logarithm, -inf where a query attends nothing. lse carries no gradient.

    Raises:
        ValueError: shapes, masks or options that do not fit together; says which and what to do.

    >>> q, k, v = torch.zeros(1, 5, 2, 8), torch.zeros(1, 5, 2, 8), torch.ones(1, 5, 2, 8)
    >>> lists = BlockLists.full((2, 2), (5, 5)).force(rows=(0, 2))
    >>> out, lse = attend(q, k, v, mask=lists, return_lse=True)
    >>> out.shape, out.mean().item(), round(lse.mean().exp().item(), 3)
    (torch.Size([1, 5, 2, 8]), 1.0, 5.0)
    """
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _check(query, key, value, mask, attn_mask, precision)
    # Kernels choose the dtype of each of their products themselves.
    with without_autocast(query.device.type):
        if parallel_config is not None and (mask is not None or shard is not None):
            if return_lse:
                raise ValueError(
                    "return_lse is not available across devices: lse would be one device's part."
                )
            settings: dict[str, Any] = {"scale": scale, "backend": backend, "kernel": kernel, "stats": stats}
            return _across_devices(query, key, value, mask, attn_mask, parallel_config, shard, settings)
        if mask is None:
            return _dense(
                query, key, value, attn_mask, scale, return_lse, backend, parallel_config, kernel, stats
            )
        return _sparse(query, key, value, mask, scale, return_lse, backend, kernel, stats)


def gives_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: BlockLists | DeviceLists | None = None,
    attn_mask: torch.Tensor | None = None,
    backend: str | None = None,
    parallel_config: Any = None,
) -> bool:
    """Whether `attend(..., return_lse=True)` costs this call next to nothing and leaves its output as it is.

    Where it does not, `attend` computes the log-sum-exp in a second pass; who needs it for some queries only
    is better off with a pass of his own.
    """
    if parallel_config is not None:
        return False
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    compiling = torch.compiler.is_compiling()
    if compiling and isinstance(mask, DeviceLists):
        return True
    lengths = (query.shape[1], key.shape[1])
    host = origin_of(mask, lengths) if isinstance(mask, DeviceLists) else mask
    if host is not None and host.is_full:
        host = None
    if host is None and not engine_chooses(query, attn_mask, backend):
        return not compiling and fused_on_cpu(query, key, value, attn_mask, backend)
    if compiling:
        return True
    operands = Operands(query, key, value, 1.0, host)
    needs_grad = _needs_grad(query, key, value)
    kernels = [
        choose(operands, needs_lse=needs_lse, needs_grad=needs_grad, kernel=None)[1].kernel.name
        for needs_lse in (False, True)
    ]
    return kernels[0] == kernels[1] and kernels[0] not in _SECOND_PASS


def _across_devices(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockLists | DeviceLists | None,
    attn_mask: torch.Tensor | None,
    parallel_config: Any,
    shard: Shard | None,
    settings: dict[str, Any],
) -> torch.Tensor:
    """All tokens of this device's heads, attended as on one device."""
    local = query.shape[1]
    if key.shape[1] != local:
        raise ValueError(
            f"Tokens that devices share attend themselves: {local} queries and {key.shape[1]} keys cannot."
        )
    if shard is None:
        if not isinstance(mask, BlockLists):
            raise ValueError("Lists on a device do not tell the whole length: pass shard=Shard(...) as well.")
        shard = Shard(0, local, mask.lengths[1])
    exchange = Exchange.of(parallel_config, shard, query, key)
    operands = (exchange.gather(part) for part in (query, key, value))
    lists = None if mask is None else exchange.lists(mask, exchange.length(local))
    out: Any = attend(*operands, mask=lists, attn_mask=exchange.key_mask(attn_mask, local), **settings)
    return exchange.scatter(out)


def _sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockLists | DeviceLists,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
    kernel: str | None,
    stats: EngineStats | None,
) -> Any:
    resolved = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    needs_grad = _needs_grad(query, key, value)
    if torch.compiler.is_compiling():
        lists = _compilable(mask, query.device)
        out, lse = _call_op(query, key, value, lists, resolved, return_lse, needs_grad, kernel, stats)
        return (out, lse) if return_lse else out
    lengths = (query.shape[1], key.shape[1])
    host = origin_of(mask, lengths) if isinstance(mask, DeviceLists) else mask
    _check_lists(host, query, lengths)
    if host.is_full and kernel is None:
        # Everything is attended: the dense kernel gives this, and exactly what the stock model gives.
        return _dense(query, key, value, None, scale, return_lse, backend, None, None, stats)
    if kernel is None and backend not in (None, "native"):
        note_fallback(
            f"the kernel chain instead of backend {active_backend(backend)!r}, which takes no lists", stats
        )
    operands = Operands(query, key, value, resolved, host)
    result = run_chain(operands, needs_lse=return_lse, needs_grad=needs_grad, kernel=kernel, stats=stats)
    return result if return_lse else result[0]


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
    parallel_config: Any,
    kernel: str | None,
    stats: EngineStats | None,
) -> Any:
    resolved = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    compiling = torch.compiler.is_compiling()
    if kernel is not None or (parallel_config is None and engine_chooses(query, attn_mask, backend)):
        needs_grad = _needs_grad(query, key, value)
        if compiling:
            if attn_mask is not None:
                raise ValueError("A forced kernel with attn_mask cannot be compiled: drop one of the two.")
            out, lse = _call_op(query, key, value, None, resolved, return_lse, needs_grad, kernel, stats)
            return (out, lse) if return_lse else out
        operands = Operands(query, key, value, resolved, None, attn_mask)
        out, lse = run_chain(
            operands, needs_lse=return_lse, needs_grad=needs_grad, kernel=kernel, stats=stats
        )
        return (out, lse) if return_lse else out
    if stats is not None and not compiling:
        stats.record("sdpa" if active_backend(backend) == "native" else active_backend(backend))
    if not return_lse:
        return stock_attention(query, key, value, attn_mask, scale, backend, parallel_config)
    if parallel_config is not None:
        raise ValueError(
            "return_lse is not available under context parallelism: lse would be one rank's part."
        )
    return stock_attention_with_lse(query, key, value, attn_mask, resolved, backend)


def engine_chooses(query: torch.Tensor, attn_mask: torch.Tensor | None, backend: str | None) -> bool:
    """True where nobody set a backend and the card has faster dense kernels than the stock choice."""
    if query.device.type != "cuda" or backend is not None or attn_mask is not None:
        return False
    in_half = query.dtype in _HALF or torch.is_autocast_enabled("cuda")
    return in_half and active_backend(None) == "native"


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What autocast makes of the operands of scaled_dot_product_attention, which the stock processors call.

    They need not be of one dtype before: autocast leaves normed queries and keys in float32 beside values in
    16 bits.
    """
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device_type)
    query, key, value = (t.to(dtype) if t.dtype in _CAST else t for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype in _CAST:
        attn_mask = attn_mask.to(dtype)
    return query, key, value, attn_mask


def _compilable(mask: BlockLists | DeviceLists, device: torch.device) -> DeviceLists:
    if isinstance(mask, DeviceLists):
        return mask
    lists = mask.ready(device)
    if lists is None:
        raise ValueError(
            f"The mask has no tensors on {device} yet, and compiled code cannot make them. "
            f"Call mask.on({device}) before the compiled region."
        )
    return lists


def _call_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: DeviceLists | None,
    scale: float,
    needs_lse: bool,
    needs_grad: bool,
    kernel: str | None,
    stats: EngineStats | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors: list[Any] = [None] * 5
    rule_tensors, rule_kind, block = [], "", [0, 0]
    if lists is not None:
        tensors = [lists.counts, lists.indices, lists.n_valid, lists.partial_counts, lists.partial_indices]
        rule_tensors, rule_kind, block = list(lists.rule_tensors), lists.rule_kind or "", list(lists.block)
    number = 0 if stats is None else stats.number
    return attend_op(
        query,
        key,
        value,
        *tensors,
        rule_tensors,
        rule_kind,
        block,
        scale,
        needs_lse,
        needs_grad,
        kernel or "",
        number,
    )


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockLists | DeviceLists | None,
    attn_mask: torch.Tensor | None,
    precision: str,
) -> None:
    if precision != "native":
        raise ValueError(f"precision {precision!r} is not available; accepted is 'native'.")
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "attend takes query (B, Sq, H, D) and key, value (B, Sk, Hkv, D); given were "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
        raise ValueError(
            "query and key must agree in batch and head dim, and query heads be a multiple of key "
            f"heads; given were (B, S, H, D) = {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise ValueError(
            f"query, key, value must have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}."
        )
    if query.shape[1] == 0 or key.shape[1] == 0:
        raise ValueError(
            f"attend needs at least one query and one key; {query.shape[1]} and {key.shape[1]} were given."
        )
    if mask is not None and attn_mask is not None:
        raise ValueError(
            "mask (block lists) and attn_mask cannot be given together. Put per-row key lengths into "
            "the lists as n_valid, other key validity as a partial-block rule 'kv_validity', or drop one."
        )


def _check_lists(lists: BlockLists, query: torch.Tensor, lengths: tuple[int, int]) -> None:
    if lists.lengths != lengths:
        raise ValueError(f"The mask is for {lists.lengths} (query, key) tokens, the tensors have {lengths}.")
    for name, size, actual in (
        ("batch rows", lists.batch, query.shape[0]),
        ("heads", lists.heads, query.shape[2]),
    ):
        if size not in (1, actual):
            raise ValueError(
                f"The mask has lists for {size} {name}, the query has {actual}: sizes must be equal or 1."
            )
