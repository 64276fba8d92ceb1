"""Which motion of the world of clips a track shows: the best fit out of a library of ways."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffctrl.zoo.clips.captions import motion_phrase
from diffctrl.zoo.clips.vocabulary import MOTIONS, SHAPES, SPEEDS

from .templates import TURN_PERIODS
from .tracks import Track

Array = np.ndarray
STILL = 0.02  # root mean square of the place, in sides, below which nothing moves
UNEXPLAINED = 0.2  # share of the way's variance that the best fit may leave
GROWN = 1.25
TURNS = math.radians(1.3)  # per frame
FASTER = {"moves": 0.0138, "bounces": 1 / 11.7, "orbits": math.radians(12), "rotates": math.radians(4.4)}
GROWS_FASTER = 0.0038
SHORTEST = 17  # frames of a clip; in fewer the world's motions do not tell themselves apart
FEWEST = 6  # frames that show the object; with fewer there is no motion to read
BRIEFEST = 8  # frames that a move or a growth takes at least
_WAYS = (-1 + 0j, 1 + 0j, 0 - 1j, 0 + 1j)  # of the first four MOTIONS, y down


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """What a track does: phrase or None where nothing fits, speed or None where it has none."""

    phrase: str | None
    speed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Library:
    """K ways (K, T) complex of unit size, what each is called, its rate, and which may be turned to fit."""

    ways: Array
    names: list[str]
    rates: Array
    turned: Array


@lru_cache(maxsize=8)
def _library(frames: int) -> _Library:
    t = np.arange(frames)
    part = t / (frames - 1)
    entries: list[tuple[Array, str, float, bool]] = []
    for motion, way in zip(MOTIONS[:4], _WAYS, strict=True):
        for duration in np.unique(np.geomspace(BRIEFEST, frames - 1, 24).round()):
            entries.append((way * (t / duration).clip(max=1), motion, 1 / duration, False))
        entries.append((way * (1 - np.abs(2 * part - 1)), motion_phrase("back", motion), 0.0, False))
        for then, other in zip(MOTIONS[:4], _WAYS, strict=True):
            if abs((way.conjugate() * other).real) < 0.5:
                both = way * (2 * part).clip(max=1) + other * (2 * part - 1).clip(min=0)
                entries.append((both, motion_phrase("then", motion, then), 0.0, False))
    for period in np.arange(6.5, 20.1, 0.25):
        entries.append((-1j * np.abs(np.sin(math.pi * t / period)), "bounces", 1 / period, False))
    for degrees in (*np.arange(-21, -4.9, 0.5), *np.arange(5, 21.1, 0.5)):
        rate = math.radians(degrees)
        entries.append((np.exp(1j * rate * t), "orbits", abs(rate), True))
    ways, names, rates, turned = zip(*entries, strict=True)
    return _Library(ways=np.stack(ways), names=list(names), rates=np.array(rates), turned=np.array(turned))


def read_motion(track: Track, wall: tuple[float, float] | None) -> Motion:
    """The motion of a track, in front of a wall or without one; no phrase where too little is seen of it."""
    # Behind a wall what is half hidden counts too: few frames show the whole.
    seen = track.whole if wall is None else track.colour >= 0
    if len(seen) < SHORTEST or seen.sum() < FEWEST or not track.whole.any():
        return Motion(phrase=None)
    place = track.place[seen]
    centred = place - place.mean()
    if math.sqrt(float((np.abs(centred) ** 2).mean())) < STILL:
        return _in_place(track)
    library = _library(len(seen))
    ways = library.ways[:, seen]
    ways = ways - ways.mean(1, keepdims=True)
    size = np.maximum((np.abs(ways) ** 2).sum(1), 1e-9)
    fit = (ways.conj() * centred).sum(1) / size
    scale = np.where(library.turned, fit, fit.real.clip(min=0))
    left = (np.abs(centred - scale[:, None] * ways) ** 2).sum(1) / (np.abs(centred) ** 2).sum()
    best = int(left.argmin())
    if left[best] > UNEXPLAINED:
        return Motion(phrase=None)
    name = library.names[best]
    if wall is not None and name in MOTIONS[:2]:
        return Motion(phrase=motion_phrase("wall", name))
    verb = name.partition(" ")[0]
    if name not in MOTIONS:
        return Motion(phrase=name)
    rate = float(library.rates[best] * (abs(scale[best]) if verb == "moves" else 1))
    return Motion(phrase=name, speed=SPEEDS[int(rate > FASTER[verb])])


def _in_place(track: Track) -> Motion:
    """Growing, shrinking, rotating, or nothing, of a track that is whole in some frame."""
    shape = track.shape()
    assert shape is not None
    column = SHAPES.index(shape)
    t = np.nonzero(track.whole)[0]
    radius = track.radius[t, column]
    ratio = float(np.median(radius[-3:]) / np.median(radius[:3]))
    if ratio > GROWN or ratio < 1 / GROWN:
        if t[-1] < BRIEFEST:
            return Motion(phrase=None)  # gone before any growth of the world ends
        rate = _growth_rate(t, radius)
        return Motion(phrase="grows" if ratio > 1 else "shrinks", speed=SPEEDS[int(rate > GROWS_FASTER)])
    period = math.radians(TURN_PERIODS[shape])
    if period:
        rates = np.radians(np.arange(-9, 9.01, 0.2))
        turned = np.exp(2j * math.pi / period * (track.angle[t, column] - rates[:, None] * t))
        agreement = np.abs(turned.mean(1))
        best = int(agreement.argmax())
        rate = float(rates[best])
        if abs(rate) > TURNS:
            if agreement[best] < 0.6:
                return Motion(phrase=None)
            way = "clockwise" if rate > 0 else "counterclockwise"
            return Motion(phrase=f"rotates {way}", speed=SPEEDS[int(abs(rate) > FASTER["rotates"])])
    return Motion(phrase="stands still")


def _growth_rate(t: Array, radius: Array) -> float:
    """Change of the radius per frame while it changes."""
    durations = np.arange(float(BRIEFEST), t[-1] + 1)
    ways = (t / durations[:, None]).clip(max=1)
    ways = ways - ways.mean(1, keepdims=True)
    centred = radius - radius.mean()
    scale = (ways @ centred) / np.maximum((ways * ways).sum(1), 1e-9)
    left = ((centred - scale[:, None] * ways) ** 2).sum(1)
    best = int(left.argmin())
    return abs(float(scale[best])) / float(durations[best])
