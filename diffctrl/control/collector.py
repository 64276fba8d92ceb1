"""Keeps what a capture asks for off the forwards of one model: buffers, their bytes, whole forwards, results.

Totals are made, and their bytes checked, before each forward. Only forwards in which every captured block ran
count: what a forward that failed, or that left blocks out, has left behind is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffctrl.attention.capture import CaptureResult, CaptureSpec, Route
from diffctrl.attention.capture.reduce import quantity_shape
from diffctrl.attention.capture.spec import within
from diffctrl.control.capture_task import Grid, Group, Target, Task
from diffctrl.control.context import Context
from diffctrl.families import Site

# Of scores at a time, where max_bytes leaves room for it. On a CPU tiles that leave the cache take up to
# twice as long (measured, 1 to 32 MiB).
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
_TILES = 3  # of the bytes of a tile are in use at a time: scores, mask and exponential


def eligible_sites(spec: CaptureSpec, sites: Sequence[Site]) -> list[Site]:
    """The attention modules that a spec speaks of, in the order of their block indices.

    Raises:
        ValueError: the model has no attention of these queries over these keys.
    """
    family = sites[0].family
    kinds = {site.kind for site in sites}
    kind = "joint" if "joint" in kinds else "cross" if spec.keys == "text" else "self"
    found = [site for site in sites if site.kind == kind and (site.stack in family.stacks or kind == "cross")]
    if not found or (kind != "joint" and spec.queries == "text"):
        raise ValueError(
            f"{family.title} has no attention of {spec.queries} queries over {spec.keys} keys; its kinds of "
            f"attention are {', '.join(sorted(kinds - {'text'}))}."
        )
    stacks = family.stacks

    def place(site: Site) -> tuple[int, int]:
        return (stacks.index(site.stack) if site.stack in stacks else len(stacks)), site.layer

    return sorted(found, key=place)


def chosen_sites(spec: CaptureSpec, sites: Sequence[Site]) -> dict[int, Site]:
    """The captured attention modules by block index.

    Raises:
        ValueError: a block or a head does not exist.
    """
    found = eligible_sites(spec, sites)
    chosen = {index: found[index] for index in spec.chosen_blocks(len(found))}
    for index, site in chosen.items():
        try:
            within("only_heads", spec.only_heads, site.heads)
        except ValueError as error:
            raise ValueError(f"block {index} ({site.name}): {error}") from None
    if spec.heads == "each" and len({site.heads for site in chosen.values()}) > 1:
        raise ValueError(
            "heads='each' needs blocks with one number of heads, but the chosen ones have "
            f"{sorted({site.heads for site in chosen.values()})}; choose some with only_blocks."
        )
    return chosen


@dataclass(frozen=True, slots=True)
class _Size:
    """Shape of the total of one forward, and what is captured for it: batch rows, heads, keys."""

    shape: tuple[int, ...]
    rows: int
    heads: int
    keys: int


@dataclass(slots=True, eq=False)
class _Entry:
    """One spec on one model."""

    spec: CaptureSpec
    blocks: dict[int, Site]
    totals: list[Tensor] = field(default_factory=list)  # one of all forwards, or one of each
    steps: list[int | None] = field(default_factory=list)  # of the forwards in them
    grid: Grid | None = None
    running: Tensor | None = None  # the total of the forward that runs
    step: int | None = None
    pending: set[str] = field(default_factory=set)  # captured blocks that it has not run yet
    dropped: int = 0

    def done(self, site: Site) -> None:
        if site.name not in self.pending:
            return
        self.pending.discard(site.name)
        if self.pending or self.running is None:
            return
        self.steps.append(self.step)
        if self.totals and self.spec.steps != "each":
            self.totals[0] += self.running
        else:
            self.totals.append(self.running)
            self.running = None

    def bytes(self, size: _Size, total_steps: int | None) -> int:
        """Of all totals, once the run is over."""
        if self.spec.steps == "each":
            steps = len(self.spec.only_steps) if self.spec.only_steps else total_steps or 1
            count = max(steps, len(self.totals) + 1)
        else:
            count = 2  # the running forward is added when it is whole
        return 4 * math.prod(size.shape) * count

    def value(self) -> Tensor:
        forwards = len(self.steps) if self.spec.steps == "mean" else 1
        blocks = len(self.blocks) if self.spec.blocks == "mean" else 1
        total = torch.stack(self.totals, dim=1) if self.spec.steps == "each" else self.totals[0]
        return total / (forwards * blocks)


class Collector:
    """What some specs keep of the forwards of one model.

    Args:
        specs: by name.
        sites: of the model.
        max_bytes: of all totals and of the working memory; more is refused before a forward.
        route: to the weights, or None for the cheapest in each block.

    Raises:
        ValueError: a spec does not fit the model.
    """

    def __init__(
        self, specs: Mapping[str, CaptureSpec], sites: Sequence[Site], max_bytes: int, route: Route | None
    ) -> None:
        self.entries = {name: _Entry(spec, chosen_sites(spec, sites)) for name, spec in specs.items()}
        self._max_bytes = max_bytes
        self._route: Route | None = route
        self._tasks: dict[str, Task] = {}

    def begin(self, context: Context) -> dict[str, Tensor]:
        """Make room for the forward that begins; the ticket of each captured site."""
        active = [(name, e, rows) for name, e in self.entries.items() if (rows := self._start(e, context))]
        if not active:
            self._tasks = {}
            return {}
        sizes = {name: _size(entry, context, len(rows)) for name, entry, rows in active}
        tile_bytes, room = self._bytes(context, [(n, e, sizes[n]) for n, e, _ in active])
        groups: dict[str, dict[tuple, tuple[range, list[Target]]]] = {}
        for name, entry, rows in active:
            spec, total = entry.spec, self._zeros(name, entry, sizes[name].shape, context)
            key = (rows, spec.queries, spec.keys, spec.only_queries, spec.only_frames, spec.only_keys,
                   spec.only_heads)  # fmt: skip
            for place, site in enumerate(entry.blocks.values()):
                part = total[:, place] if spec.blocks == "each" else total
                grid = _site_grid(context, site) if _needs_grid(spec) else None
                other = entry.grid if grid is not None and entry.grid != grid else None
                found = groups.setdefault(site.name, {}).setdefault(key, (rows, []))
                found[1].append(Target(spec, part, other if _image_queries(spec) else None))
        sites = {site.name: site for _, entry, _ in active for site in entry.blocks.values()}
        self._tasks = {
            name: Task(
                sites[name],
                [
                    Group(
                        rows,
                        tuple(targets),
                        _grid_of(targets, context, sites[name]),
                        tile_bytes,
                        room,
                        self._route,
                    )
                    for rows, targets in found.values()
                ],
                self._done,
            )
            for name, found in groups.items()
        }
        return {name: task.ticket for name, task in self._tasks.items()}

    @property
    def is_done(self) -> bool:
        """Whether the running forward has run every block that is captured in it."""
        return not any(entry.pending for entry in self.entries.values())

    def _done(self, site: Site) -> None:
        for entry in self.entries.values():
            entry.done(site)

    @staticmethod
    def _start(entry: _Entry, context: Context) -> range | None:
        """The batch rows that an entry captures in this forward, None where it rests."""
        if entry.pending:
            entry.dropped += 1
            entry.pending = set()
        spec, rows = entry.spec, context.rows
        if rows is None or context.auxiliary:
            return None
        if spec.only_steps is not None:
            if context.step is None:
                raise RuntimeError(
                    f"{context.model_name}: only_steps needs the denoising step, but no scheduler is known; "
                    "capture from the pipeline instead of the bare model, or pass scheduler=..."
                )
            if context.step not in spec.only_steps:
                return None
        spans = {"cond": [rows.cond], "uncond": [rows.uncond], "all": [rows.cond, rows.uncond]}[spec.rows]
        spans = [span for span in spans if span[0] < span[1]]
        if not spans:
            return None
        entry.step, entry.pending = context.step, {site.name for site in entry.blocks.values()}
        return range(min(span[0] for span in spans), max(span[1] for span in spans))

    def _bytes(self, context: Context, active: list[tuple[str, _Entry, _Size]]) -> tuple[int, int]:
        """Bytes of scores at a time, and what is left for a route to work in, after what the totals need.

        Raises:
            ValueError: max_bytes leaves no room beside the totals.
        """
        assert context.info is not None
        needed = {name: entry.bytes(size, context.total_steps) for name, entry, size in active}
        room = self._max_bytes - sum(needed.values())
        # Tiles hold at least one query, with all its heads and keys.
        least = max(_TILES * 4 * size.rows * size.heads * size.keys for _, _, size in active)
        if room < least:
            name, entry, size = max(active, key=lambda each: needed[each[0]])
            names = [axis.replace("query", "querie") for axis in _axes(entry.spec)]
            axes = ", ".join(f"{count} {axis}s" for count, axis in zip(size.shape, names, strict=True))
            raise ValueError(
                f"this capture needs {_mib(sum(needed.values()))} for its totals and at least {_mib(least)} "
                f"to work in, more than max_bytes={self._max_bytes} ({_mib(self._max_bytes)}). The most, "
                f"{_mib(needed[name])}, goes to {name!r}: {axes} in float32"
                f"{', for each step' if entry.spec.steps == 'each' else ''}. Keep fewer tokens "
                "(only_keys, only_queries, only_frames), reduce heads, blocks or steps by 'mean', choose "
                "fewer of them, take a mass instead of weights, or raise max_bytes."
            )
        most = _TILE_BYTES.get(context.info.device.type, _TILE_BYTES["cuda"])
        tile = min(most, room // _TILES)
        return tile, room - _TILES * tile

    @staticmethod
    def _zeros(name: str, entry: _Entry, shape: tuple[int, ...], context: Context) -> Tensor:
        """Zeros for the forward that begins."""
        assert context.info is not None
        known = entry.totals[0].shape if entry.totals else shape
        if tuple(known) != shape:
            raise RuntimeError(
                f"the capture {name!r} holds totals of shape {tuple(known)}, and this forward of "
                f"{context.model_name} would add {shape}; take one capture for each size, or reset() between"
            )
        if entry.running is not None and tuple(entry.running.shape) == shape:
            return entry.running.zero_()
        entry.running = torch.zeros(shape, dtype=torch.float32, device=context.info.device)
        return entry.running

    def result(self, name: str) -> CaptureResult:
        """What the whole forwards gave.

        Raises:
            RuntimeError: there was none.
        """
        entry = self.entries[name]
        if not entry.steps:
            begun = entry.dropped + bool(entry.pending)
            raise RuntimeError(
                f"nothing was captured for {name!r}: {begun} forwards began with rows={entry.spec.rows!r} "
                f"and none ran all of its {len(entry.blocks)} blocks. Run the model inside the capture, with "
                "rows that it has, and without a cache that leaves blocks out"
            )
        axes = list(_axes(entry.spec))
        if entry.spec.steps == "each":
            axes.insert(1, "step")
        sites = tuple(site.name for site in entry.blocks.values())
        grid = entry.grid
        if grid is not None and entry.spec.only_frames is not None and _image_queries(entry.spec):
            grid = (len(entry.spec.only_frames), *grid[1:])
        return CaptureResult(
            entry.value(), tuple(axes), entry.spec, tuple(entry.blocks), sites, tuple(entry.steps), grid
        )

    def reset(self) -> None:
        """Forget what was captured."""
        for entry in self.entries.values():
            entry.totals, entry.steps, entry.pending, entry.dropped = [], [], set(), 0


def _mib(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"


def _axes(spec: CaptureSpec) -> tuple[str, ...]:
    """Names of the axes of the total of one forward."""
    each = [name for name, reduce in (("block", spec.blocks), ("head", spec.heads)) if reduce == "each"]
    last = {"weights": ("query", "key"), "row_mass": ("query",)}.get(spec.quantity, ("key",))
    return ("row", *each, *last)


def _image_queries(spec: CaptureSpec) -> bool:
    """Whether the quantity has an axis of image queries."""
    return spec.queries == "image" and spec.quantity in ("weights", "row_mass")


def _needs_grid(spec: CaptureSpec) -> bool:
    return _image_queries(spec) or spec.keys == "image" or spec.only_frames is not None


def _site_grid(context: Context, site: Site) -> Grid:
    return site.family.site_grid(context.grid(), site)


def _grid_of(targets: Sequence[Target], context: Context, site: Site) -> Grid | None:
    return _site_grid(context, site) if any(_needs_grid(target.spec) for target in targets) else None


def _size(entry: _Entry, context: Context, rows: int) -> _Size:
    """What one forward captures; notes the grid of its image tokens."""
    spec, sites, info = entry.spec, list(entry.blocks.values()), context.info
    assert info is not None
    if "text" in (spec.queries, spec.keys) and not info.text_length:
        raise RuntimeError(
            f"{context.model_name} got no text in this call, but the capture asks for text tokens"
        )
    counts = {"text": info.text_length or 0, "image": 0}
    if _needs_grid(spec):
        grids = {_site_grid(context, site) for site in sites}
        entry.grid = max(grids, key=math.prod)
        counts["image"] = math.prod(entry.grid)
        if len(grids) > 1:
            _check_resizable(spec, grids)
    keys = len(within("only_keys", spec.only_keys, counts[spec.keys]))
    queries = 0  # image queries of a mass or an entropy of columns need not be counted beforehand
    if spec.only_frames is not None and entry.grid is not None:
        frames = within("only_frames", spec.only_frames, entry.grid[0])
        queries = len(frames) * entry.grid[1] * entry.grid[2]
    elif counts[spec.queries]:
        queries = len(within("only_queries", spec.only_queries, counts[spec.queries]))
    heads = len(spec.only_heads) if spec.only_heads else max(site.heads for site in sites)
    each = [len(sites)] if spec.blocks == "each" else []
    each += [heads] if spec.heads == "each" else []
    return _Size((rows, *each, *quantity_shape(spec, queries, keys)), rows, heads, keys)


def _check_resizable(spec: CaptureSpec, grids: set[Grid]) -> None:
    if not _image_queries(spec) or spec.keys == "image" or spec.only_queries is not None:
        raise ValueError(
            f"the chosen blocks see image tokens on the grids {sorted(grids)}, and only image queries in "
            "full over text keys can be brought to one; choose blocks of one grid with only_blocks."
        )
