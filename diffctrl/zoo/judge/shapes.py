"""Reads shapes: which instances a region holds, and each one's colour, shape, size, pattern and style."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch

from diffctrl.zoo.worlds import rendering, sdf
from diffctrl.zoo.worlds.facts import ObjectFacts
from diffctrl.zoo.worlds.sampling import LARGE, SMALL
from diffctrl.zoo.worlds.vocabulary import COLOURS, PATTERNS

from .ground import Ground
from .hidden import fit_hidden
from .pixels import FOREGROUND, Pixels
from .reading import Instance
from .regions import filled, grow, shrink, spread
from .templates import Match, located, overlaps, shape_bank

Array = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One instance before its facts are read: palette colour, and the match of its filled outline.

    An `inner` one was matched without the outline around it. Two (H, W) bool masks: `free`, where it could be
    seen; `clear`, away from another instance of its region.
    """

    colour: int
    match: Match
    free: Array
    clear: Array
    inner: bool = False
    behind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlines:
    """The one or two colours of a region and the filled silhouette of each, with its match; the front one
    first.

    `seen` are the pixels of each, (H, W) bool; where the region is `inked`, without any outline. It is
    `doubtful` which of the two is in front where both look nearly whole.
    """

    colours: list[int]
    masks: list[Array]
    matches: list[Match]
    seen: list[Array]
    inked: bool = False
    doubtful: bool = False

    def turned(self) -> Self:
        """The same with the other one in front."""
        return replace(
            self,
            colours=self.colours[::-1],
            masks=self.masks[::-1],
            matches=self.matches[::-1],
            seen=self.seen[::-1],
        )

    @property
    def likeness(self) -> float:
        """How much the region looks like shapes: an IoU."""
        if len(self.masks) == 1:
            return self.matches[0].iou
        # A hat alone may look like a shape, a shape behind another one like nothing.
        whole = sum(float(mask.sum()) for mask in self.masks)
        large = [m.iou for m, mask in zip(self.matches, self.masks, strict=True) if mask.sum() > 0.3 * whole]
        return max(0.78, *large)


def outlines(pixels: Pixels, ground: Ground, region: Array, colours: list[int]) -> Outlines:
    """Divide a connected region between its one or two palette colours."""
    if len(colours) < 2:
        return Outlines(colours=colours, masks=[region], matches=[_outer(region)], seen=[region])
    seen = [region & (pixels.colour == colour) for colour in colours]
    inked = _inked(pixels, region)
    if not inked and _faded(ground, region, seen[0]):
        seen = [_thick(part) for part in seen]
    if not inked:
        labels = spread(seen[0].astype(np.int32) + 2 * seen[1], region & pixels.foreground)
        seen = [labels == 1, labels == 2]
    # With outlines, colour alone: nothing tells whose a black pixel between two shapes is. Stripes and dots
    # are inside a rim of colour and come back by filling, where the shape is whole.
    masks = [filled(part) for part in seen]
    matches = [_outer(mask) for mask in masks]
    inside = [float((seen[1 - i] & masks[i]).sum() / max(seen[1 - i].sum(), 1)) for i in (0, 1)]
    # What is hidden in part fits worse; and what lies wholly inside the other one's outline lies on it.
    within = max(inside) > 0.6
    second = inside[0] > 0.6 if within else matches[1].iou > matches[0].iou
    doubtful = not within and abs(matches[1].iou - matches[0].iou) < DOUBTFUL
    found = Outlines(colours=colours, masks=masks, matches=matches, seen=seen, inked=inked, doubtful=doubtful)
    return found.turned() if second else found


def _inked(pixels: Pixels, region: Array) -> bool:
    """Whether a region ends in an outline."""
    ink, layer, shares = pixels.ink, region, []
    for _ in range(3):  # which of the outermost layers is all outline depends on where the edge fell
        inner = shrink(layer)
        shares.append(float(ink[layer & ~inner].mean()))
        layer = inner
    return max(shares) > 0.6


def _faded(ground: Ground, region: Array, own: Array) -> bool:
    """Whether a region ends in a wide ramp, in which blends can have the hue of another palette colour."""
    inner = shrink(region)
    band, deep = own & inner & ~shrink(inner), own & shrink(inner, 3)
    if not band.any() or not deep.any():
        return False
    return float(np.median(ground.distance[band]) / np.median(ground.distance[deep])) < 0.55


def _hidden(pixels: Pixels, region: Array, found: Outlines) -> Match:
    """Fit the shape behind, if the order is right."""
    front = found.masks[0]
    # Background within the region (a ring's hole, or white stripes on white) says nothing about the outline
    # of what is behind; nor do the patterns of an outlined one.
    unknown = shrink(region, 3) & ~found.seen[1] if found.inked else region & ~pixels.foreground
    return fit_hidden(found.seen[1] & ~front, ~front & ~unknown)


