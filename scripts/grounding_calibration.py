"""Chooses blocks, direction, noise level, text encoder and magnets for a model, on a validation set alone.

Everything is scored by pointing accuracy plus the average precision of the map, halved: the first is what
counts, the second varies less on a few hundred expressions. Both are taken on the grid of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffctrl.pipelines.refam_input import middle_frame_of
from diffctrl.refam import RefAMConfig, score
from diffctrl.refam.locate import peak, spatial_bias
from diffctrl.refam.metrics import average_precision
from diffctrl.refam.words import directions
from diffctrl.scripts.grounding_data import Sample
from diffctrl.scripts.grounding_ladder import bare_of, encoded, plain_map

SIGMAS = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Tried:
    """One combination and how it did.

    Attributes:
        config: settings.
        pointing, precision: in percent.
        plain: of the map of all of the expression's tokens, which nothing is filtered of.
    """

    config: RefAMConfig
    pointing: float
    precision: float
    plain: bool = False

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
        frames: of clips, how many are read; each latent frame counts that shows the target.
    """

    def __init__(self, pipe: Any, samples: Sequence[Sample], batch: int, frames: int | None = None) -> None:
        self.pipe, self.samples, self.batch, self.frames = pipe, samples, batch, frames
        self.tried: list[Tried] = []
        self.plain: list[Tried] = []
        self.blocks = 0
        # Pictures until they are encoded, then their latents: the autoencoder is most of a small forward.
        self.seen: list[Any] = [sample.picture() for sample in samples]

    def run(self, base: RefAMConfig) -> Tried:
        """The best settings found, in three rounds: noise with blocks and direction, text, small switches."""
        best: Tried | None = None
        directions_tried = ("i2t", "t2i") if self._has_text_queries(base) else ("i2t",)
        plain = replace(base, magnet_encoding="none", padding="keep", sinks="off")
        for sigma in SIGMAS:
            families = [
                replace(plain, sigma=sigma, encoder=stream.name, direction=direction, normalise=normalise)
                for stream in self.pipe.reader.streams
                for direction in directions_tried
                for normalise in (("full", "text") if direction == "i2t" else ("full",))
            ]
            best = self._better(best, self._score(families, self._ranges(base)))
            bare = [bare_of(config) for config in families if config.normalise == "full"]
            # The rival gets its own best blocks, direction and noise too.
            self.plain += self._score(bare, self._ranges(base), plain=True)
            print(f"sigma {sigma:g}: {len(self.tried)} settings tried, best {best.as_dict()}", flush=True)
        assert best is not None
        for padding, magnets in (("keep", "separate"), ("drop", "none"), ("drop", "separate")):
            other = replace(best.config, padding=padding, magnet_encoding=magnets)
            best = self._better(best, self._score([other]))
        switches = [
            replace(best.config, combine=combine, sinks=sinks, noun_phrase=phrase)
            for combine in ("sum", "product")
            for sinks in ("off", "filter")
            for phrase in ("rules", "off")
        ]
        best = self._better(best, self._score(switches))
        # A part of the method that changes nothing measurable stays on: other pictures may need it.
        return self._with_parts(best)

    def _with_parts(self, best: Tried) -> Tried:
        same = [
            each
            for each in self.tried
            if replace(each.config, sinks="filter") == replace(best.config, sinks="filter")
            and each.config.sinks == "filter"
            and each.value >= best.value - 0.25
        ]
        return same[0] if same else best

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

    def best_plain(self) -> Tried:
        """The plain maps that did best."""
        return max(self.plain, key=lambda each: each.value)

    def _score(
        self, configs: Sequence[RefAMConfig], ranges: Sequence[str] | None = None, *, plain: bool = False
    ) -> list[Tried]:
        """Configs that share their forward, each with its own blocks or each of some ranges of blocks."""
        named = [replace(c, blocks=r) for c in configs for r in (ranges or [c.blocks])]
        hits, precisions = torch.zeros(len(named)), torch.zeros(len(named))
        covering = replace(
            configs[0],
            blocks=f"0-{self.blocks - 1}",
            direction="t2i" if any(c.direction == "t2i" for c in configs) else "i2t",
            normalise="full",
        )
        for start in range(0, len(self.samples), self.batch):
            part = self.samples[start : start + self.batch]
            stop = start + len(part)
            pairs = [(seen, each.expression) for seen, each in zip(self.seen[start:stop], part, strict=True)]
            weighed = self.pipe.weigh(pairs, covering, batch_size=self.batch, frames=self.frames)
            self.seen[start:stop] = [encoded(each) for each in weighed]
            for sample, each in zip(part, weighed, strict=True):
                maps = torch.cat([self._maps(each, config, ranges, plain) for config in configs])
                truths = self._truths(sample, maps.shape[1:], each.seen.frame_step)
                shown = [frame for frame, truth in enumerate(truths) if bool(truth.any())]
                for (place, frames), frame in itertools.product(enumerate(maps), shown):
                    row, column = peak(frames[frame])
                    hits[place] += float(truths[frame][row, column]) / len(shown)
                    precisions[place] += average_precision(frames[frame], truths[frame]) / len(shown)
        total = len(self.samples)
        return [
            Tried(config, 100 * float(hit) / total, 100 * float(precision) / total, plain)
            for config, hit, precision in zip(named, hits, precisions, strict=True)
        ]

    def _maps(self, weighed: Any, config: RefAMConfig, ranges: Sequence[str] | None, plain: bool) -> Tensor:
        """(R, F, h, w): the maps of each range of blocks, or those of the config's own blocks, a latent frame
        each.

        Without sinks a map is the mean of its blocks' maps, so that all ranges are made of one pass.
        """
        count = weighed.weights.count
        blocks = range(count) if ranges else config.chosen_blocks(count)
        encoder = self.pipe.reader.encoder(config.encoder)
        weights, table = weighed.weights.only(blocks), weighed.rows.table
        if plain:
            per_block = plain_map(weights, table, config, encoder)
        else:
            per_block = score(weights, table, config, encoder=encoder).per_block
        rows, columns = (side // self.pipe.reader.multiple for side in weighed.seen.model_size)
        chosen = [list(replace(config, blocks=r).chosen_blocks(count)) for r in ranges or ()]
        heats = [per_block[part].mean(dim=0) for part in chosen] or [per_block.mean(dim=0)]
        maps = torch.stack(heats).view(len(heats), -1, rows, columns)
        if config.spatial_bias:
            words = weighed.rows.table.words
            maps = maps * spatial_bias(directions(words), rows, columns, config.bias_floor)
        return maps

    @staticmethod
    def _truths(sample: Sample, shape: Sequence[int], frame_step: int) -> list[Tensor]:
        """The masks at the middles of the tokens (latent frames, rows, columns), where points lie."""
        truth, (latent, *grid) = sample.truth(), shape
        frames = (
            [truth] if truth.ndim == 2 else [truth[middle_frame_of(i, frame_step)] for i in range(latent)]
        )
        rows, columns = (
            ((torch.arange(count) + 0.5) * side / count).long()
            for count, side in zip(grid, truth.shape[-2:], strict=True)
        )
        return [frame[rows][:, columns] for frame in frames]
