"""Reads a clip and checks a caption against it. Nothing is learned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from torch import Tensor

from diffctrl.zoo.clips.captions import ClipFacts, ObjectFacts
from diffctrl.zoo.clips.vocabulary import SHAPES, WALL_PHRASE

from .motions import read_motion
from .tracks import Track, canonical, follow

Array = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One object of a clip.

    Attributes:
        facts: colour and shape that most frames show, motion and speed over all of them; None where unclear.
        colour_drift: distance in RGB, [0, 1] each, between the median colours of the first and the last third
            of the frames, where they show it. NaN where either shows nothing.
        size_drift: relative change of the radius between the same, of objects that do not grow or shrink.
        presence: share of frames in which it is seen.
        reappears: behind a wall, whether an object of the same colour and shape comes out on the other side;
            None without a wall.
    """

    facts: ObjectFacts
    colour_drift: float
    size_drift: float
    presence: float
    reappears: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipReading:
    """A clip as the judge reads it; `str()` gives one sentence."""

    background: str
    texture: str
    wall: bool
    objects: tuple[Seen, ...]

    def __str__(self) -> str:
        said = " while ".join(_phrase(one.facts) for one in self.objects) or "nothing"
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"{said} on {_article(self.background)}{texture} background"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipVerdict:
    """Whether a clip shows what its caption names; see `diffctrl.zoo.judge.Verdict`.

    Attributes:
        exact: every named fact holds, the number of objects and the return from behind a wall included.
        facts: per named fact, whether it holds for every object that it is named of.
        objects: the same per named object, in the order of the caption.
        reading: what the clip shows.
    """

    exact: bool
    facts: dict[str, bool]
    objects: tuple[dict[str, bool], ...]
    reading: ClipReading

    def __str__(self) -> str:
        wrong = [name for name, holds in self.facts.items() if not holds]
        return f"{self.reading}: " + (f"wrong: {', '.join(wrong)}" if wrong else "as asked")


def read_clip(video: Tensor) -> ClipReading:
    """Read a clip, whatever it shows; what cannot be told is None, as every motion in fewer than 17 frames.

    Args:
        video: (T, 3, H, H) float in [0, 1], any device; brought to 64 pixels; at least one frame.

    Raises:
        ValueError: it has another shape, or values that are not finite.
    """
    scene = follow(canonical(video))
    return ClipReading(
        background=scene.background,
        texture=scene.texture,
        wall=scene.wall is not None,
        objects=tuple(_seen(track, scene.wall) for track in scene.tracks),
    )


def check_clip(video: Tensor, spec: ClipFacts) -> ClipVerdict:
    """Check a clip (T, 3, H, H) against named facts, from `clips.parse` or `clips.said`."""
    return compare_clip(read_clip(video), spec)


def compare_clip(reading: ClipReading, spec: ClipFacts) -> ClipVerdict:
    """The same for a clip that has been read."""
    facts = {"count": len(reading.objects) == len(spec.objects)}
    for name in ("background", "texture"):
        wanted = getattr(spec, name)
        if wanted is not None:
            facts[name] = getattr(reading, name) == wanted
    seen: list[Seen | None] = [*reading.objects]
    seen += [None] * (len(spec.objects) - len(seen))
    best: list[dict[str, bool]] = []
    for chosen in permutations(seen, len(spec.objects)):
        each = [_object_facts(wanted, one) for wanted, one in zip(spec.objects, chosen, strict=True)]
        if not best or sum(sum(one.values()) for one in each) > sum(sum(one.values()) for one in best):
            best = each
    for one in best:
        for name, holds in one.items():
            facts[name] = facts.get(name, True) and holds
    return ClipVerdict(exact=all(facts.values()), facts=facts, objects=tuple(best), reading=reading)


def clip_rates(verdicts: Sequence[ClipVerdict]) -> dict[str, list[bool]]:
    """Every named fact over many clips: of a scene once per clip, of an object once per object."""
    found: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name in ("count", "background", "texture"):
            if name in verdict.facts:
                found.setdefault(name, []).append(verdict.facts[name])
        for one in verdict.objects:
            for name, holds in one.items():
                found.setdefault(name, []).append(holds)
    return found


def _object_facts(wanted: ObjectFacts, seen: Seen | None) -> dict[str, bool]:
    facts = {
        name: seen is not None and getattr(seen.facts, name) == value
        for name, value in wanted.named().items()
    }
    if wanted.motion is not None and wanted.motion.endswith(WALL_PHRASE):
        facts["reappears"] = seen is not None and bool(seen.reappears)
    return facts


def _seen(track: Track, wall: tuple[float, float] | None) -> Seen:
    motion = read_motion(track, wall)
    shape = track.shape()
    third = max(1, len(track.whole) // 3)
    first, last = slice(None, third), slice(-third, None)
    colours = [_median(track.rgb[part][track.whole[part]]) for part in (first, last)]
    sizes = [math.nan, math.nan]
    if shape is not None and motion.phrase not in ("grows", "shrinks"):
        column = SHAPES.index(shape)
        sizes = [float(_median(track.radius[part][track.whole[part]])[column]) for part in (first, last)]
    return Seen(
        facts=ObjectFacts(colour=track.hue(), shape=shape, motion=motion.phrase, speed=motion.speed),
        colour_drift=float(np.linalg.norm(colours[0] - colours[1])),
        size_drift=abs(sizes[1] / sizes[0] - 1),
        presence=float((track.colour >= 0).mean()),
        reappears=None if wall is None else _reappears(track, wall),
    )


def _median(values: Array) -> Array:
    """Over the frames; NaN where there are none."""
    return np.median(values, axis=0) if len(values) else np.full(values.shape[1:], np.nan)


def _reappears(track: Track, wall: tuple[float, float]) -> bool:
    """Whether the same object is whole on one side in the first half and on the other one in the second."""
    x = np.where(track.whole, np.real(track.place), np.nan)
    half = len(x) // 2
    for before, after in ((x < wall[0], x > wall[1]), (x > wall[1], x < wall[0])):
        before[half:], after[:half] = False, False
        if before.any() and after.any():
            same_colour = track.hue(before) == track.hue(after)
            return same_colour and track.shape(before) == track.shape(after)
    return False


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def _phrase(facts: ObjectFacts) -> str:
    words = (facts.colour, facts.shape or "shape", facts.motion or "moves unclearly", facts.speed)
    return _article(" ".join(word for word in words if word))
