"""Finds the objects of a clip in its frames and follows them."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffctrl.zoo.clips.vocabulary import SHAPES, WALL_RGB
from diffctrl.zoo.worlds.vocabulary import COLOURS

from .ground import Ground, read_ground, read_texture, to_segment
from .pixels import FOREGROUND, classify
from .regions import grow, label
from .templates import overlaps, turning_bank

Array = np.ndarray
SIDE = 64
SMALLEST = 14  # pixels of an object; the smallest triangle of the world has about 25
FAINT = 0.3  # of an object's usual area: less is a speck, or the last of it behind the wall
MOST_OBJECTS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Track:
    """One object over T frames; entries of frames where it was not seen are NaN, or -1 for `colour`.

    Attributes:
        whole: (T,) bool, seen and not cut by the wall.
        place: (T,) complex, x + i y in sides, y down.
        colour: (T,) int, palette index. rgb: (T, 3).
        likeness, radius, angle: (T, S) for each of SHAPES: IoU with its best template, and that template's
            radius in sides and angle in radians.
    """

    whole: Array
    place: Array
    colour: Array
    rgb: Array
    likeness: Array
    radius: Array
    angle: Array

    def shape(self, frames: Array | slice = slice(None)) -> str | None:
        """The name that the silhouettes of some frames are most like; None where it was not seen whole."""
        scores = self.likeness[frames][self.whole[frames]]
        return SHAPES[int(scores.sum(0).argmax())] if len(scores) else None

    def hue(self, frames: Array | slice = slice(None)) -> str | None:
        """The palette colour of most of some frames."""
        seen = self.colour[frames][self.colour[frames] >= 0]
        return COLOURS[int(np.bincount(seen).argmax())] if len(seen) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """What the frames show: background, texture, the wall's edges in sides or None, and the tracks."""

    background: str
    texture: str
    wall: tuple[float, float] | None
    tracks: tuple[Track, ...]


def canonical(video: Tensor) -> Array:
    """(T, 3, H, H) -> (T, 64, 64, 3) float32 on the CPU."""
    if video.ndim != 4 or video.shape[1] != 3 or video.shape[2] != video.shape[3] or not video.numel():
        raise ValueError(f"video must be (T, 3, H, H) and not empty, got {tuple(video.shape)}")
    video = video.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(video).all()):
        raise ValueError("video has values that are not finite")
    if video.shape[2] != SIDE:
        video = functional.interpolate(video, (SIDE, SIDE), mode="bilinear", antialias=True)
    return video.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


def follow(frames: Array) -> Scene:
    """Read frames (T, 64, 64, 3): the still parts, and what moves over them."""
    still = np.median(frames, axis=0)
    wall = _wall(frames)
    open_columns = np.ones(SIDE, dtype=bool)
    if wall is not None:
        open_columns[max(wall[0] - 1, 0) : wall[1] + 1] = False
    picture = still[:, open_columns]
    ground = read_ground(picture)
    tracks = _tracks(_sightings(frames, ground, open_columns), len(frames))
    return Scene(
        background=ground.name,
        texture=_texture(picture),
        wall=None if wall is None else (wall[0] / SIDE, wall[1] / SIDE),
        tracks=tuple(tracks),
    )


def _wall(frames: Array) -> tuple[int, int] | None:
    """First and last-plus-one column of a gray strip that stands in all frames."""
    gray = (np.abs(frames - np.asarray(WALL_RGB, dtype=np.float32)) < 0.09).all(-1)
    columns = np.nonzero(gray.mean((0, 1)) > 0.85)[0]
    if not len(columns):
        return None
    first, last = int(columns[0]), int(columns[-1]) + 1
    # A gray background fills the whole width; a wall is in the middle.
    return (first, last) if 0.2 * SIDE < last - first < 0.6 * SIDE and first > 4 and last < SIDE - 4 else None


