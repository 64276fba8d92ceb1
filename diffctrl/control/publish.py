"""Hands every site what the controls prepared for the running forward."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import and_
from typing import Any

import torch

from diffctrl.attention import BlockLists
from diffctrl.control.context import Context
from diffctrl.control.control import Control, Published, check_composition, check_control
from diffctrl.families import Family, Site

_BLOCK = 128  # of dense attention as lists: what kernels want


class Publisher:
    """Hands every site what the controls prepared, so that compiled code reads it without recompiling."""

    def __init__(self, sites: Sequence[Site], family: Family) -> None:
        self._sites, self._family = sites, family
        self._checked: list[Control] = []
        self._prepared: dict[str, Published | None] = {}
        # Least recently used first. A pipeline's two passes have texts of other lengths, hence other masks.
        self._masks: OrderedDict[tuple, BlockLists] = OrderedDict()

    def controls(self) -> list[Control]:
        """The controls of the processors that the sites carry now, checked once where they are new."""
        carried = []
        for site in self._sites:
            if site.installed is not None and site.module.processor is not site.installed:
                raise RuntimeError(
                    f"{site.name} runs {type(site.module.processor).__name__} instead of the processor that "
                    "diffctrl put there, so that the control would do nothing; take the control off first "
                    "(`remove()`), change the model, and apply again"
                )
            carried.extend(getattr(site.module.processor, "controls", ()))
        controls = list({id(control): control for control in carried}.values())
        if controls != self._checked:  # `model.set_attn_processor` puts them on without `apply`
            check_composition(controls)
            for control in controls:
                check_control(control, self._family, self._sites)
            self.clear()
            self._checked = controls
        return controls

    def clear(self) -> None:
        """Forget what was published; a handle that outlives its control holds no tensors."""
        for site in self._sites:
            site.published.clear()
            site.mask = site.valid_keys = None
        self._checked, self._prepared = [], {}
        self._masks.clear()

    def publish(self, context: Context, controls: Sequence[Control]) -> None:
        prepared = {c.method: c.prepare(context, self._prepared.get(c.method)) for c in controls}
        self._prepared = prepared
        for site in self._sites:
            for method, value in prepared.items():
                site.published[method] = None if value is None else value.sites.get(site.name)
            site.mask = self._mask(context, site, list(prepared.values()))
            site.valid_keys = self._valid_keys(context, site)
        used = len({id(lists) for site in self._sites for lists in (site.mask, site.valid_keys)})
        while len(self._masks) > 2 * used + 2:
            self._masks.popitem(last=False)
        context.masked_forwards += any(site.mask is not None for site in self._sites)

    def _mask(self, context: Context, site: Site, prepared: list[Published | None]) -> Any:
        """The blocks that every control attends, cut to the valid text of each row; on the device."""
        parts = [p.masks[site.name] for p in prepared if p is not None and site.name in p.masks]
        info = context.info
        if not parts or info is None:
            return None
        lengths = self._family.key_lengths(info, site)
        key = (*parts, lengths)
        lists = self._masks.get(key)
        if lists is None:
            lists = reduce(and_, parts)
            if lengths is not None:
                lists = replace(lists, n_valid=_valid(lengths, lists.lengths[1]))
        return self._kept(key, lists).on(info.device)

    def _valid_keys(self, context: Context, site: Site) -> Any:
        """All valid keys of each row as lists, for a GPU; on a CPU the stock mask is as good."""
        info = context.info
        if site.mask is not None or info is None or not reads_lists(info.device):
            return None
        lengths = self._family.key_lengths(info, site)
        if lengths is None or info.grid is None or not getattr(site.module.processor, "controls", ()):
            return None
        total = math.prod(info.grid) + (info.text_length or 0)
        key = (total, lengths)
        lists = self._masks.get(key)
        if lists is None:
            lists = BlockLists.full((_BLOCK, _BLOCK), (total, total), n_valid=_valid(lengths, total))
        return self._kept(key, lists).on(info.device)

    def _kept(self, key: tuple, lists: BlockLists) -> BlockLists:
        self._masks[key] = lists
        self._masks.move_to_end(key)
        return lists


def _valid(lengths: tuple[int, ...], total: int) -> torch.Tensor | None:
    """Valid keys of each row, or None where all are: kernels without lengths are the faster ones."""
    return None if min(lengths) == total else torch.tensor(lengths, dtype=torch.int32)


def reads_lists(device: torch.device) -> bool:
    """Whether kernels over block lists are faster there than dense ones with a mask."""
    return device.type == "cuda"
