"""Radial Attention: the same video in less time, by block lists that thin out with the distance of frames."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from diffctrl.control import Context, Contributions, Published
from diffctrl.control.install import sites_of
from diffctrl.families import ForwardInfo, Site
from diffctrl.length import Loaded, at_work, tuned
from diffctrl.processors.base import ControlAttnProcessor
from diffctrl.processors.radial_estimate import predicted, subject_of
from diffctrl.radial import (
    DenseParts,
    Layout,
    Pattern,
    Prediction,
    RadialConfig,
    block_lists,
    preset,
)
from diffctrl.radial.presets import NATIVE_FRAMES, is_extended, resolve

logger = logging.getLogger("diffctrl.radial")


class RadialAttnProcessor(ControlAttnProcessor):
    """Attends near frames in full and far ones in bands that halve in width as their distance doubles.

    Args:
        config: the settings; keywords change single fields, as in `RadialAttnProcessor(dense_steps=6)`.

    Raises:
        ValueError: a setting is out of range, or (when applied) more blocks are to stay dense than there are.

    Source: arXiv 2506.19852. The mask is static: one for all heads, layers and sparse steps, made once for
    each size. Text is attended by all and attends all. Only the video's own attention in the model's main
    blocks is thinned: not cross-attention, text refiners or the adapter blocks of VACE.
    """

    method = "radial"
    contributes = Contributions(masks=True)
    families = tuple(NATIVE_FRAMES)

    def __init__(self, config: RadialConfig | None = None, **settings: Any) -> None:
        super().__init__()
        config = config or RadialConfig()
        self.config = replace(config, **settings) if settings else config
        # A default that was asked for is no setting left to a length LoRA; None asks for nothing.
        self._given = frozenset(name for name, value in settings.items() if value is not None)

    def changed(self, **settings: Any) -> RadialAttnProcessor:
        """Another processor with these settings changed, what else was asked for kept."""
        if "dense_steps" in settings or "dense_fraction" in settings:  # two ways to say one thing
            settings = {"dense_steps": None, "dense_fraction": None} | settings
        other = type(self)(self.config, **settings)
        other._given |= self._given
        return other

    def describe(self) -> str:
        given = [(f.name, getattr(self.config, f.name)) for f in fields(self.config)
                 if getattr(self.config, f.name) != f.default]  # fmt: skip
        return f"radial({', '.join(f'{name}={value}' for name, value in given) or 'preset'})"

    def acts_on(self, site: Site) -> bool:
        return site.kind in ("joint", "self") and site.stack in site.family.stacks

    def check(self, sites: Sequence[Site]) -> None:
        chosen = self.select(sites)
        blocks = _blocks(chosen)
        config, loaded, complaint = self._tuned(chosen)
        if complaint and loaded is not None:
            if loaded.strict:
                raise ValueError(f"{complaint}, or load the LoRA with strict=False")
            logger.warning("%s", complaint)
        if config.dense_blocks is not None and config.dense_blocks >= blocks:
            raise ValueError(
                f"dense_blocks={config.dense_blocks} leaves none of the {blocks} blocks of this "
                f"{sites[0].family.title} model to be sparse"
            )

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        sites = self.select(list(context.sites.values()))
        info = context.info
        assert info is not None
        frames, rows, columns = context.grid()
        pattern, dense, loaded = self._settled(sites, frames, context.experts)
        if dense.always and loaded is not None and loaded.lora.radial is not None and not context.step:
            logger.warning("no step of this run has the mask that the length LoRA was trained with")
        if dense.always or (not dense.never and self._rests(dense, context)):
            return None
        layout = layout_of(sites[0], info, (frames, rows, columns))
        key = (pattern, layout, dense.blocks)
        if previous is not None and previous.key == key:
            return previous
        self._notes(context, sites[0], frames, loaded)
        lists = block_lists(pattern, layout)
        family = sites[0].family
        sparse = [site for site in sites if family.flat_layer(sites, site) >= dense.blocks]
        return Published(key, masks={site.name: lists for site in sparse})

    def resolved(self, family: str, frames: int, experts: int = 1) -> tuple[Pattern, DenseParts]:
        """The settings of a model, with the published ones where this processor has none of its own.

        Args:
            family: the model's family.
            frames: latent frames of the clip.
            experts: denoisers of the pipeline.
        """
        return resolve(self.config, preset(family, frames=frames, experts=experts))

    def estimate(
        self, pipe: Any, height: int, width: int, frames: int, steps: int = 50, *, efficiency: float = 1.0
    ) -> Prediction:
        """Density, share of attention and speed-up to expect; a gain below 1.15 is warned of.

        Args:
            pipe: a video pipeline.
            height, width, frames: of the video, in pixels.
            steps: of the run.
            efficiency: the rate of the card's sparse kernel over that of its dense one. By the engine's
                measurements it is about 1 on an H100, on long sequences.

        Raises:
            TypeError: the pipeline is not of a supported family.
        """
        subject = subject_of(pipe, height, width, frames)
        if subject.family.name not in NATIVE_FRAMES:
            raise TypeError(
                f"radial does not support {subject.family.title}; it supports {', '.join(NATIVE_FRAMES)}"
            )
        sites = self.select(sites_of(subject.model))
        pattern, dense, _ = self._settled(sites, subject.layout.frames, subject.experts)
        return predicted(subject, pattern, dense, steps, efficiency)

    def _settled(
        self, sites: Sequence[Site], frames: int, experts: int
    ) -> tuple[Pattern, DenseParts, Loaded | None]:
        """The settings on this model with nothing left open, and the length LoRA that some come from."""
        config, loaded, _ = self._tuned(sites)
        known = preset(sites[0].family.name, frames=frames, experts=experts, tuned=loaded is not None)
        return *resolve(config, known), loaded

    def _tuned(self, sites: Sequence[Site]) -> tuple[RadialConfig, Loaded | None, str]:
        """The settings on this model, the length LoRA at work there, and why they do not belong together."""
        loaded = at_work(sites[0].module) if sites else None
        if loaded is None:
            return self.config, None, ""
        if loaded.lora.radial is None:
            sparse = self.config.dense_fraction != 1.0
            complaint = (
                f"the length LoRA {loaded.adapter!r} was trained with dense attention, and this mask is "
                "sparse: take it off (dense_fraction=1.0)"
            )
            return self.config, loaded, complaint if sparse else ""
        config, against = tuned(self.config, loaded.lora.radial, self._given)
        complaint = (
            f"this mask is not the one that the length LoRA {loaded.adapter!r} was trained with: "
            f"{', '.join(against)}; leave these settings out"
        )
        return config, loaded, complaint if against else ""

    @staticmethod
    def _rests(dense: DenseParts, context: Context) -> bool:
        """Whether the running step attends all."""
        step, total = context.run_step()
        if step == 0 and dense.first(total) + dense.last(total) >= total:
            logger.warning(
                "Radial Attention leaves all %d steps of this run dense (%d first, %d last): "
                "nothing is gained",
                total,
                dense.first(total),
                dense.last(total),
            )
        return dense.is_dense(step, total)

    @staticmethod
    def _notes(context: Context, site: Site, frames: int, loaded: Loaded | None) -> None:
        name = site.family.name
        if frames == 1:
            logger.warning("%s runs on one frame: Radial Attention leaves out nothing there", name)
        elif loaded is not None:
            low, high = loaded.lora.latent_frames
            if not low <= frames <= high:
                logger.warning(
                    "%s: the length LoRA %r was trained on clips of %s latent frames, and this one has %d",
                    context.model_name, loaded.adapter, low if low == high else f"{low} to {high}", frames,
                )  # fmt: skip
        elif is_extended(name, frames):
            logger.warning(
                "%s: %d latent frames are %.1f times what %s was made for; without a LoRA for this length "
                "the video falls apart, with dense attention as well",
                context.model_name, frames, frames / NATIVE_FRAMES[name], site.family.title,
            )  # fmt: skip


def layout_of(site: Site, info: ForwardInfo, grid: tuple[int, int, int]) -> Layout:
    """The attention sequence of a model's main blocks."""
    frames, rows, columns = grid
    text = (info.text_length or 0) if site.kind == "joint" else 0
    first = site.kind == "joint" and site.family.text_side == "first"
    return Layout(frames=frames, tokens=rows * columns, text=text, text_first=first)


def _blocks(sites: Sequence[Site]) -> int:
    return len({(site.stack, site.layer) for site in sites})
