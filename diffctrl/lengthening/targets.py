"""Which layers get an adapter."""

from __future__ import annotations

from torch import nn

from diffctrl.families import family_of
from diffctrl.pipelines.length import adaptable

_OWN = ("to_q", "to_k", "to_v", "to_out.0")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def targets(model: nn.Module, *, added: bool, cross: bool) -> tuple[str, ...]:
    """Paths of the query, key, value and output projections of the attention that a length LoRA adapts.

    Args:
        model: a transformer of a supported family.
        added: also the projections of text in joint attention. Whether the paper trained them is unknown.
            HunyuanVideo's single blocks have no output projection of attention alone, and get none.
        cross: also cross-attention, its image branch left out. Whether the paper trained it is unknown.
    """
    family = family_of(model)
    sites = family.sites(model)
    chosen = adaptable(family, sites)
    if cross:
        chosen = [site for site in sites if site in chosen or site.kind == "cross"]
    found = []
    for site in chosen:
        names = _OWN + _ADDED if added and site.kind == "joint" else _OWN
        found += [f"{site.name}.{name}" for name in names if _is_linear(site.module, name)]
    return tuple(found)


def _is_linear(module: nn.Module, path: str) -> bool:
    layer: object = module
    for part in path.split("."):
        layer = getattr(layer, part, None) if not part.isdigit() else _item(layer, int(part))
    return isinstance(layer, nn.Linear)


def _item(layer: object, index: int) -> object:
    return layer[index] if isinstance(layer, nn.ModuleList) and index < len(layer) else None
