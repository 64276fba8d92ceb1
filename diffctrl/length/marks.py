"""Which length LoRA is at work on an attention module, asked of the module itself.

Adapters are switched, fused and deleted by functions of diffusers and peft that know nothing of masks. So a
mark says only which adapter is a length LoRA; whether it acts is read off the module each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffctrl.length.file import LengthLoRA

_MARK = "diffctrl_length_lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A length LoRA on a model.

    Attributes:
        lora: what it was trained with.
        adapter: its adapter's name.
        strict: whether a mask that does not belong to it is refused, or warned of.
    """

    lora: LengthLoRA
    adapter: str
    strict: bool = True


def mark(modules: Iterable[nn.Module], loaded: Loaded) -> None:
    """Note on attention modules which adapter is a length LoRA."""
    for module in modules:
        setattr(module, _MARK, loaded)


def unmark(modules: Iterable[nn.Module]) -> None:
    """Take the notes off."""
    for module in modules:
        if hasattr(module, _MARK):
            delattr(module, _MARK)


def marked(module: nn.Module) -> Loaded | None:
    """The length LoRA that was noted on an attention module, at work or not."""
    return getattr(module, _MARK, None)


def at_work(module: nn.Module) -> Loaded | None:
    """The length LoRA that acts on an attention module now: active, or merged into its weights.

    Weights that were fused and whose adapter was then unloaded cannot be told from stock ones.
    """
    loaded = marked(module)
    if loaded is None:
        return None
    return loaded if any(_acts(layer, loaded.adapter) for layer in module.children()) else None


def merged(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter is merged into the weights of an attention module."""
    return any(adapter in getattr(layer, "merged_adapters", ()) for layer in module.children())


def _acts(layer: Any, adapter: str) -> bool:
    if adapter not in getattr(layer, "lora_A", ()):
        return False
    if adapter in layer.merged_adapters:
        return True
    on = not layer.disable_adapters and adapter in layer.active_adapters
    return on and layer.scaling[adapter] != 0
