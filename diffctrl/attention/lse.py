"""Log-sum-exp: merging partial attentions, and the pass that computes it where a kernel does not return it.

Convention everywhere: natural log, fp32, (B, H, S), scale included, -inf for a row without keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .scores import tiled_logsumexp, wide_dtype, with_mask


def merge(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attentions of the same queries over disjoint sets of keys into the attention over all of them.

    Args:
        outs: each (B, S, H, D); fp32 partials keep the result exact, 16-bit ones cost one more rounding each.
        lses: each (B, H, S), fp32.
        dtype: of the result; that of outs[0] by default.

    Returns:
        out (B, S, H, D), lse (B, H, S) fp32. A row without any key has out 0 and lse -inf.

    >>> one = torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2)
    >>> two = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2)
    >>> out, lse = merge([one[0], two[0]], [one[1], two[1]])
    >>> out[0, 0, 0].tolist(), round(lse[0, 0, 0].item(), 4)
    ([0.5, 0.5, 0.5, 0.5], 0.6931)
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge takes as many outs as lses, at least one; given were {len(outs)} and {len(lses)}."
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
            raise ValueError(
                f"merge takes outs (B, S, H, D) of one shape and lses (B, H, S); given were "
                f"{tuple(out.shape)} with {tuple(lse.shape)}, the first out is {tuple(outs[0].shape)}."
            )
    top = torch.stack(list(lses)).amax(0)
    # -inf - (-inf) is NaN: a row that is empty in every part takes 0 as its maximum instead.
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    weights = [torch.exp(lse - top) for lse in lses]
    total = torch.stack(weights).sum(0)
    safe = torch.where(total == 0, torch.ones_like(total), total)
    out = sum(
        o.float() * (w / safe).transpose(1, 2).unsqueeze(-1) for o, w in zip(outs, weights, strict=True)
    )
    assert isinstance(out, torch.Tensor)
    return out.to(dtype or outs[0].dtype), top + torch.log(total)


def logsumexp_of(
    query: torch.Tensor, key: torch.Tensor, scale: float, attn_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """lse (B, H, Sq) of dense attention, from query (B, Sq, H, D) and key (B, Sk, Hkv, D), without gradients.

    A second pass over Q and K, a tile at a time, for kernels that do not return it: asking for it never
    changes the kernel that computes the output. float32, or float64 for float64 operands.
    attn_mask: bool (True is attended) or additive, broadcastable to (B, H, Sq, Sk), four axes.
    """
    return _logsumexp_op(query, key, attn_mask, scale)


# An operator, so that a compiled region does not unroll the loop over tiles and compile anew for each length.
@torch.library.custom_op("diffctrl::logsumexp", mutates_args=())
def _logsumexp_op(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    if attn_mask is None:
        return tiled_logsumexp(query, key, scale)
    return tiled_logsumexp(query, key, scale, lambda part, *tile: with_mask(part, attn_mask, *tile))


@_logsumexp_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    shape = query.shape[0], query.shape[2], query.shape[1]
    return query.new_empty(shape, dtype=wide_dtype(query.dtype))
