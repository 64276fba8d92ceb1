"""Whether a mask is the one that a LoRA was trained under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from diffctrl.radial import RadialConfig

# What makes the mask; dense steps do not: there are no steps in training.
MASK_FIELDS = (
    "pattern",
    "block_rule",
    "decay_factor",
    "sink",
    "adjacent",
    "width_base",
    "block",
    "dense_blocks",
)


def tuned(config: RadialConfig, trained: Mapping[str, Any]) -> tuple[RadialConfig, list[str]]:
    """The settings with those that were left at their defaults taken from a LoRA, and what contradicts it.

    >>> config, against = tuned(RadialConfig(decay_factor=0.5), {"decay_factor": 1.0, "block": 64})
    >>> config.block, against
    (64, ['decay_factor=0.5 (trained with 1.0)'])
    """
    defaults = {field.name: field.default for field in fields(RadialConfig)}
    open_, against = {}, []
    for name, value in trained.items():
        given = getattr(config, name)
        if given == value:
            continue
        if given == defaults[name]:
            open_[name] = value
        else:
            against.append(f"{name}={given!r} (trained with {value!r})")
    return replace(config, **open_), against
