"""Chooses blocks, direction, noise level, text encoder and magnets for a model, on a validation set alone.

Everything is scored by pointing accuracy plus the average precision of the map, halved: the first is what
counts, the second varies less on a few hundred expressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffctrl.refam import RefAMConfig, score
from diffctrl.refam.locate import centre, peak, spatial_bias
from diffctrl.refam.words import directions
from diffctrl.scripts.grounding_data import Sample
from diffctrl.scripts.grounding_ladder import Answer, measured

SIGMAS = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Tried:
    """One combination and how it did.

    Attributes:
        config: settings.
        pointing, precision: in percent.
    """

    config: RefAMConfig
    pointing: float
    precision: float

    @property
    def value(self) -> float:
        return (self.pointing + self.precision) / 2

    def as_dict(self) -> dict[str, Any]:
        default = RefAMConfig().as_dict()
        changed = {name: value for name, value in self.config.as_dict().items() if value != default[name]}
        return {
            "settings": changed,
            "pointing_accuracy": round(self.pointing, 1),
            "average_precision": round(self.precision, 1),
        }


def ranges(count: int) -> Iterator[str]:
    """Every run of neighbouring blocks, shortest first."""
    for length in range(1, count + 1):
        for start in range(count - length + 1):
            yield str(start) if length == 1 else f"{start}-{start + length - 1}"


def block_ranges(count: int, step: int) -> list[str]:
    """`ranges`, thinned out for deep models: ends on multiples of the step."""
    if step == 1:
        return list(ranges(count))
    edges = [*range(0, count, step), count]
    return [f"{a}-{b - 1}" for i, a in enumerate(edges) for b in edges[i + 1 :]]


class Calibration:
    """Reads a validation set once per forward and scores many settings on what was read.

    Args:
        pipe: a ready pipeline.
        samples: the validation set; never the test set.
        batch: expressions in a forward.
    """

    def __init__(self, pipe: Any, samples: Sequence[Sample], batch: int) -> None:
        self.pipe, self.samples, self.batch = pipe, samples, batch
        self.tried: list[Tried] = []
        self.blocks = 0

    def run(self, base: RefAMConfig) -> Tried:
        """The best settings found, in three rounds: noise with blocks and direction, text, small switches."""
        best: Tried | None = None
        cross = not self._has_text_queries(base)
        directions_tried = ("i2t",) if cross else ("i2t", "t2i")
        plain = replace(base, magnet_encoding="none", padding="keep")
        encoders = [stream.name for stream in self.pipe.reader.streams]
        for sigma in SIGMAS:
            configs = [
                replace(
                    plain,
                    sigma=sigma,
                    encoder=encoder,
                    direction=direction,
                    normalise=normalise,
                    blocks=blocks,
                )
                for encoder in encoders
                for direction in directions_tried
                for normalise in (("full", "text") if direction == "i2t" else ("full",))
                for blocks in self._ranges(base)
            ]
            best = self._better(best, self._score(replace(plain, sigma=sigma), configs))
        assert best is not None
        for padding, magnets in (("keep", "separate"), ("drop", "none"), ("drop", "separate")):
            forward = replace(best.config, padding=padding, magnet_encoding=magnets)
            best = self._better(best, self._score(forward, [forward]))
        switches = [
            replace(best.config, combine=combine, sinks=sinks, noun_phrase=phrase)
            for combine in ("sum", "product")
            for sinks in ("off", "filter")
            for phrase in ("rules", "off")
        ]
        return self._better(best, self._score(best.config, switches))

    def _ranges(self, base: RefAMConfig) -> list[str]:
        if not self.blocks:
            first = self.samples[:1]
            pairs = [(sample.picture(), sample.expression) for sample in first]
            self.blocks = self.pipe.weigh(pairs, replace(base, blocks="0", direction="i2t"))[0].weights.count
        return block_ranges(self.blocks, 1 if self.blocks <= 12 else max(1, self.blocks // 10))

    def _has_text_queries(self, base: RefAMConfig) -> bool:
        try:
            pairs = [(sample.picture(), sample.expression) for sample in self.samples[:1]]
            self.pipe.weigh(pairs, replace(base, blocks="0", direction="t2i", normalise="full"))
        except ValueError:
            return False
        return True

    def _better(self, before: Tried | None, tried: list[Tried]) -> Tried:
        self.tried += tried
        return max([*tried, *([before] if before is not None else [])], key=lambda each: each.value)

    def _score(self, forward: RefAMConfig, configs: Sequence[RefAMConfig]) -> list[Tried]:
        """Every config on the whole set, from forwards with the settings of `forward`."""
        answers: list[list[Answer]] = [[] for _ in configs]
        needs_t2i = any(config.direction == "t2i" for config in configs)
        covering = replace(
            forward,
            blocks=f"0-{self.blocks - 1}",
            direction="t2i" if needs_t2i else "i2t",
            normalise="full",
        )
        for start in range(0, len(self.samples), self.batch):
            part = self.samples[start : start + self.batch]
            pairs = [(sample.picture(), sample.expression) for sample in part]
            for sample, weighed in zip(
                part, self.pipe.weigh(pairs, covering, batch_size=self.batch), strict=True
            ):
                truth = sample.truth()
                for found, config in zip(answers, configs, strict=True):
                    found.append(self._answer(weighed, config, truth))
        return [
            Tried(
                config,
                100 * sum(a.hit for a in found) / len(found),
                100 * sum(a.precision for a in found) / len(found),
            )
            for config, found in zip(configs, answers, strict=True)
        ]

    def _answer(self, weighed: Any, config: RefAMConfig, truth: Tensor) -> Answer:
        """Map and point alone; a mask is not needed to choose."""
        weights = weighed.weights.only(config.chosen_blocks(weighed.weights.count))
        encoder = self.pipe.reader.encoder(config.encoder)
        heat = score(weights, weighed.rows.table, config, encoder=encoder).heat
        rows, columns = (side // self.pipe.reader.multiple for side in weighed.seen.model_size)
        heat = heat.view(-1, rows, columns)[0]
        if config.spatial_bias:
            heat = heat * spatial_bias(directions(weighed.rows.table.words), rows, columns, config.bias_floor)
        point = centre(*peak(heat), (rows, columns), weighed.seen.size)
        return measured(heat, point, truth if truth.ndim == 2 else truth[0], truth)