def split(pixels: Pixels, region: Array, found: Outlines) -> list[Part]:
    """The shapes of a region, the front one first; the one behind is fitted to what can be seen of it."""
    everywhere = np.ones_like(region)
    if len(found.colours) < 2:
        return [Part(colour=found.colours[0], match=found.matches[0], free=everywhere, clear=everywhere)]
    hidden = _hidden(pixels, region, found)
    if found.doubtful:
        other = found.turned()
        turned = _hidden(pixels, region, other)
        if other.matches[0].iou + turned.iou > found.matches[0].iou + hidden.iou:
            found, hidden = other, turned
    front, back = found.masks
    margin = 4 if found.inked else 2
    return [
        Part(
            colour=found.colours[0],
            match=found.matches[0],
            free=everywhere,
            clear=~grow(back, margin + 1),
            inner=found.inked,
        ),
        Part(
            colour=found.colours[1],
            match=hidden,
            free=~grow(front, margin),
            clear=~grow(front, margin + 2),
            inner=found.inked,
            behind=True,
        ),
    ]


def _thick(mask: Array) -> Array:
    """Only regions that are more than a thin blend between two other colours, with their own fringe."""
    return mask & grow(mask & ~grow(~mask), 2)


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
    if shape == "circle" and _hole(ground, own, part):
        shape = "ring"
    # The outer edge, whatever the shape: a ring's inner edge lies elsewhere for every style.
    edge = _distance(match, match.names[0], match.radius) - match.offset * match.radius
    outlined = _outlined(pixels, part, edge) > 0.5
    ramp = 1.0 if outlined else _ramp(pixels, ground, own, part.clear, edge)
    soft = ramp > SOFT_RAMP_FROM
    if outlined:
        outside = -rendering.OUTLINE_INSIDE if part.inner else rendering.OUTLINE_OUTSIDE
    else:
        outside = (0.5 - FOREGROUND / max(strength, 0.2)) * (rendering.SOFT_RAMP if soft else 1)
    radius = _radius(match, shape, outside)
    distance = _distance(match, shape, radius)
    inside = part.free & (distance < (-1.8 if outlined else -1.5))
    total = max(int(inside.sum()), 1)
    striped = float(pixels.white[inside].sum()) / total / 0.10
    dotted = float(pixels.black[inside].sum()) / total / 0.05
    light = _light(pixels, own & (distance < -1.5) & ~grow(pixels.black), match, radius)
    pattern = 0 if max(striped, dotted) < 1 else 1 if striped > dotted else 2
    style = "outlined" if outlined else "soft" if soft else "shaded" if light < -0.2 else "flat"
    measured = outlined or (part.clear & (np.abs(edge) < 1)).sum() >= 12
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
        style=style if measured else None,
        behind=front if part.behind else None,
    )


SIZE_FROM = 128 * (SMALL[1] + LARGE[0]) / 2
SOFT_RAMP_FROM = 3.8
DOUBTFUL = 0.12
_OUTER = {"circle": 0.90, "ring": 0.94}


def _distance(match: Match, shape: str, radius: float) -> Array:
    """Signed distance in pixels (128, 128) to a shape of this radius at the match's place and turn."""
    x, y = replace(match, radius=radius).frame(128, 128)
    return sdf.shape_distance(shape, torch.from_numpy(x), torch.from_numpy(y)).numpy() * radius


@lru_cache(maxsize=64)
def _unit_area(shape: str, outside: float) -> float:
    """Area, in squared radii, of a filled shape whose edge is moved out by `outside` radii."""
    line = torch.linspace(-1.6, 1.6, 161)
    y, x = torch.meshgrid(line, line, indexing="ij")
    distance = sdf.shape_distance(shape, x, y) - outside
    return float((0.5 - distance / 0.02).clamp(0, 1).mean()) * 3.22**2


def _radius(match: Match, shape: str, outside: float) -> float:
    """The radius in pixels that explains the area if the edge is `outside` pixels too far out."""
    area = _unit_area(match.names[0], round(match.offset, 2)) * match.radius**2
    outer = "circle" if shape == "ring" else shape
    radius = match.radius
    for _ in range(4):
        radius = math.sqrt(area / _unit_area(outer, round(outside / radius, 2)))
    return radius * _OUTER["circle"] / _OUTER["ring"] if shape == "ring" else radius


def _hole(ground: Ground, own: Array, part: Part) -> bool:
    """Whether what looks like a disc from outside has a ring's hole: none of its colour around the centre."""
    x, y = part.match.frame(128, 128)
    rho = np.hypot(x, y)
    core = part.free & (rho > 0.15) & (rho < 0.30)
    strength = float(np.percentile(ground.distance[own], 75)) if own.any() else 1.0
    return core.sum() >= 6 and (own & (ground.distance > 0.5 * strength))[core].mean() < 0.3


def _outlined(pixels: Pixels, part: Part, edge: Array) -> float:
    """Share of ink where an outline would be."""
    outer = 1.7 if part.inner else -0.6  # a paired match ends where the colour ends, within the outline
    contour = (part.clear if part.behind else part.free) & (edge > outer - 1.8) & (edge < outer)
    return float(pixels.ink[contour].mean()) if contour.any() else 0.0


def _ramp(pixels: Pixels, ground: Ground, own: Array, clear: Array, edge: Array) -> float:
    """Width in pixels of the linear ramp, at any place and of any height, that fits the edge best."""
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
