"""All heads that can be perturbed, read off a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffctrl.softpag.heads import Head
from diffctrl.softpag.headset import Signature

if TYPE_CHECKING:
    from diffctrl.families import Site
    from diffctrl.softpag.headhunt.jobs import Job


@dataclass(frozen=True, slots=True)
class Universe:
    """The candidates of a search.

    Attributes:
        heads: ordered by (stack, layer, head), which is also how ties are broken. Stacks that the flat index
            counts come first and are named by it; others (SD3.5's second attention) by their own name.
        places: head -> (name of its attention module, index of the head there).
        signature: what identifies the model's shape.
        layers: number of layers in flat order; a head's depth for prefix reuse and for the heat map.
    """

    heads: tuple[Head, ...]
    places: dict[Head, tuple[str, int]]
    signature: Signature
    layers: int

    @classmethod
    def of(cls, target: Any) -> Universe:
        """The universe of a pipeline or a bare denoiser that runs its stock processors.

        Raises:
            ValueError: the pipeline has two denoisers, or none of its attention can be perturbed.
        """
        from diffctrl.control.install import denoisers
        from diffctrl.families import family_of

        models = list(denoisers(target).values())
        if len(models) > 1:
            raise ValueError(
                f"{type(target).__name__} has {len(models)} denoisers, and a head set belongs to one; pass "
                "one of them"
            )
        return cls.of_sites(family_of(models[0]).sites(models[0]), type(models[0]).__name__)

    @classmethod
    def of_sites(cls, sites: Sequence[Site], model_class: str) -> Universe:
        """The universe of attention sites; cross-attention is never perturbed."""
        acting = [site for site in sites if site.kind in ("joint", "self")]
        if not acting:
            raise ValueError(f"{model_class} has no joint or self attention that could be perturbed")
        counted = acting[0].family.stacks
        order = [*counted, *sorted({site.stack for site in acting} - set(counted))]
        acting.sort(key=lambda site: (order.index(site.stack), site.layer))
        places: dict[Head, tuple[str, int]] = {}
        stacks: dict[str, list[int]] = {}
        flat = 0
        for site in acting:
            stacks.setdefault(site.stack, []).append(site.heads)
            layer, stack = site.layer, site.stack if site.stack not in counted else None
            if stack is None:
                layer = site.family.flat_layer(list(sites), site)
                flat = max(flat, layer + 1)
            for index in range(site.heads):
                places[Head(layer, index, stack)] = (site.name, index)
        signature = Signature(
            model_class=model_class,
            stacks=tuple((name, len(heads), tuple(heads)) for name, heads in stacks.items()),
        )
        return cls(tuple(places), places, signature, flat)

    def depth(self, job: Job) -> int:
        """The first layer that a job perturbs; a job without heads comes last."""
        return min((head.layer for head in job.heads), default=self.layers)
