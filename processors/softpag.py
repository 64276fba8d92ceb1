"""SoftPAG: perturbed attention guidance, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffctrl.control import Context, Contributions, Published
from diffctrl.families import Call, Site
from diffctrl.processors.base import ControlAttnProcessor, published
from diffctrl.softpag import Head, SoftPAGConfig, blend_identity, parse_heads, perturbation_delta


class _Guidance:
    """e + s (c - e) + w (c - p) through perturbed twin rows."""

    def __init__(self, config: SoftPAGConfig) -> None:
        self._config = config

    def active(self, context: Context) -> bool:
        config = self._config
        if config.u == 0 or config.w == 0:
            return False
        if config.start_fraction == 0 and config.stop_fraction == 1:
            return True  # a window over the whole run needs no scheduler
        return config.start_fraction <= context.fraction() < config.stop_fraction

    def delta(self, cond: Tensor, perturbed: Tensor) -> Tensor:
        return perturbation_delta(cond, perturbed, self._config.w)


class SoftPAGAttnProcessor(ControlAttnProcessor):
    """Guides sampling with a twin whose chosen attention heads look at themselves.

    Args:
        config: the settings; keywords change single fields, as in `SoftPAGAttnProcessor("L3H1,L3H2", u=0.5)`.
        heads: shortcut for `config.heads`.

    Raises:
        ValueError: a setting is out of range, or (when applied) a head does not exist in the model.

    Source: arXiv 2506.10978, section 4. Twin rows run in the same batch, so that one more row per conditional
    row is computed, in guided steps only.
    """

    method = "softpag"
    contributes = Contributions(output=True, guides=True)

    def __init__(self, heads: Any = None, *, config: SoftPAGConfig | None = None, **settings: Any) -> None:
        super().__init__()
        config = config or SoftPAGConfig()
        if heads is not None:
            settings["heads"] = heads
        self.config = replace(config, **settings) if settings else config
        self._guidance = _Guidance(self.config)

    @property
    def guidance(self) -> _Guidance:
        return self._guidance

    def describe(self) -> str:
        config = self.config
        heads = "default" if config.heads is None else ",".join(map(str, config.heads))
        return f"softpag(heads={heads}, u={config.u:g}, w={config.w:g}, scope={config.scope})"

    def check(self, sites: Sequence[Site]) -> None:
        self._strengths(sites)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        strengths = self._strengths(sites)
        return [site for site in sites if site.name in strengths]

    def _strengths(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """(H,) strength per site that has a chosen head, by site name."""
        family = sites[0].family
        by_index: dict[tuple[str | None, int], Site] = {}
        for site in sites:
            if self.acts_on(site):
                by_index[site.stack, site.layer] = site
                if site.stack in family.stacks:
                    by_index[None, family.flat_layer(list(sites), site)] = site
        flat = sorted(layer for stack, layer in by_index if stack is None)
        if self.config.heads is not None:
            heads = parse_heads(self.config.heads)
        else:  # PAG's own place in a UNet is the middle block; a transformer has none
            middle = tuple(Head(layer, stack="mid") for stack, layer in by_index if stack == "mid")
            heads = middle or (Head(flat[len(flat) * 3 // 8]),)
        strengths: dict[str, Tensor] = {}
        for head in heads:
            site = by_index.get((head.stack, head.layer))
            if site is None or (head.head is not None and head.head >= site.heads):
                stacks = sorted({stack for stack, _ in by_index if stack})
                raise ValueError(
                    f"head {head} does not exist in this {family.title} model: layers L0-L{flat[-1]}, "
                    f"{by_index[None, flat[0]].heads} heads each, stacks {', '.join(stacks)}"
                )
            strength = strengths.setdefault(site.name, torch.zeros(site.heads))
            strength[slice(None) if head.head is None else head.head] = self.config.u
        return strengths

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        rows, info = context.rows, context.info
        if rows is None or info is None or rows.perturbed[0] == rows.perturbed[1]:
            return None
        key = (rows, info.device)
        if previous is not None and previous.key == key:
            return previous
        weights = {}
        for name, strength in self._strengths(list(context.sites.values())).items():
            weight = torch.zeros(rows.total, len(strength))
            weight[rows.perturbed[0] :] = strength
            weights[name] = weight.to(info.device)
        return Published(key, weights)

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        weight = published(site, self)
        if weight is None:
            return output
        rows = None if self.config.scope == "joint" else (call.image.start, call.image.stop)
        return blend_identity(output, call.value, weight, rows)
