"""Whether a mask is the one that a LoRA was trained under."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from diffctrl.radial import RadialConfig

# The part of a run whose noise levels a LoRA was trained on with dense attention; older files do not say. A
# default and no more: another number of dense steps is no other mask.
DENSE = "dense_fraction"
# What makes the mask.
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


def tuned(
    config: RadialConfig, trained: Mapping[str, Any], given: Collection[str] = ()
) -> tuple[RadialConfig, list[str]]:
    """The settings with those that were left at their defaults taken from a LoRA, and what contradicts it.

    Args:
        config: the settings.
        trained: the LoRA's `MASK_FIELDS`, perhaps with `DENSE`.
        given: names of settings that were not left, where that is known: a default may be what is wanted.

    >>> config, against = tuned(RadialConfig(decay_factor=0.5), {"decay_factor": 1.0, "block": 64})
    >>> config.block, against
    (64, ['decay_factor=0.5 (trained with 1.0)'])
    """
    defaults = {field.name: field.default for field in fields(RadialConfig)}
    open_, against = {}, []
    for name, value in trained.items():
        own = getattr(config, name)
        if own == value or (name == DENSE and (own, config.dense_steps) != (None, None)):
            continue
        if own == defaults[name] and name not in given:
            open_[name] = value
        else:
            against.append(f"{name}={own!r} (trained with {value!r})")
    return replace(config, **open_), against
