"""The ladder of `evaluate_grounding.py`: plain maps, then one part of RefAM after another, and the priors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffctrl.pipelines.refam_finish import map_track, mask_rule
from diffctrl.pipelines.refam_weighed import Weighed
from diffctrl.refam import Grounding, RefAMConfig, TokenTable, Weights, metrics
from diffctrl.refam.locate import centre, enlarged, mask_of, peak
from diffctrl.scripts.grounding_data import Sample

PLAIN_BEST = "plain maps, their own best settings"
PLAIN, STOP, PHRASE, SINKS, BIAS, FULL = (
    "plain maps",
    "+ stop words",
    "+ noun phrase",
    "+ sinks",
    "+ spatial bias",
    "+ magnets (full RefAM)",
)
CHOSEN, CENTRE, BOX = "chosen settings", "centre prior", "random box"
# Settings that change the forward; all others only change what is made of its attention.
_FORWARD = (
    "magnets",
    "magnet_encoding",
    "padding",
    "sigma",
    "n_noise",
    "seed",
    "guidance",
    "heads",
    "caption",
    "caption_as_prefix",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rung said of one sample, measured; of a clip over all frames that show the target.

    Attributes:
        hit: whether the point is on the target; of a clip the share of frames where it is.
        overlap: pixels in both masks and in any of them.
        precision: average precision of the map.
        track: J and F of a clip.
    """

    hit: float
    overlap: tuple[int, int]
    precision: float
    track: metrics.TrackScore | None = None


@dataclass(slots=True)
class Rung:
    """One way to answer.

    Attributes:
        name: in the table.
        config: settings; of the plain maps, without any filter.
        plain: sum over all tokens of the expression, special ones too.
        answers: one per sample.
    """

    name: str
    config: RefAMConfig
    plain: bool = False
    answers: list[Answer] = field(default_factory=list)


def bare_of(config: RefAMConfig) -> RefAMConfig:
    """The same without any part of RefAM."""
    return replace(
        config,
        stop_words=False,
        noun_phrase="off",
        sinks="off",
        spatial_bias=False,
        combine="sum",
        magnet_encoding="none",
    )


def rungs_of(chosen: RefAMConfig, plain: RefAMConfig | None = None) -> list[Rung]:
    """The ladder on the blocks, direction and noise level of the chosen settings.

    Each rung has the ones above; the last one adds magnets, whatever was chosen for them.

    Args:
        chosen: settings.
        plain: those that suit the plain maps best, for a rung of their own.
    """
    bare = bare_of(chosen)
    stop = replace(bare, stop_words=True)
    phrase = replace(stop, noun_phrase="rules")
    sinks = replace(phrase, sinks="filter")
    bias = replace(sinks, spatial_bias=True)
    full = replace(bias, magnet_encoding="separate")
    rival = [] if plain is None else [Rung(PLAIN_BEST, bare_of(plain), plain=True)]
    return [
        *rival,
        Rung(PLAIN, bare, plain=True),
        Rung(STOP, stop),
        Rung(PHRASE, phrase),
        Rung(SINKS, sinks),
        Rung(BIAS, bias),
        Rung(FULL, full),
        Rung(CHOSEN, chosen),
    ]


def forward_key(config: RefAMConfig) -> tuple[Any, ...]:
    """Settings with the same key share their forwards."""
    return tuple(getattr(config, name) for name in _FORWARD)


def climb(
    pipe: Any, samples: Sequence[Sample], rungs: Sequence[Rung], *, batch: int, frames: int | None = None
) -> None:
    """Let every rung answer every sample, of clips that many frames; forwards are shared where possible."""
    groups: dict[tuple[Any, ...], list[Rung]] = {}
    for rung in rungs:
        groups.setdefault(forward_key(rung.config), []).append(rung)
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        seen: list[Any] = [sample.picture() for sample in part]
        truths = [sample.truth() for sample in part]
        for group in groups.values():
            pairs = [(picture, sample.expression) for picture, sample in zip(seen, part, strict=True)]
            config = covering([rung.config for rung in group])
            weighed = pipe.weigh(pairs, config, batch_size=batch, frames=frames)
            for truth, each in zip(truths, weighed, strict=True):
                for rung in group:
                    rung.answers.append(measured(_concluded(pipe, each, rung), truth))
            seen = [encoded(each) for each in weighed]
        print(f"  {start + len(part)} of {len(samples)} expressions", flush=True)


