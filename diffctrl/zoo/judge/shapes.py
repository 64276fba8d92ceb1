"""Reads shapes: which instances a region holds, and each one's colour, shape, size, pattern and style."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from diffctrl.zoo.worlds import rendering, sdf
from diffctrl.zoo.worlds.facts import ObjectFacts
from diffctrl.zoo.worlds.sampling import LARGE, SMALL
from diffctrl.zoo.worlds.vocabulary import BACKGROUNDS, COLOURS, DARK_BACKGROUNDS, PATTERNS, SHAPES

from .ground import Ground
from .hidden import fit_hidden
from .pixels import FOREGROUND, Pixels
from .reading import Instance
from .regions import filled, grow, spread
from .templates import Match, located, overlaps, shape_bank

Array = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One instance before its facts are read: palette colour, and the match of its filled outline.

    Two (H, W) bool masks: `free`, where it could be seen; `clear`, away from another instance of its region.
    """

    colour: int
    match: Match
    free: Array
    clear: Array
    behind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlines:
    """The one or two colours of a region and the filled silhouette of each, with its match; the front one first.

    `labels` (H, W) int32 says which silhouette a pixel belongs to, from 1; 0 is none.
    """

    colours: list[int]
    masks: list[Array]
    matches: list[Match]
    labels: Array

    @property
    def likeness(self) -> float:
        """How much the silhouettes look like shapes: their IoU, weighted by area."""
        areas = [float(mask.sum()) for mask in self.masks]
        return sum(match.iou * area for match, area in zip(self.matches, areas, strict=True)) / sum(areas)


def outlines(pixels: Pixels, region: Array, colours: list[int]) -> Outlines:
    """Divide a connected region between its one or two palette colours."""
    labels = region.astype(np.int32)
    masks = [region]
    if len(colours) > 1:
        labels = np.zeros(region.shape, dtype=np.int32)
        for number, colour in enumerate(colours, start=1):
            labels[region & (pixels.colour == colour)] = number
        labels = spread(_without_specks(labels), region & pixels.foreground)
        masks = [filled(labels == number) for number in (1, 2)]
    matches = [_outer(mask) for mask in masks]
    if len(colours) > 1 and matches[1].iou > matches[0].iou:  # what is hidden in part fits worse
        labels = np.where(labels > 0, 3 - labels, 0)
        return Outlines(colours=colours[::-1], masks=masks[::-1], matches=matches[::-1], labels=labels)
    return Outlines(colours=colours, masks=masks, matches=matches, labels=labels)


def split(pixels: Pixels, region: Array, found: Outlines) -> list[Part]:
    """The shapes of a region, the front one first; the one behind is fitted to what can be seen of it."""
    everywhere = np.ones_like(region)
    if len(found.colours) < 2:
        return [Part(colour=found.colours[0], match=found.matches[0], free=everywhere, clear=everywhere)]
    front, back = found.masks
    # Background that shows inside the pair is a ring's hole or a white stripe on white: it says nothing here.
    unknown = region & ~pixels.foreground
    hidden = fit_hidden((found.labels == 2) & ~front, ~front & ~unknown)
    return [
        Part(colour=found.colours[0], match=found.matches[0], free=everywhere, clear=~grow(back, 3)),
        Part(colour=found.colours[1], match=hidden, free=~grow(front, 2), clear=~grow(front, 4), behind=True),
    ]


def _without_specks(labels: Array) -> Array:
    """Drop labels of thin blends between two colours, which `spread` then fills from the nearer side."""
    out = np.zeros_like(labels)
    for number in (1, 2):
        area = labels == number
        out[area & ~grow(~area)] = number
    return out


def _outer(mask: Array) -> Match:
    bank = shape_bank()
    scores, place = overlaps(bank, mask)
    best = int(scores.argmax())
    return located(bank, best, float(scores[best]), place)


def decide(pixels: Pixels, ground: Ground, part: Part, front: int | None) -> Instance:
    """Read every fact of one instance; `front` is the index of the instance that hides a part of it."""
    match = part.match
    own = (pixels.colour == part.colour) & part.free
    strength = float(np.median(ground.distance[own])) if own.any() else 1.0
    shape = match.names[0]
    if shape == "circle" and _hole(ground, own, part, strength):
        shape = "ring"
    # The outer edge, whatever the shape: a ring's inner edge lies elsewhere for every style.
    edge = _distance(match, match.names[0], match.radius) - match.offset * match.radius
    outlined = _outlined(pixels, ground, part.clear, edge)
    ramp = 1.0 if outlined > 0.5 else _ramp(pixels, ground, own, part.clear, edge)
    soft = ramp > SOFT_RAMP_FROM
    outside = (
        rendering.OUTLINE_OUTSIDE
        if outlined > 0.5
        else (0.5 - FOREGROUND / max(strength, 0.2)) * (6 if soft else 1)
    )
    radius = _radius(match, shape, outside)
    distance = _distance(match, shape, radius)
    inside = part.free & (distance < (-1.8 if outlined > 0.5 else -1.5))
    total = max(int(inside.sum()), 1)
    striped = float(pixels.white[inside].sum()) / total / 0.10
    dotted = float(pixels.black[inside].sum()) / total / 0.05
    light = _light(pixels, own & (distance < -1.5), match, radius)
    pattern = 0 if max(striped, dotted) < 1 else 1 if striped > dotted else 2
    style = "outlined" if outlined > 0.5 else "soft" if soft else "shaded" if light < -0.2 else "flat"
    facts = ObjectFacts(
        colour=COLOURS[part.colour],
        pattern=PATTERNS[pattern],
        shape=shape,
        size="large" if radius > SIZE_FROM else "small",
    )
    return Instance(
        facts=facts,
        x=match.x,
        y=match.y,
        radius=radius,
        likeness=match.iou,
        style=style,
        behind=front if part.behind else None,
    )


