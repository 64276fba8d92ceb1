"""SoftPAG for a search: every perturbed twin of a batch has a head set of its own.

This is what lets HeadHunter score many candidates in one batch (saving a of its specification, 3.4), and run
the conditional prediction that they share once (saving c).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffctrl.control import Context, ControlHandle, Published, Rows, apply
from diffctrl.control.control import Guidance
from diffctrl.control.install import denoisers
from diffctrl.control.prefix import map_kept
from diffctrl.control.twin import prediction_of, with_prediction
from diffctrl.families import ForwardInfo, Site, family_of
from diffctrl.processors.softpag import SoftPAGAttnProcessor
from diffctrl.softpag import Head, SoftPAGConfig
from diffctrl.softpag.headhunt.universe import Universe


@dataclass(slots=True, eq=False)
class Candidates:
    """Which heads each conditional row's twin perturbs, in the batch that runs; set before it is sampled.

    Attributes:
        sets: one head set for each conditional row; where all are empty, no twin is run.
        groups: one number for each conditional row; rows of a number start from the same latents and prompt.
        alike: whether rows of a group are still the same, so that one stands for all of them. True until the
            first perturbed forward of a batch.
        block_calls, block_rows: attention blocks that ran, and the batch rows that went through them.
    """

    sets: tuple[tuple[Head, ...], ...] = ()
    groups: tuple[int, ...] = ()
    alike: bool = False
    block_calls: int = 0
    block_rows: int = 0

    def begin(self, sets: Sequence[Sequence[Head]], groups: Sequence[int], *, shared: bool = True) -> None:
        """A new batch; `shared` runs rows that are alike once."""
        self.sets, self.groups, self.alike = tuple(tuple(each) for each in sets), tuple(groups), shared

    @property
    def perturbs(self) -> bool:
        """Whether the batch has a perturbed row, or none is known yet."""
        return not self.sets or any(self.sets)


class _Guidance:
    """SoftPAG's guidance, at rest while a batch perturbs nothing."""

    def __init__(self, guidance: Guidance, candidates: Candidates) -> None:
        self._guidance, self._candidates = guidance, candidates

    def active(self, context: Context) -> bool:
        return self._candidates.perturbs and self._guidance.active(context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guidance, name)


class CandidateSoftPAGAttnProcessor(SoftPAGAttnProcessor):
    """`SoftPAGAttnProcessor` whose heads come per batch row from `candidates`, outside of the processor.

    Args:
        universe: of the model.
        candidates: what the running batch perturbs.
        config: u, w, scope and kind; its heads are not read.
    """

    def __init__(self, universe: Universe, candidates: Candidates, config: SoftPAGConfig) -> None:
        super().__init__(config=config)
        self._universe, self._candidates = universe, candidates
        self._resting: Any = _Guidance(super().guidance, candidates)

    @property
    def guidance(self) -> Any:
        return self._resting

    def describe(self) -> str:
        config = self.config
        return f"headhunt({len(self._universe.heads)} heads, u={config.strength:g}, w={config.scale:g})"

    def check(self, sites: Sequence[Site]) -> None:
        # The base resolves `config.heads`, which is not read here, but its rules on settings hold.
        super().check(sites)
        if self.config.query_mean == "txt" and any(head.stack is not None for head in self._universe.heads):
            raise ValueError("query_mean='txt' needs text tokens among the queries of every stack; use 'img'")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Every site of the universe; while a batch runs, those that it perturbs (where a prefix ends)."""
        heads = [head for each in self._candidates.sets for head in each] or self._universe.heads
        named = {self._universe.places[head][0] for head in heads}
        return [site for site in sites if site.name in named]

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        rows, info = context.rows, context.info
        if rows is None or info is None or rows.perturbed[0] == rows.perturbed[1]:
            return None
        sets = self._candidates.sets
        twins = rows.perturbed[1] - rows.perturbed[0]
        if len(sets) != twins:
            raise RuntimeError(
                f"the batch has {twins} conditional rows, but {len(sets)} head sets were given"
            )
        alike = self._candidates.alike
        first = len(_leaders(rows, self._candidates.groups)[0]) if alike else rows.perturbed[0]
        key = (sets, first, info.device)
        if previous is not None and previous.key == key:
            return previous
        weights: dict[str, Tensor] = {}
        for row, heads in enumerate(sets):
            for head in heads:
                name, index = self._universe.places[head]
                if name not in weights:
                    weights[name] = torch.zeros(twins, context.sites[name].heads)
                weights[name][row, index] = self.config.strength
        return Published(key, {name: self._made(weight, first, info) for name, weight in weights.items()})

    def _made(self, weight: Tensor, first: int, info: ForwardInfo) -> Any:
        """What the base reads at a site, from (twins, H): the rows before the twins stay as they are."""
        if self._plain:
            return torch.cat([weight.new_zeros(first, weight.shape[1]), weight]).to(info.device)
        heads = weight.any(0).nonzero()[:, 0]
        return weight[:, heads].to(info.device), heads.to(info.device)


def _leaders(rows: Rows, groups: Sequence[int]) -> tuple[list[int], list[int]]:
    """(rows that stand for the others while they are alike, the place among them of each stock row).

    A pair of prompt and seed has one unconditional and one conditional row that do.
    """
    leaders: list[int] = []
    places: list[int] = []
    for start, stop in (rows.uncond, rows.cond):
        first: dict[int, int] = {}
        for row, group in zip(range(start, stop), groups, strict=False):
            if group not in first:
                first[group] = len(leaders)
                leaders.append(row)
            places.append(first[group])
    return leaders, places


def take_rows(value: Any, total: int, index: Tensor) -> Any:
    """Some rows of every batched tensor in a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 or value.shape[0] != total else value[index.to(value.device)]
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(item, total, index) for item in value)
    if isinstance(value, dict):
        return {name: take_rows(item, total, index) for name, item in value.items()}
    return value


