"""Softmax weights of some queries and keys, a tile at a time, by exact routes: never S x S.

lse: the kernel that ran the call gave the log-sum-exp of each query over all its keys; a small product of
the wanted queries and keys does the rest.
second_call: a kernel that gives the log-sum-exp is called once more for it.
chunked: it is computed anew from all keys, tile by tile. Works everywhere.
one_hot: the attention once more over values that are one at a wanted key and zero elsewhere; its output is
the weights, in the operands' dtype.

Axis letters: B batch, H heads, R queries of a tile, T wanted keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..api import attend, gives_lse
from ..lists import BlockLists
from ..pairs import attended_pairs, part_of
from ..scores import scores, tiled_logsumexp, wide_dtype
from .tokens import Tokens

Route = Literal["lse", "second_call", "chunked", "one_hot"]
ROUTES: tuple[Route, ...] = ("lse", "second_call", "chunked", "one_hot")

# A multiply-add in a tile of scores, which go through memory for their exponentials, costs as much as these
# in a fused kernel. On a CPU chunked was measured to take 1.0 to 1.5 times a fused call, whose two products
# count 2. On an H200, 4096 queries over 4608 keys of 24 heads of 128 channels took 7.9 ms chunked and 0.38 ms
# fused (docs/results/capture.json).
_TILE_COST = {"cpu": 2.6, "cuda": 42.0}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a kernel was given.

    Attributes:
        query: (B, Sq, H, D).
        key: (B, Sk, Hkv, D).
        scale: of the scores.
        lse: (B, H, Sq) as the kernel gave it, or None.
        attn_mask: bool or additive, (B or 1, H or 1, Sq or 1, Sk), or None.
        lists: the block lists, or None.
        key_lengths: number of keys, from the first on, that attn_mask attends in each batch row, where it
            says just that; None where it says something else or that is not known.
        backend: attention backend, for one call more.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    lse: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    lists: BlockLists | None = None
    key_lengths: tuple[int, ...] | None = None
    backend: Any = None

    def of(self, batch: range, heads: tuple[int, ...] | None) -> AttentionCall:
        """The call of some batch rows and heads; views, but for chosen heads."""
        rows = slice(batch.start, batch.stop)
        query, key, lse, mask = self.query[rows], self.key[rows], self.lse, self.attn_mask
        lse = None if lse is None else lse[rows]
        mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        lists = None if self.lists is None else part_of(self.lists, batch, heads)
        lengths = None if self.key_lengths is None else self.key_lengths[rows]
        if heads is not None:
            groups = query.shape[2] // key.shape[2]
            query, key = query[:, :, list(heads)], key[:, :, [head // groups for head in heads]]
            lse = None if lse is None else lse[:, list(heads)]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, list(heads)]
        fields = {"lse": lse, "attn_mask": mask, "lists": lists, "key_lengths": lengths}
        return replace(self, query=query, key=key, **fields)

    def bias(self, rows: Tokens) -> torch.Tensor | None:
        """attn_mask of some queries."""
        mask = self.attn_mask
        return mask if mask is None or mask.shape[2] == 1 else rows.of(mask, 2)

    def hide(self, part: torch.Tensor, rows: Tokens, columns: Tokens) -> torch.Tensor:
        """Scores (B, H, R, T), biased, and -inf where a pair is not attended; changes them in place."""
        bias = self.bias(rows)
        if bias is not None:
            bias = columns.of(bias, 3)
            part = part.masked_fill_(~bias, float("-inf")) if bias.dtype == torch.bool else part.add_(bias)
        if self.lists is not None:
            pairs = rows.positions(part.device), columns.positions(part.device)
            part = part.masked_fill_(~attended_pairs(self.lists, *pairs), float("-inf"))
        return part

    @property
    def masked(self) -> bool:
        return self.attn_mask is not None or self.lists is not None


@dataclass(frozen=True, slots=True)
class Part:
    """Weights (B, H, R, T), float32 (float64 of float64), of queries from `row` and keys from `column` on."""

    row: int
    column: int
    weights: torch.Tensor


def extra_bytes(route: Route, call: AttentionCall, rows: int) -> int:
    """What a route needs beside tiles of scores: outputs of one call more, and its values."""
    batch, count, heads, dim = call.query.shape
    numbers = 0
    if route in ("second_call", "one_hot"):
        numbers = batch * (rows if call.lists is None else count) * heads * dim
    if route == "one_hot":
        numbers += call.key.numel()
    return numbers * call.query.element_size()


def choose_route(call: AttentionCall, rows: int, columns: int, room: int | None = None) -> Route:
    """The cheapest exact route for weights of `rows` queries and `columns` keys.

    room: bytes that it may need beside its tiles of scores; None for any.
    """
    if call.lse is not None:
        return "lse"
    length, dim = call.key.shape[1], call.query.shape[3]
    # Multiply-adds for each query and head, in a fused kernel.
    costs: dict[Route, float] = {
        "chunked": _TILE_COST.get(call.query.device.type, _TILE_COST["cuda"]) * length * dim + columns * dim
    }
    if call.query.dtype in (torch.float32, torch.float64):  # it would round weights to 16 bits
        costs["one_hot"] = 2 * length * dim * -(-columns // dim)
    if call.lists is not None:  # every query is run, over the keys that it attends
        whole = call.lists.density() * call.query.shape[1] / rows
        costs = {route: cost * (1 if route == "chunked" else whole) for route, cost in costs.items()}
    elif _can_call_again(call):
        costs["second_call"] = 2 * length * dim + columns * dim
    fitting: list[Route] = [
        route for route in costs if room is None or extra_bytes(route, call, rows) <= room
    ]
    return min(fitting, key=lambda route: costs[route])


def _can_call_again(call: AttentionCall) -> bool:
    """Whether a kernel gives the log-sum-exp of the call, without lists, at the cost of one call."""
    query, key, mask = call.query, call.key, call.attn_mask
    if mask is not None and call.key_lengths is not None:
        mask = None
    return call.lists is None and gives_lse(query, key, key, attn_mask=mask)


def weights(
    call: AttentionCall, rows: Tokens, columns: Tokens, route: Route, tile_bytes: int
) -> Iterator[Part]:
    """The softmax weights of some queries and keys, in parts that cover each pair once.

    The softmax is over all keys that the mask of the call attends. A query that attends nothing has none.

    Args:
        call: what the kernel was given.
        rows: of the queries.
        columns: of the keys.
        route: "lse" needs `call.lse`, "second_call" a call without lists.
        tile_bytes: of scores at a time.
    """
    if route == "one_hot":
        yield from _one_hot(call, rows, columns)
        return
    if route == "lse" and call.lse is not None:
        lse = rows.of(call.lse, 2)
    else:
        lse = _called_again(call, rows) if route == "second_call" else _recomputed(call, rows, tile_bytes)
    key = columns.of(call.key, 1)
    batch, _, heads, _ = call.query.shape
    step = max(tile_bytes // (4 * batch * heads * columns.count), 1)
    for start in range(0, rows.count, step):
        part = rows.part(start, start + step)
        norm = lse[..., start : start + step].unsqueeze(-1)
        if call.masked:
            tile = call.hide(scores(part.of(call.query, 1), key, call.scale), part, columns)
            # A query without keys has lse -inf and no weights.
            tile = tile.sub_(norm).exp_().masked_fill_(norm == float("-inf"), 0.0)
        else:
            tile = scores(part.of(call.query, 1), key, call.scale, below=norm).exp_()
        yield Part(start, 0, tile)


def _called_again(call: AttentionCall, rows: Tokens) -> torch.Tensor:
    """(B, H, R): log-sum-exp of some queries over all their keys, by one call, or one for each length."""
    query, settings = rows.of(call.query, 1), {"scale": call.scale, "return_lse": True}
    if call.key_lengths is None or call.attn_mask is None:
        result: Any = attend(query, call.key, call.key, attn_mask=call.bias(rows), **settings)
        return result[1]
    made = []
    for row, length in enumerate(call.key_lengths):
        key = call.key[row : row + 1, :length]
        part: Any = attend(query[row : row + 1], key, key, **settings)
        made.append(part[1])
    return torch.cat(made)


def _recomputed(call: AttentionCall, rows: Tokens, tile_bytes: int) -> torch.Tensor:
    """(B, H, R): log-sum-exp of some queries over all their keys."""

    def hide(part: torch.Tensor, queries: slice, keys: slice) -> torch.Tensor:
        wanted = rows.part(queries.start, queries.stop)
        return call.hide(part, wanted, Tokens(keys.start, keys.stop - keys.start))

    query = rows.of(call.query, 1)
    return tiled_logsumexp(query, call.key, call.scale, hide if call.masked else None, tile_bytes)


def _one_hot(call: AttentionCall, rows: Tokens, columns: Tokens) -> Iterator[Part]:
    query, bias = rows.of(call.query, 1), call.bias(rows)
    if call.lists is not None:
        query, bias = call.query, None  # lists are for all queries
    batch, length, kv_heads, dim = call.key.shape
    for start in range(0, columns.count, dim):
        wanted = columns.part(start, start + dim)
        place = wanted.positions(call.key.device)
        value = call.key.new_zeros(batch, length, dim)
        channel = torch.arange(wanted.count, device=place.device)
        value[torch.arange(batch, device=place.device)[:, None], place, channel] = 1.0
        out: Any = attend(
            query,
            call.key,
            value.unsqueeze(2).expand(-1, -1, kv_heads, -1),
            mask=call.lists,
            attn_mask=bias,
            scale=call.scale,
            backend=call.backend,
        )
        if call.lists is not None:
            out = rows.of(out, 1)
        yield Part(0, start, out[..., : wanted.count].transpose(1, 2).to(wide_dtype(out.dtype)))
