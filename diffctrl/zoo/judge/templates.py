"""Silhouettes of everything that the renderer draws, in one normal position, and the best match among them.

A silhouette is moved so that its centroid is the origin and scaled so that its area is that of the unit disc;
what is left are shape and turn, which one matrix product compares with a bank of silhouettes from the
renderer's own signed distances. The bank remembers where each template's own frame lies, so a match also
gives centre and radius.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from diffctrl.zoo.worlds import sdf
from diffctrl.zoo.worlds.vocabulary import ACTIONS, BODIES, HATS, SHAPES

from .regions import filled

Array = np.ndarray
GRID = 36
REACH = 1.9  # half-width of the normalised window, in radii of a disc of the same area
TURN_PERIODS = {"circle": 0, "square": 90, "triangle": 120, "star": 72, "cross": 90}
"""Degrees after which a turned shape looks as before; 0 where it always does."""
OUTER_SHAPES = tuple(name for name in SHAPES if name != "ring")  # a filled ring is a circle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bank:
    """T templates.

    Attributes:
        rows: (T, C * GRID * GRID) float32, soft silhouettes; C = 2 where a second channel shows the hat
        alone.
        norms: (T,), their sums of squares. names: T tuples, what each one shows.
        angle, mirror, scale: (T,) float; `scale` is radii per normalised unit. centre: (T, 2), the normalised
            silhouette's centroid in the object's frame, upright, in radii. offset: (T,), how far outside the
            zero line the silhouette ends, in radii.
    """

    rows: torch.Tensor
    norms: Array
    names: list[tuple[str, ...]]
    angle: Array
    mirror: Array
    scale: Array
    centre: Array
    offset: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The best template of a silhouette: what it shows, its IoU, and the object's frame in pixels."""

    names: tuple[str, ...]
    iou: float
    x: float
    y: float
    radius: float
    angle: float
    mirror: float
    offset: float

    def frame(self, height: int, width: int) -> tuple[Array, Array]:
        """Local coordinates (H, W) in radii of every pixel centre."""
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
        px, py = (x - self.x) / self.radius, (y - self.y) / self.radius
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        return (px * cosine + py * sine) * self.mirror, py * cosine - px * sine


def _moments(weights: Array, x: Array, y: Array) -> tuple[float, float, float]:
    total = float(weights.sum())
    return float((weights * x).sum()) / total, float((weights * y).sum()) / total, total


def _sample(picture: Array, x: Array, y: Array) -> Array:
    """Bilinear values of `picture` (H, W), pixel centres at k + 0.5, zero outside."""
    height, width = picture.shape
    padded = np.pad(picture, 1)
    x, y = (x + 0.5).clip(0, width + 0.999), (y + 0.5).clip(0, height + 0.999)
    left, top = x.astype(np.int64), y.astype(np.int64)
    right, bottom = np.minimum(left + 1, width + 1), np.minimum(top + 1, height + 1)
    fx, fy = x - left, y - top
    above = padded[top, left] * (1 - fx) + padded[top, right] * fx
    below = padded[bottom, left] * (1 - fx) + padded[bottom, right] * fx
    return (above * (1 - fy) + below * fy).astype(np.float32)


def normalise(mask: Array, *more: Array) -> tuple[Array, tuple[float, float, float]]:
    """Move and scale a mask (H, W) to the normal position, and `more` masks of the same size along with it.

    Returns:
        (C * GRID * GRID,) float32 for C masks, and (x, y, unit): where the origin lies and how long the unit
        is, in pixels.
    """
    weights = mask.astype(np.float32)
    y, x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32) + 0.5
    cx, cy, area = _moments(weights, x, y)
    unit = math.sqrt(area / math.pi)
    line = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH * unit
    pictures = (weights, *(other.astype(np.float32) for other in more))
    rows = [_sample(picture, (cx + line)[None, :], (cy + line)[:, None]).ravel() for picture in pictures]
    return np.concatenate(rows), (cx, cy, unit)


_SOURCE = 96  # pixels across the window in which a template is drawn before it is normalised
_WINDOW = 1.5  # its half-width in radii


def _template(distances: tuple[torch.Tensor, ...], offset: float) -> tuple[Array, float, float, float]:
    """Row, scale and centre of a template drawn from the distances of its channels."""
    pixel = 2 * _WINDOW / _SOURCE
    covers = [(0.5 - (part.numpy() - offset) / pixel).clip(0, 1) for part in distances]
    covers[0] = np.maximum(covers[0], filled(covers[0] > 0.5))  # as the silhouettes that are compared
    row, (x, y, unit) = normalise(*covers)
    return row, unit * pixel, (x - _SOURCE / 2) * pixel, (y - _SOURCE / 2) * pixel


