"""Controls that act on whole blocks: hooks around the block that an attention module belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffctrl.control.control import Control
from diffctrl.families import Site

# Name of a block's argument -> what it holds, of those that the block's outputs go on from.
Streams = Mapping[str, Tensor]


def block_name(site: Site) -> str:
    """The path of the block that an attention module stands in."""
    return site.name.rpartition(".")[0]


def around_block(block: nn.Module, site: Site, controls: Sequence[Control]) -> list[Any]:
    """Let controls change what a block gets and what it gives; returns handles that take the hooks off."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    streams = site.family.block_streams

    def read(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {}
        for name in streams:
            place = names.index(name)
            value = kwargs[name] if name in kwargs else args[place] if place < len(args) else None
            if value is not None:
                found[name] = value
        return found

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states: Streams = read(args, kwargs)
        for control in controls:
            states = control.enter_block(site, states)
        placed = tuple(states.get(name, value) for name, value in zip(names, args, strict=False))
        return placed, {name: states.get(name, value) for name, value in kwargs.items()}

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        before = read(args, kwargs)
        given = output if isinstance(output, tuple) else (output,)
        # The last joint block of SD3 gives no text.
        states: Streams = {n: part for n, part in zip(streams, given, strict=True) if part is not None}
        for control in controls:
            states = control.leave_block(site, before, states)
        left = tuple(states.get(name) for name in streams)
        return left if isinstance(output, tuple) else left[0]

    return [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave, with_kwargs=True),
    ]