SIZE_FROM = 128 * (SMALL[1] + LARGE[0]) / 2
SOFT_RAMP_FROM = 3.8
_OUTER = {"circle": 0.90, "ring": 0.94}


def _distance(match: Match, shape: str, radius: float) -> Array:
    """Signed distance in pixels (128, 128) to a shape of this radius at the match's place and turn."""
    x, y = replace(match, radius=radius).frame(128, 128)
    return sdf.shape_distances(torch.from_numpy(x), torch.from_numpy(y))[SHAPES.index(shape)].numpy() * radius


@lru_cache(maxsize=64)
def _unit_area(shape: str, outside: float) -> float:
    """Area, in squared radii, of a filled shape whose edge is moved out by `outside` radii."""
    line = torch.linspace(-1.6, 1.6, 161)
    y, x = torch.meshgrid(line, line, indexing="ij")
    distance = sdf.shape_distances(x, y)[SHAPES.index(shape)] - outside
    return float((0.5 - distance / 0.02).clamp(0, 1).mean()) * 3.22**2


def _radius(match: Match, shape: str, outside: float) -> float:
    """The radius in pixels that explains the silhouette's area if its edge lies `outside` pixels too far out."""
    area = _unit_area(match.names[0], round(match.offset, 2)) * match.radius**2
    outer = "circle" if shape == "ring" else shape
    radius = match.radius
    for _ in range(4):
        radius = math.sqrt(area / _unit_area(outer, round(outside / radius, 2)))
    return radius * _OUTER["circle"] / _OUTER["ring"] if shape == "ring" else radius


def _hole(ground: Ground, own: Array, part: Part, strength: float) -> bool:
    """Whether what looks like a disc from outside has a ring's hole: none of its colour around the centre."""
    x, y = part.match.frame(128, 128)
    rho = np.hypot(x, y)
    core = part.free & (rho > 0.15) & (rho < 0.30)
    return core.sum() >= 6 and (own & (ground.distance > 0.4 * strength))[core].mean() < 0.3


def _outlined(pixels: Pixels, ground: Ground, clear: Array, edge: Array) -> float:
    """Share of ink just inside the silhouette: white on dark backgrounds, else black."""
    ink = pixels.white if DARK_BACKGROUNDS[BACKGROUNDS.index(ground.name)] else pixels.value < 0.40
    contour = clear & (edge > -2.4) & (edge < -0.6)
    return float(ink[contour].mean()) if contour.any() else 0.0


def _ramp(pixels: Pixels, ground: Ground, own: Array, clear: Array, edge: Array) -> float:
    """Width in pixels of the edge's ramp: the linear ramp, of any place and height, that fits the profile best."""
    near = clear & (np.abs(edge) < 5)
    # Inside, stripes and dots are no part of the profile.
    near &= (edge > -0.5) | (own & ~pixels.white & ~pixels.black)
    where, what = edge[near], ground.distance[near]
    bins = np.floor((where + 5) * 2).astype(int).clip(0, 19)
    count = np.bincount(bins, minlength=20)
    profile = np.bincount(bins, weights=what, minlength=20) / np.maximum(count, 1)
    middle = -4.75 + 0.5 * np.arange(20)
    model = (0.5 - (middle - _PLACES[None, :, None]) / _WIDTHS[:, None, None]).clip(0, 1)
    height = (count * model * profile).sum(-1) / np.maximum((count * model * model).sum(-1), 1e-6)
    rest = (count * (profile - height[..., None] * model) ** 2).sum(-1)
    return float(_WIDTHS[int(rest.min(1).argmin())])


_WIDTHS = np.array([1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0])
_PLACES = np.linspace(-3, 1.5, 19)


def _light(pixels: Pixels, own: Array, match: Match, radius: float) -> float:
    """Slope of log value over the distance from the upper left of the object: 0 for a flat one."""
    if own.sum() < 12:
        return 0.0
    y, x = np.nonzero(own)
    away = np.hypot((x + 0.5 - match.x) / radius + 0.4, (y + 0.5 - match.y) / radius + 0.4)
    level = np.log(pixels.value[own].clip(0.02))
    away = away - away.mean()
    return float((away * level).sum() / max((away * away).sum(), 1e-3))
