"""RefAM's processor: reads what grounding needs of the attention, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffctrl.attention.capture import CaptureSpec, Route
from diffctrl.control.collector import eligible_sites
from diffctrl.families import Site
from diffctrl.processors.capture import CaptureAttnProcessor
from diffctrl.refam import RefAMConfig, Weights

MAX_BYTES = 1 << 30


class RefAMAttnProcessor(CaptureAttnProcessor):
    """Keeps the weights of image queries on every text token in the blocks that locate (arXiv 2509.22650).

    It also keeps how strongly text queries attend each text token (for sinks; not in models with
    cross-attention, which have no text queries), and where they look if `direction="t2i"`. The model's output
    is the same, bit for bit. Over several forwards (the steps of a drawing) the weights are averaged.

    Args:
        config: settings; keywords of `RefAMConfig` may be given instead.
        max_bytes: of all that is kept and of the working memory; more is refused before a forward.
        route: to the weights; None for the cheapest of each call.
        ends_forwards: see `CaptureAttnProcessor`.

    Raises:
        TypeError, ValueError: an argument is not accepted.
    """

    method = "refam"
    families = ("sd3", "flux", "mochi", "wan")

    def __init__(
        self,
        config: RefAMConfig | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        route: Route | None = None,
        ends_forwards: bool = False,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ValueError(
                f"give config or single settings, not both; got both config and {sorted(settings)}"
            )
        self.config = config if config is not None else RefAMConfig.from_dict(settings)
        # Which blocks and heads is known when a model is: see `specs_on`.
        named = {
            "i2t": CaptureSpec(blocks="each"),
            "text_mass": CaptureSpec(quantity="column_mass", queries="text", blocks="each"),
            "t2i": CaptureSpec(queries="text", keys="image", blocks="each"),
        }
        super().__init__(named, max_bytes=max_bytes, route=route, ends_forwards=ends_forwards)

    def describe(self) -> str:
        config = self.config
        return f"refam(blocks={config.blocks}, direction={config.direction}, sinks={config.sinks})"

    def specs_on(self, sites: Sequence[Site]) -> Mapping[str, CaptureSpec]:
        found = eligible_sites(self.specs["i2t"], sites)
        heads = self.config.chosen_heads(min(site.heads for site in found))
        which: dict[str, Any] = {"only_blocks": self.config.chosen_blocks(len(found)), "only_heads": heads}
        names = ["i2t"]
        if found[0].kind == "joint":
            names += ["text_mass", "t2i"] if self.config.direction == "t2i" else ["text_mass"]
        elif self.config.direction == "t2i":
            raise ValueError(
                f"direction='t2i' reads where text queries look, and {found[0].family.title} has none: "
                f"its text "
                "is read by cross-attention; use direction='i2t'"
            )
        return {name: replace(self.specs[name], **which) for name in names}

    def weights(self, *, model: str | None = None) -> list[Weights]:
        """What was captured, one record per conditional batch row.

        Args:
            model: component name, where the pipeline has several denoisers.

        Raises:
            RuntimeError: no forward was captured in full.
        """
        i2t = self.result("i2t", model=model)  # (B, N, I, T)
        context = next(c for c, _ in self._collectors.values() if model in (None, c.model_name))
        names = self.specs_on(sites := list(context.sites.values()))
        count = len(eligible_sites(self.specs["i2t"], sites))
        mass = self.result("text_mass", model=model).values if "text_mass" in names else None
        t2i = self.result("t2i", model=model).values if "t2i" in names else None
        return [
            Weights(
                i2t=i2t.values[row].transpose(-1, -2),
                t2i=None if t2i is None else t2i[row],
                text_mass=None if mass is None else mass[row],
                blocks=i2t.blocks,
                count=count,
            )
            for row in range(i2t.values.shape[0])
        ]

    def contexts_read(self) -> list[str]:
        """Names of the denoisers that ran under this processor, in the order in which they began."""
        return [context.model_name for context, _ in self._collectors.values()]

    def grid(self, *, model: str | None = None) -> tuple[int, int, int]:
        """(frames, rows, columns) of the image tokens."""
        grid = self.result("i2t", model=model).grid
        if grid is None:
            raise RuntimeError("the forward did not say its token grid; call the model through its pipeline")
        return grid


__all__ = ["RefAMAttnProcessor"]