def _concluded(pipe: Any, weighed: Weighed, rung: Rung) -> Grounding:
    found = pipe.conclude(weighed, rung.config)
    return plain_grounding(weighed, found, rung.config, pipe) if rung.plain else found


def encoded(weighed: Weighed) -> Weighed:
    """What is left of a picture for further forwards: its latents."""
    return replace(weighed, weights=None, scored=None)


def covering(configs: Sequence[RefAMConfig]) -> RefAMConfig:
    """One forward's settings that read everything that any of these needs."""
    t2i = any(config.direction == "t2i" for config in configs)
    blocks = {config.blocks for config in configs}
    joined = configs[0].blocks if len(blocks) == 1 else ",".join(sorted(b for b in blocks if b != "auto"))
    normal = replace(configs[0], normalise="full")
    return replace(normal, blocks=joined, direction="t2i" if t2i else "i2t")


def plain_map(weights: Weights, table: TokenTable, config: RefAMConfig, encoder: str) -> Tensor:
    """(N, I): the sum over all of the expression's tokens in each block, special ones too."""
    columns = list(table.columns("content", "outside", "stop", "special", encoder=encoder))
    source = weights.t2i if config.direction == "t2i" else weights.i2t
    assert source is not None
    return source[:, columns].sum(dim=1)


def plain_grounding(weighed: Any, found: Grounding, config: RefAMConfig, pipe: Any) -> Grounding:
    """A grounding with the plain map in place of its own."""
    weights = weighed.weights.only(config.chosen_blocks(weighed.weights.count))
    encoder = pipe.reader.encoder(config.encoder)
    maps = plain_map(weights, weighed.rows.table, config, encoder).mean(dim=0)
    maps = maps.view(-1, *found.heat.shape)
    heat = maps[0]
    point = centre(*peak(heat), (heat.shape[0], heat.shape[1]), found.size)
    found = replace(found, heat=heat, point=point, mask=mask_of(heat, point, found.size, mask_rule(config)))
    if len(maps) == 1:
        return found
    track = map_track(maps, found.size, config, weighed.seen.frame_step)[: len(weighed.seen.pixels)]
    return replace(found, frame_maps=maps, track=track)


def measured(found: Grounding, truth: Tensor) -> Answer:
    """One answer against the truth (H, W) of a picture or (F, H, W) of a clip."""
    if found.frame_maps is None or found.track is None:
        return _measured(found.heat, found.point, found.mask, truth[0] if truth.ndim == 3 else truth)
    maps, size = found.frame_maps, found.size
    points = [centre(*peak(heat), (maps.shape[1], maps.shape[2]), size) for heat in maps]
    at = latent_frames_of(len(truth), len(maps))
    return over_frames(
        [_measured(maps[i], points[i], mask, seen) for i, mask, seen in _shown(at, found.track, truth)],
        metrics.track_score(found.track, truth),
    )