class _SharedFirst:
    """Runs the rows that are alike once: up to and in the first perturbed forward of a batch.

    Its hooks lie inside of the context's: the batch has its twins when it is cut, and is whole again before
    the guidance is made. A twin that runs as a forward of its own follows the conditional one, whole.
    """

    def __init__(self, context: Context, candidates: Candidates, family: Any) -> None:
        self._context, self._candidates, self._family = context, candidates, family
        self._restore: Tensor | None = None

    def before(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        rows, family = self._context.rows, self._family
        self._restore = None
        if rows is None or not self._candidates.alike:
            return None
        twins = range(*rows.perturbed)
        self._candidates.alike = not twins and self._candidates.perturbs
        leaders, places = _leaders(rows, self._candidates.groups)
        call = family.bind(model, args, kwargs)
        if not leaders or family.auxiliary(call):
            return None
        index = torch.tensor([*leaders, *twins])
        for name in family.batched:
            if name in call:
                _check_alike(name, call[name], rows, leaders, places)
                call[name] = take_rows(call[name], rows.total, index)
        for name in family.grouped:
            if call.get(name) is not None:
                grouped = call[name].unflatten(0, (rows.total, -1))
                call[name] = take_rows(grouped, rows.total, index).flatten(0, 1)
        self._restore = torch.tensor([*places, *range(len(leaders), len(index))])
        return (), call

    def after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        restore = self._restore
        if restore is None:
            return None
        self._restore = None
        ran = int(restore.max()) + 1
        if ran < len(restore):  # a twin that starts at a later block reads what all rows had before it
            map_kept(model, lambda value: take_rows(value, ran, restore))
        return with_prediction(output, take_rows(prediction_of(output), ran, restore))


def _check_alike(name: str, value: Any, rows: Rows, leaders: list[int], places: list[int]) -> None:
    """Refuse a batch in which a row differs from the one that would stand for it."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != rows.total:
        return
    standing = value[torch.tensor([leaders[place] for place in places], device=value.device)]
    if not torch.equal(value[: len(places)], standing):
        raise RuntimeError(f"{name}: the rows of a batch of candidates start from different values")


@contextmanager
def hunting(
    target: Any, universe: Universe, candidates: Candidates, config: SoftPAGConfig
) -> Iterator[ControlHandle]:
    """Put the candidate processor on a pipeline for the length of a search, and count its blocks."""
    (model,) = denoisers(target).values()
    family = family_of(model)
    with apply(target, CandidateSoftPAGAttnProcessor(universe, candidates, config)) as control:
        (context,) = control.contexts.values()
        shared = _SharedFirst(context, candidates, family)
        before: Any = torch.compiler.disable(shared.before)
        after: Any = torch.compiler.disable(shared.after)
        handles: list[Any] = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, prepend=True),
        ]
        counted = {name for name, site in context.sites.items() if site.stack in family.stacks}
        handles += [
            context.sites[name].module.register_forward_pre_hook(_counter(candidates), with_kwargs=True)
            for name in counted & {name for name, _ in universe.places.values()}
        ]
        try:
            yield control
        finally:
            candidates.sets = ()
            for handle in handles:
                handle.remove()


def _counter(candidates: Candidates) -> Any:
    def count(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        candidates.block_calls += 1
        candidates.block_rows += states.shape[0]

    return torch.compiler.disable(count)


__all__ = ["CandidateSoftPAGAttnProcessor", "Candidates", "hunting", "take_rows"]