def _texture(picture: Array) -> str:
    """Of the still picture, at the size for which the reading of textures was made."""
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None]
    large = functional.interpolate(tensor, scale_factor=2, mode="bilinear")[0].permute(1, 2, 0).numpy()
    large = large[:, : large.shape[1] // 4 * 4]
    ground = read_ground(large)
    return read_texture(ground, ground.distance > FOREGROUND)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sighting:
    frame: int
    place: complex
    area: float
    whole: bool
    colour: int
    rgb: Array
    likeness: Array
    radius: Array
    angle: Array


def _sightings(frames: Array, ground: Ground, open_columns: Array) -> list[_Sighting]:
    """Every connected coloured region of every frame. All frames are read as one tall picture."""
    count = len(frames)
    tall = frames.reshape(count * SIDE, SIDE, 3)
    distance, mix = to_segment(tall, ground.tones)
    pixels = classify(tall, Ground(name=ground.name, tones=ground.tones, distance=distance, mix=mix))
    mask = pixels.foreground & open_columns
    mask.reshape(count, SIDE, SIDE)[:, (0, -1)] = False  # no region reaches over two frames
    labels, number = label(mask, diagonal=True)
    flat = labels.ravel()
    order = np.argsort(flat, kind="stable")
    edges = np.searchsorted(flat[order], np.arange(1, number + 2))
    closed = ~open_columns
    found = []
    for region in range(number):
        at = order[edges[region] : edges[region + 1]]
        if len(at) < SMALLEST:
            continue
        y, x = np.divmod(at, SIDE)
        colours = pixels.colour[y, x]
        if (colours >= 0).sum() < 0.4 * len(at):
            continue  # gray: what is left of a wall, or of a texture
        frame = int(y[0]) // SIDE
        top, bottom = max(y.min() - 2, frame * SIDE), min(y.max() + 3, (frame + 1) * SIDE)
        left, right = max(x.min() - 2, 0), min(x.max() + 3, SIDE)
        near = grow(labels[top:bottom, left:right] == region + 1)
        depth = distance[top:bottom, left:right]
        core = float(np.percentile(distance[y, x], 70))
        cover = np.where(near & open_columns[left:right], depth / core, 0).clip(0, 1)
        likeness, radius, angle, places = _compare(cover, (left, top - frame * SIDE))
        inner = at[distance[y, x] > 0.8 * core]
        found.append(
            _Sighting(
                frame=frame,
                place=places[int(likeness.argmax())],
                area=float(cover.sum()),
                whole=not closed[max(x.min() - 1, 0) : x.max() + 2].any(),
                colour=int(np.bincount(colours[colours >= 0]).argmax()),
                rgb=np.median(tall.reshape(-1, 3)[inner], axis=0),
                likeness=likeness,
                radius=radius,
                angle=angle,
            )
        )
    return found


def _compare(cover: Array, corner: tuple[int, int]) -> tuple[Array, Array, Array, list[complex]]:
    """IoU, radius, angle and centre of the best template of each shape."""
    bank = turning_bank()
    scores, (x, y, unit) = overlaps(bank, cover)
    likeness, radius, angle = (np.zeros(len(SHAPES)) for _ in range(3))
    places = []
    names = np.array([name for (name,) in bank.names])
    for index, shape in enumerate(SHAPES):
        rows = np.nonzero(names == shape)[0]
        best = rows[scores[rows].argmax()]
        own = unit / float(bank.scale[best])
        dx, dy = bank.centre[best] * own
        likeness[index], radius[index], angle[index] = scores[best], own / SIDE, bank.angle[best]
        places.append(complex((x - dx + corner[0]) / SIDE, (y - dy + corner[1]) / SIDE))
    return likeness, radius, angle, places


def _tracks(sightings: list[_Sighting], count: int) -> list[Track]:
    """Give each sighting to an object so that places change as little as possible from frame to frame."""
    if not sightings:
        return []
    usual = float(np.median([one.area for one in sightings]))
    by_frame: list[list[_Sighting]] = [[] for _ in range(count)]
    for one in sightings:
        if one.area > FAINT * usual:
            by_frame[one.frame].append(one)
    numbers = np.array([len(each) for each in by_frame])
    # As many objects as most of the frames with any show.
    number = min(int(np.bincount(numbers[numbers > 0]).argmax()), MOST_OBJECTS)
    start = int(np.nonzero(numbers >= number)[0][0])
    owned: list[dict[int, _Sighting]] = [{} for _ in range(number)]
    last = [one.place for one in sorted(by_frame[start], key=lambda one: -one.area)[:number]]
    for frame, each in enumerate(by_frame):
        each = sorted(each, key=lambda one: -one.area)[:MOST_OBJECTS]
        if not each:
            continue
        choices = [*range(len(each)), *([None] * max(number - len(each), 0))]
        best = min(
            itertools.permutations(choices, number),
            key=lambda chosen: sum(
                1.0 if at is None else abs(each[at].place - last[track]) for track, at in enumerate(chosen)
            ),
        )
        for track, at in enumerate(best):
            if at is not None:
                owned[track][frame], last[track] = each[at], each[at].place
    return [_track(each, count) for each in owned]


def _track(seen: dict[int, _Sighting], count: int) -> Track:
    shapes = (count, len(SHAPES))
    track = Track(
        whole=np.zeros(count, dtype=bool),
        place=np.full(count, np.nan, dtype=complex),
        colour=np.full(count, -1),
        rgb=np.full((count, 3), np.nan),
        likeness=np.full(shapes, np.nan),
        radius=np.full(shapes, np.nan),
        angle=np.full(shapes, np.nan),
    )
    for frame, one in seen.items():
        track.whole[frame] = one.whole
        for name in ("place", "colour", "rgb", "likeness", "radius", "angle"):
            getattr(track, name)[frame] = getattr(one, name)
    return track