def latent_frames_of(frames: int, latent: int) -> list[int]:
    """The latent frame that each frame of a clip is in; the first is by itself."""
    step = (frames - 1) // (latent - 1)
    return [-(-frame // step) for frame in range(frames)]


def _shown(at: Sequence[int], track: Tensor, truth: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for place, mask, seen in zip(at, track, truth, strict=True):
        if bool(seen.any()):
            yield place, mask, seen


def over_frames(answers: Sequence[Answer], track: metrics.TrackScore) -> Answer:
    """One answer of those to the frames of a clip."""
    count = len(answers)
    both, any_ = (sum(each.overlap[side] for each in answers) for side in (0, 1))
    hit, precision = sum(each.hit for each in answers), sum(each.precision for each in answers)
    return Answer(hit / count, (both, any_), precision / count, track)


def _measured(heat: Tensor, point: tuple[float, float], mask: Tensor, truth: Tensor) -> Answer:
    size = (truth.shape[0], truth.shape[1])
    return Answer(
        metrics.point_inside(point, truth),
        metrics.overlap(mask, truth),
        metrics.average_precision(enlarged(heat, size), truth),
    )


def priors(samples: Sequence[Sample], area: float, *, seed: int) -> list[Rung]:
    """What needs no model: the middle of the picture, and a random box of the usual area, both at rest."""
    rng = np.random.default_rng(seed)
    config = RefAMConfig()
    middle, random = Rung(CENTRE, config), Rung(BOX, config)
    for sample in samples:
        truth = sample.truth()
        height, width = truth.shape[-2:]
        side = math.sqrt(area)
        for rung, (x, y) in ((middle, (0.5, 0.5)), (random, tuple(rng.uniform(side / 2, 1 - side / 2, 2)))):
            rows = (torch.arange(height) + 0.5) / height - y
            columns = (torch.arange(width) + 0.5) / width - x
            mask = (rows.abs() <= side / 2)[:, None] & (columns.abs() <= side / 2)[None, :]
            heat = -torch.hypot(rows[:, None], columns[None, :])
            point = x * width, y * height
            if truth.ndim == 2:
                rung.answers.append(_measured(heat, point, mask, truth))
                continue
            shown = [_measured(heat, point, mask, seen) for seen in truth if bool(seen.any())]
            rung.answers.append(over_frames(shown, metrics.track_score(mask.expand_as(truth), truth)))
    return [middle, random]


def mean_area(samples: Sequence[Sample]) -> float:
    """Share of the picture that a target covers, on average."""
    shares = [sample.truth().float().mean().item() for sample in samples]
    return sum(shares) / len(shares)


Measure = Callable[[Sequence[Answer]], float]
MEASURES: Mapping[str, Measure] = {
    "pointing accuracy": lambda found: 100 * sum(a.hit for a in found) / len(found),
    "mIoU": lambda found: 100 * metrics.mean_iou([a.overlap for a in found]),
    "oIoU": lambda found: 100 * metrics.overall_iou([a.overlap for a in found]),
    "P@0.5": lambda found: 100 * metrics.precision_at([a.overlap for a in found], 0.5),
    "average precision": lambda found: 100 * sum(a.precision for a in found) / len(found),
}


def _tracked(found: Sequence[Answer], value: Callable[[metrics.TrackScore], float]) -> float:
    return 100 * sum(value(a.track) for a in found if a.track is not None) / len(found)


CLIP_MEASURES: Mapping[str, Measure] = {
    "pointing accuracy": MEASURES["pointing accuracy"],
    "J&F": lambda found: _tracked(found, lambda track: track.mean),
    "J": lambda found: _tracked(found, lambda track: track.j),
    "F": lambda found: _tracked(found, lambda track: track.f),
    "average precision": MEASURES["average precision"],
}


def reachable(samples: Sequence[Sample], token: int) -> float:
    """Percent of the frames that show the target in which a token's middle lies on it: points lie there.

    Args:
        samples: clips.
        token: side of a token in pixels, at the size of the masks.
    """
    shares = []
    for sample in samples:
        shown = [seen for seen in sample.truth() if bool(seen.any())]
        middles = [bool(seen[token // 2 :: token, token // 2 :: token].any()) for seen in shown]
        shares.append(sum(middles) / len(shown))
    return 100 * sum(shares) / len(shares)


def interval(samples: Sequence[Sample], answers: Sequence[Answer], measure: Measure) -> metrics.Interval:
    """A measure with its bootstrap interval over scenes."""
    scenes = [sample.scene for sample in samples]
    return metrics.bootstrap(scenes, lambda chosen: measure([answers[i] for i in chosen]))


def difference(samples: Sequence[Sample], one: Rung, other: Rung) -> metrics.Interval:
    """Pointing accuracy of one rung minus another's, on the same scenes."""
    gained = np.array([a.hit - b.hit for a, b in zip(one.answers, other.answers, strict=True)], dtype=float)
    scenes = [sample.scene for sample in samples]
    return metrics.bootstrap(scenes, lambda chosen: 100 * float(gained[chosen].mean()))
