"""The heads of a model that can be perturbed, read off its attention modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffctrl.control.install import denoisers
from diffctrl.families import Site, family_of
from diffctrl.softpag import Head
from diffctrl.softpag.headhunt.universe import Universe
from diffctrl.softpag.headset import Signature


def universe_of(target: Any) -> Universe:
    """The universe of a pipeline or a bare denoiser that runs its stock processors.

    Raises:
        ValueError: the pipeline has two denoisers, or none of its attention can be perturbed.
    """
    models = list(denoisers(target).values())
    if len(models) > 1:
        raise ValueError(
            f"{type(target).__name__} has {len(models)} denoisers, and a head set belongs to one; pass "
            "one of them"
        )
    return universe_of_sites(family_of(models[0]).sites(models[0]), type(models[0]).__name__)


def universe_of_sites(sites: Sequence[Site], model_class: str) -> Universe:
    """The universe of attention sites; cross-attention is never perturbed.

    Raises:
        ValueError: none of them can be perturbed.
    """
    places: dict[Head, tuple[str, int]] = {}
    flat = 0
    for site in _acting(sites, model_class):
        layer, stack = site.layer, site.stack if site.stack not in site.family.stacks else None
        if stack is None:
            layer = site.family.flat_layer(list(sites), site)
            flat = max(flat, layer + 1)
        for index in range(site.heads):
            places[Head(layer, index, stack)] = (site.name, index)
    return Universe(tuple(places), places, signature_of_sites(sites, model_class), flat)


def signature_of_sites(sites: Sequence[Site], model_class: str) -> Signature:
    """What identifies the shape of a model with these sites; cheap enough for every step.

    Raises:
        ValueError: none of them can be perturbed.
    """
    stacks: dict[str, list[int]] = {}
    for site in _acting(sites, model_class):
        stacks.setdefault(site.stack, []).append(site.heads)
    return Signature(
        model_class=model_class,
        stacks=tuple((name, len(heads), tuple(heads)) for name, heads in stacks.items()),
    )


def _acting(sites: Sequence[Site], model_class: str) -> list[Site]:
    """The sites that can be perturbed, by stack and layer; stacks that the flat index counts come first."""
    acting = [site for site in sites if site.kind in ("joint", "self")]
    if not acting:
        raise ValueError(f"{model_class} has no joint or self attention that could be perturbed")
    counted = acting[0].family.stacks
    order = [*counted, *sorted({site.stack for site in acting} - set(counted))]
    return sorted(acting, key=lambda site: (order.index(site.stack), site.layer))


__all__ = ["signature_of_sites", "universe_of", "universe_of_sites"]