def _canvas(angle: float, mirror: float) -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.from_numpy((((np.arange(_SOURCE) + 0.5) / _SOURCE * 2 - 1) * _WINDOW).astype(np.float32))
    y, x = torch.meshgrid(line, line, indexing="ij")
    cosine, sine = math.cos(angle), math.sin(angle)
    return (x * cosine + y * sine) * mirror, y * cosine - x * sine


_Entry = tuple[
    tuple[str, ...], float, float, float, tuple[torch.Tensor, ...]
]  # names, angle, mirror, offset, channels


def _bank(entries: list[_Entry]) -> Bank:
    names, angles, mirrors, offsets, channels = zip(*entries, strict=True)
    drawn = [_template(parts, offset) for parts, offset in zip(channels, offsets, strict=True)]
    rows = np.stack([row for row, *_ in drawn])
    return Bank(
        rows=torch.from_numpy(rows),
        norms=np.square(rows).sum(1),
        names=list(names),
        angle=np.array(angles),
        mirror=np.array(mirrors),
        scale=np.array([scale for _, scale, *_ in drawn]),
        centre=np.array([(x, y) for _, _, x, y in drawn]),
        offset=np.array(offsets),
    )


@lru_cache(maxsize=1)
def shape_bank() -> Bank:
    """Filled silhouettes of OUTER_SHAPES, turned by up to 15 degrees, edges up to 0.16 radii further out."""
    entries = []
    for degrees in np.linspace(-15, 15, 9):
        angle = math.radians(degrees)
        turned = sdf.shape_distances(*_canvas(angle, 1.0))
        distances: dict[str, Any] = dict(zip(SHAPES, turned, strict=True))
        for name in OUTER_SHAPES:
            if name == "circle":  # any turn and, after scaling, any edge gives the same disc
                if not degrees:
                    entries.append(((name,), 0.0, 1.0, 0.0, (distances[name],)))
                continue
            entries += [((name,), angle, 1.0, offset, (distances[name],)) for offset in (0.0, 0.08, 0.16)]
    return _bank(entries)


@lru_cache(maxsize=1)
def turning_bank() -> Bank:
    """Silhouettes of the shapes that clips have, at every angle that looks different, 5 degrees apart."""
    entries = []
    for name, period in TURN_PERIODS.items():
        for step in range(steps := round(period / 5) if period else 1):
            angle = math.radians(period * step / steps)
            distance = sdf.shape_distance(name, *_canvas(angle, 1.0))
            entries.append(((name,), angle, 1.0, 0.0, (distance,)))
    return _bank(entries)


@lru_cache(maxsize=1)
def character_bank() -> Bank:
    """Silhouettes of every body, hat, way of holding the limbs, side and tilt."""
    entries = []
    for turn, degrees, mirror in _poses():
        angle = math.radians(90 * turn + degrees)
        x, y = _canvas(angle, mirror)
        bodies = sdf.body_distances(x, y)
        for jumps in (False, True):
            if jumps and turn:
                continue
            limbs = sdf.limb_distance(x, y, torch.tensor(jumps))
            action = ACTIONS[2] if turn else ACTIONS[int(jumps)]
            for body, distance in enumerate(bodies):
                figure = torch.minimum(distance, limbs)
                hats = sdf.hat_distances(x, y - sdf.HAT_LINE[body])
                for hat, hat_distance in zip(HATS, hats, strict=True):
                    if mirror < 0 and hat != "cap":
                        continue  # everything else is symmetric
                    names = (BODIES[body], hat, action)
                    entries.append(
                        (names, angle, mirror, 0.0, (torch.minimum(figure, hat_distance), hat_distance))
                    )
    return _bank(entries)


def _poses() -> list[tuple[int, float, float]]:
    tilts = np.linspace(-10, 10, 6)
    return [(turn, float(tilt), side) for turn in (0, 1, -1) for tilt in tilts for side in (1.0, -1.0)]


def overlaps(bank: Bank, mask: Array, *more: Array) -> tuple[Array, tuple[float, float, float]]:
    """Soft IoU (T,) of masks, one per channel of the bank, with each template; their normal position."""
    row, place = normalise(mask, *more)
    # The sum of minima would need T passes; for nearly binary rows one matrix product is the same.
    both = torch.mv(bank.rows, torch.from_numpy(row)).numpy()
    return both / (bank.norms + float(row @ row) - both), place


def located(bank: Bank, index: int, iou: float, place: tuple[float, float, float]) -> Match:
    """The match with template `index`, its frame brought back to pixels."""
    x, y, unit = place
    radius = unit / float(bank.scale[index])
    dx, dy = bank.centre[index] * radius
    return Match(
        names=bank.names[index],
        iou=iou,
        x=x - float(dx),
        y=y - float(dy),
        radius=radius,
        angle=float(bank.angle[index]),
        mirror=float(bank.mirror[index]),
        offset=float(bank.offset[index]),
    )
