"""SoftPAG: perturbed attention guidance, head by head."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from diffctrl.control import Context, Contributions, Published, Rows
from diffctrl.families import Call, Site
from diffctrl.processors.base import ControlAttnProcessor, published
from diffctrl.processors.universe import signature_of_sites
from diffctrl.softpag import (
    Head,
    SoftPAGConfig,
    blend_identity,
    blend_zero,
    guidance_delta,
    library,
    perturb,
    rescaled,
)
from diffctrl.softpag.config import LAYER_KINDS
from diffctrl.softpag.headset import HeadSet
from diffctrl.softpag.layers import faded, reordered, shuffled


class _Guidance:
    """e + s (c - e) + w (c - p) through perturbed twin rows."""

    def __init__(self, config: SoftPAGConfig) -> None:
        self._config = config

    def active(self, context: Context) -> bool:
        config = self._config
        if config.rests:
            return False
        return config.covers_all or config.covers(context.fraction())

    @property
    def mode(self) -> str:
        return self._config.mode

    @property
    def rescales(self) -> bool:
        return self._config.rescale != 0

    @property
    def remembers(self) -> bool:
        return bool(self._config.apg_momentum)

    def delta(
        self, context: Context, cond: Tensor, perturbed: Tensor, memory: MutableMapping[str, Any]
    ) -> Tensor:
        config = settled(self._config, list(context.sites.values()))
        return guidance_delta(config, cond, perturbed, memory)

    def finish(self, prediction: Tensor, cond: Tensor) -> Tensor:
        return rescaled(prediction, cond, self._config.rescale)


class SoftPAGAttnProcessor(ControlAttnProcessor):
    """Guides sampling with a twin whose chosen attention heads look at themselves.

    Args:
        config: the settings; keywords change single fields, as in `SoftPAGAttnProcessor("L3H1,L3H2", u=0.5)`.
        heads: shortcut for `config.heads`.

    Raises:
        ValueError: a setting is out of range, or (when applied) a head does not exist in the model.

    Source: arXiv 2506.10978, section 4. One more row per conditional row is computed, in guided steps only.
    Targets that are made from the scores cost a second attention of the chosen heads of those rows.
    """

    method = "softpag"

    def __init__(self, heads: Any = None, *, config: SoftPAGConfig | None = None, **settings: Any) -> None:
        super().__init__()
        config = config or SoftPAGConfig()
        if heads is not None:
            settings["heads"] = heads
        self.config = replace(config, **settings) if settings else config
        self._guidance = _Guidance(self.config)
        layers = self.config.kind in LAYER_KINDS
        self.contributes = Contributions(
            output=not layers,
            guides=True,
            whole=self.config.needs_map,
            blocks=layers and self.config.kind != "skip_attention",
        )

    @property
    def guidance(self) -> _Guidance:
        return self._guidance

    def describe(self) -> str:
        config = self.config
        heads = "default" if config.heads is None else config.heads
        if isinstance(heads, HeadSet):
            config = config.with_set(heads)
        named = isinstance(heads, str)
        heads = heads if isinstance(heads, str) else ",".join(map(str, heads))
        u, w = (
            "default" if value is None and named else f"{used:g}"
            for value, used in ((config.u, config.strength), (config.w, config.scale))
        )
        parts = [f"heads={heads}", f"u={u}", f"w={w}", f"scope={config.scope}"]
        for field in fields(config):
            value = getattr(config, field.name)
            shown = ("heads", "u", "w", "scope", "start_fraction", "stop_fraction")
            if field.name not in shown and value != field.default:
                parts.append(
                    f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}"
                )
        return f"softpag({', '.join(parts)})"

    def check(self, sites: Sequence[Site]) -> None:
        chosen = self._strengths(sites)
        family = sites[0].family
        if self.config.mode == "prefix" and not family.chains:
            raise ValueError(
                f"mode='prefix' restarts a model at a block, but blocks of {family.title} also get the "
                "outputs of much earlier ones (skip connections); use mode='sequential' or 'batched'"
            )
        if self.contributes.blocks:
            for site in sites:
                if site.name in chosen and site.stack not in family.stacks:
                    raise ValueError(
                        f"kind={self.config.kind!r} acts on blocks, and the stack {site.stack} of "
                        f"{family.title} shares its blocks with another; name the block by its layer, "
                        f"L{site.layer}"
                    )
        if self.config.query_mean == "txt":
            for site in sites:
                if site.name in chosen and site.kind != "joint":
                    raise ValueError(
                        f"query_mean='txt' needs text tokens among the queries, but {site.name} of this "
                        f"{site.family.title} model attends image tokens alone; use 'all' or 'img'"
                    )

    def on(self, sites: Sequence[Site]) -> SoftPAGAttnProcessor:
        """The same with u and w of the head set of this model where the settings say none."""
        if self.config.u is not None and self.config.w is not None:
            return self
        used = settled(self.config, sites)
        return type(self)(config=replace(self.config, u=used.strength, w=used.scale))

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
        config = settled(self.config, sites)
        heads: Any = config.heads
        if heads is None:  # PAG's own place in a UNet is the middle block; a transformer has none
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
            strength[slice(None) if head.head is None else head.head] = (
                config.strength if head.u is None else head.u
            )
        return strengths

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        rows, info = context.rows, context.info
        if rows is None or info is None or rows.perturbed[0] == rows.perturbed[1]:
            return None
        shuffles = self.config.kind == "token_shuffle"
        key = (rows, info.device, (context.step, info.grid) if shuffles else None)
        if previous is not None and previous.key == key:
            return previous
        made: dict[str, Any] = {}
        for name, strength in self._strengths(list(context.sites.values())).items():
            if self.config.kind in LAYER_KINDS:
                made[name] = self._of_layer(context, context.sites[name], float(strength[0]), rows).to(
                    info.device
                )
            elif self._plain:
                weight = torch.zeros(rows.total, len(strength))
                weight[rows.perturbed[0] :] = strength
                made[name] = weight.to(info.device)
            else:
                heads = strength.nonzero()[:, 0]
                weight = strength[heads].repeat(rows.perturbed[1] - rows.perturbed[0], 1)
                made[name] = weight.to(info.device), heads.to(info.device)
        return Published(key, made)

    def _of_layer(self, context: Context, site: Site, strength: float, rows: Rows) -> Tensor:
        """(B,) strengths, or the (B, S) order of image tokens, each of the twin rows alone."""
        first = rows.perturbed[0]
        if self.config.kind != "token_shuffle":
            weight = torch.zeros(rows.total)
            weight[first:] = strength
            return weight
        frames, height, width = site.family.site_grid(context.grid(), site)
        order = torch.arange(frames * height * width).repeat(rows.total, 1)
        # Another order in each layer and step, the same in every run.
        seed = (context.step or 0) * 1009 + site.family.flat_layer(list(context.sites.values()), site)
        order[first:] = shuffled(order.shape[1], strength, seed)
        return order

    @property
    def _plain(self) -> bool:
        """Whether the target is the values or nothing, so that one blend of the whole output is all."""
        return self.config.kind in ("identity", "zero") and not self.config.needs_map

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        """Blend the chosen heads of the twin rows; the others are returned bit for bit."""
        made = published(site, self)
        if made is None or self.config.kind in LAYER_KINDS:
            return output
        config, image = self.config, (call.image.start, call.image.stop)
        if self._plain:
            rows = None if config.scope == "joint" else image
            if config.kind == "zero":
                return blend_zero(output, made, rows)
            return blend_identity(output, call.value, made, rows)
        carrier = site.module.processor
        if getattr(carrier, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"{self.describe()} needs every key of a query, which context parallelism splits over "
                "devices; use kind='identity' or kind='zero' there, or turn parallelism off"
            )
        if isinstance(made, Tensor):  # every row and head has a weight, as a search publishes them
            made = made, torch.arange(made.shape[1], device=made.device)
        weight, heads = made
        return perturb(
            config,
            output,
            call.query,
            call.key,
            call.value,
            weight,
            heads,
            image=image,
            mask=call.attention_mask,
            grid=self._grid(site) if config.kind == "blur_query" else None,
            backend=getattr(carrier, "_attention_backend", None),
        )

    def transform_result(self, site: Site, call: Call, result: Any) -> Any:
        """Fade what attention adds to the streams of its block, in the twin rows."""
        made = published(site, self)
        if made is None or self.config.kind != "skip_attention":
            return result
        joint = self.config.scope == "joint"
        if not isinstance(result, tuple):
            image = None if joint or call.text is None else (call.image.start, call.image.stop)
            return faded(result, None, made, image)
        image, text, *added = result  # what an adapter adds stays
        return faded(image, None, made), faded(text, None, made) if joint else text, *added

    def enter_block(self, site: Site, states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Let image tokens of the twin rows change places."""
        made = published(site, self)
        if made is None or self.config.kind != "token_shuffle":
            return states
        return {**states, "hidden_states": reordered(states["hidden_states"], made)}

    def leave_block(
        self, site: Site, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Fade what the block added to its streams, in the twin rows."""
        made = published(site, self)
        if made is None or self.config.kind != "skip_block":
            return after
        names = after if self.config.scope == "joint" else ("hidden_states",)
        return {**after, **{name: faded(after[name], before[name], made) for name in names}}

    @staticmethod
    def _grid(site: Site) -> tuple[int, int, int]:
        return site.family.site_grid(site.context.grid(), site)


def settled(config: SoftPAGConfig, sites: Sequence[Site]) -> SoftPAGConfig:
    """The settings as they are used on a model: with heads, u and w of the head set that they name.

    Raises:
        ValueError: the set is of a model of another shape, or there is none of this name.
    """
    heads = config.heads
    if isinstance(heads, tuple):
        return config
    signature = signature_of_sites(sites, sites[0].family.model_class().__name__)
    if isinstance(heads, HeadSet):
        return config.with_set(heads.check(signature))
    if isinstance(heads, str):
        return config.with_set(library.find(heads, signature))
    # A set was found by perturbing towards the values; for another target a layer is as good a guess.
    shipped = library.default(signature) if config.kind == "identity" else None
    return config if shipped is None else config.with_set(shipped)


__all__ = ["SoftPAGAttnProcessor", "settled"]
