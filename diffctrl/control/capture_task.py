"""What is captured of one attention call: its tokens, the route to their weights, the totals they go to."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffctrl.attention.capture import (
    AttentionCall,
    CaptureSpec,
    Route,
    Sink,
    Tokens,
    accumulate,
    choose_route,
    extra_bytes,
    weights,
)
from diffctrl.attention.capture.spec import within
from diffctrl.attention.kernels.sdpa import four_dims
from diffctrl.attention.lists import origin_of
from diffctrl.families import Call, Site, Span

# Additive masks of stock models write -10000 or the least number for "not attended".
_MASKED = -1000.0
Grid = tuple[int, int, int]
# A span of the sequence, and (B, T) which of its tokens stands at each place, where that is another one.
Place = tuple[Span | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where one spec's quantity of a site goes.

    Attributes:
        spec: what is captured.
        total: what it is added to, see `Sink`.
        grid: the image tokens that `total` has room for, where they are another grid than the site's.
    """

    spec: CaptureSpec
    total: Tensor
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Targets that want the same rows, heads, queries and keys of a site: their weights are computed once.

    Attributes:
        batch: the batch rows.
        targets: at least one.
        grid: (frames, rows, columns) of the site's image tokens, or None where no target needs it.
        tile_bytes: of scores at a time.
        room: bytes that a route may need beside its tiles.
        route: the one to take, or None for the cheapest.
    """

    batch: range
    targets: tuple[Target, ...]
    grid: Grid | None
    tile_bytes: int
    room: int
    route: Route | None


class Task:
    """What is captured at one site in the running forward.

    Attributes:
        ticket: its number, and how often it ran, as a tensor: compiled code hands it to an operator, which
            finds the task by the number and counts, so that the call is no dead code.
    """

    def __init__(self, site: Site, groups: Sequence[Group], done: Callable[[Site], None]) -> None:
        self._site, self._groups, self._done = site, tuple(groups), done
        number = next(_NUMBERS)
        self.ticket = torch.tensor([number, 0])
        _TASKS[number] = self

    def run(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor | None,
        attn_mask: Tensor | None,
        text_order: Tensor | None,
        image: Span,
        text: Span | None,
    ) -> None:
        site = self._site
        info = site.context.info
        mask = None if attn_mask is None else four_dims(attn_mask, query, key)
        lists = None if site.mask is None else origin_of(site.mask, (query.shape[1], key.shape[1]))
        whole = AttentionCall(
            query,
            key,
            1.0 / math.sqrt(query.shape[-1]),
            lse,
            mask if lists is None else None,  # the lists carry the valid lengths of the mask
            lists,
            site.family.key_lengths(info, site) if mask is not None else None,
            getattr(site.module.processor, "_attention_backend", None),
        )
        if text is None and site.kind == "cross":
            text = Span(0, key.shape[1])
        for group in self._groups:
            spec = group.targets[0].spec
            order = None if text_order is None else text_order[group.batch.start : group.batch.stop]
            places: dict[str, Place] = {"image": (image, None), "text": (text, order)}
            chosen = _chosen_queries(spec, group.grid)
            rows = _tokens("only_queries", chosen, places[spec.queries], query.device)
            columns = _tokens("only_keys", spec.only_keys, places[spec.keys], query.device)
            valid = None
            if mask is not None and spec.queries == "text":
                valid = _valid(
                    mask if mask.shape[0] == 1 else mask[group.batch.start : group.batch.stop], rows
                )
            self._collect(group, whole.of(group.batch, spec.only_heads), rows, columns, valid)
        self._done(site)

    def _collect(
        self, group: Group, call: AttentionCall, rows: Tokens, columns: Tokens, valid: Tensor | None
    ) -> None:
        route = group.route or choose_route(call, rows.count, columns.count, group.room)
        self._check(route, call, extra_bytes(route, call, rows.count), group.room)
        self._site.context.stats.record_capture(route)
        own = [
            target.total if target.grid is None else _site_total(target, group.grid)
            for target in group.targets
        ]
        sinks = [Sink(target.spec, total) for target, total in zip(group.targets, own, strict=True)]
        accumulate(weights(call, rows, columns, route, group.tile_bytes), sinks, valid, rows.count)
        for target, total in zip(group.targets, own, strict=True):
            if target.grid is not None and group.grid is not None:
                target.total.add_(_resized(target.spec, total, group.grid, target.grid))

    def _check(self, route: Route, call: AttentionCall, needed: int, room: int) -> None:
        """Refuse a route that was asked for and does not work here."""
        name = self._site.name
        if route == "lse" and call.lse is None:
            raise RuntimeError(
                f"route='lse' was asked for, but the kernel of {name} gives no log-sum-exp without a change "
                "of the output; leave route=None, or take 'chunked'"
            )
        if route == "second_call" and call.lists is not None:
            raise RuntimeError(
                f"route='second_call' was asked for, but {name} runs block lists, whose kernel gives the "
                "log-sum-exp itself; leave route=None"
            )
        if needed > room:
            raise ValueError(
                f"route={route!r} needs {needed} bytes in {name}, but max_bytes leaves {room}; leave "
                "route=None, or raise max_bytes"
            )


_NUMBERS = itertools.count(1)
_TASKS: weakref.WeakValueDictionary[int, Task] = weakref.WeakValueDictionary()


# An operator, so that blocks compile in full: what is captured stays outside of their graphs.
@torch.library.custom_op("diffctrl::capture", mutates_args=("ticket",))
def _capture_op(
    ticket: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    text_order: Tensor | None,
    spans: list[int],
) -> None:
    ticket[1] += 1
    _run(ticket, query, key, lse, attn_mask, text_order, spans)


@_capture_op.register_fake
def _(ticket: Tensor, *args: Any) -> None:
    return None


def _run(
    ticket: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    text_order: Tensor | None,
    spans: list[int],
) -> None:
    image, text = Span(spans[0], spans[1]), Span(spans[2], spans[3]) if len(spans) > 2 else None
    _TASKS[int(ticket[0])].run(query, key, lse, attn_mask, text_order, image, text)


def run_task(ticket: Tensor, call: Call, lse: Tensor | None) -> None:
    """Hand a task, named by its ticket, what the kernel was given, and the log-sum-exp that it returned."""
    spans = [call.image.start, call.image.stop]
    if call.text is not None:
        spans += [call.text.start, call.text.stop]
    lse = None if lse is None else lse.detach()
    run: Any = _capture_op if torch.compiler.is_compiling() else _run
    with torch.no_grad():
        run(ticket, call.query.detach(), call.key.detach(), lse, call.attention_mask, call.text_order, spans)


def _chosen_queries(spec: CaptureSpec, grid: Grid | None) -> tuple[int, ...] | None:
    if spec.only_frames is None:
        return spec.only_queries
    assert grid is not None
    size = grid[1] * grid[2]
    frames = within("only_frames", spec.only_frames, grid[0])
    return tuple(frame * size + token for frame in frames for token in range(size))


def _tokens(name: str, only: tuple[int, ...] | None, place: Place, device: torch.device) -> Tokens:
    """Positions in the sequence of some tokens of a place."""
    span, order = place
    assert span is not None
    if only is None and order is None:
        return Tokens(span.start, span.length)
    chosen = within(name, only, span.length)
    if order is not None:
        return Tokens.at(span.start + order.argsort(dim=1).index_select(1, _index(chosen, 0, device)))
    if chosen == tuple(range(chosen[0], chosen[0] + len(chosen))):
        return Tokens(span.start + chosen[0], len(chosen))
    return Tokens.at(_index(chosen, span.start, device))


@lru_cache(maxsize=64)
def _index(chosen: tuple[int, ...], offset: int, device: torch.device) -> Tensor:
    """(n,) on the device; kept, as a copy from the host in every block would cost more than the product."""
    return torch.tensor(chosen, device=device) + offset


def _valid(mask: Tensor, rows: Tokens) -> Tensor:
    """(B, Q) bool, False at padding: a key that nobody attends is padding, and so is its query."""
    attended = mask if mask.dtype == torch.bool else mask > _MASKED
    return rows.of(attended.any(dim=2).any(dim=1), 1)


def _site_total(target: Target, grid: Grid | None) -> Tensor:
    """Zeros like the target's total, with the image queries of the site's own grid."""
    assert grid is not None
    axis = _query_axis(target.spec)
    shape = list(target.total.shape)
    shape[axis] = math.prod(grid)
    return target.total.new_zeros(shape)


def _query_axis(spec: CaptureSpec) -> int:
    return -2 if spec.quantity == "weights" else -1


def _resized(spec: CaptureSpec, total: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Image queries brought to another grid, each frame by bilinear interpolation (DAAM's is bicubic, which
    makes weights below zero)."""
    axis = _query_axis(spec)
    frames = total.movedim(axis, -1).unflatten(-1, grid)
    planes = F.interpolate(frames.flatten(0, -4), size=to[1:], mode="bilinear", align_corners=False)
    return planes.view(*frames.shape[:-2], *to[1:]).flatten(-3).movedim(-1, axis)
