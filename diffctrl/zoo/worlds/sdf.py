"""Signed distances of shapes and of the parts of a character, in an object's local frame.

Local frame: unit = the object's radius, x to the right, y down, origin at the centre. Every function maps
coordinate tensors of one shape to distances of the same shape, negative inside. Corners are mitred
(half-plane distances): exact inside and on edges, sharp at corners, which is what an outline should look
like.
"""

import math

import torch
from torch import Tensor

from .vocabulary import SHAPES

Point = tuple[float, float]


def _half_plane(x: Tensor, y: Tensor, first: Point, second: Point) -> Tensor:
    """Distance to the line first -> second, positive on the left of that walk as seen on a y-down picture."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    norm = math.hypot(dx, dy)
    return ((x - first[0]) * dy - (y - first[1]) * dx) / norm


def _capsule(x: Tensor, y: Tensor, first: Point, second: Point, radius: float) -> Tensor:
    dx, dy = second[0] - first[0], second[1] - first[1]
    along = (((x - first[0]) * dx + (y - first[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - first[0] - along * dx, y - first[1] - along * dy) - radius


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.90


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.76, 0.76)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.5, 0.8660254 * x.abs() - 0.5 * y - 0.5)


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    inner = (0.46 * math.cos(sector / 2), 0.46 * math.sin(sector / 2))
    return _half_plane(radius * torch.cos(folded), radius * torch.sin(folded), (1.0, 0.0), inner)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.69).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.36), _box(x, y, 0.36, 0.95))


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    """A tall rhombus, so that no turn makes it the square."""
    return (x.abs() / 0.62 + y.abs() - 1) / math.hypot(1 / 0.62, 1)


def _hexagon(x: Tensor, y: Tensor) -> Tensor:
    """Flat-topped, and 10 % flatter than a regular one, so that a small one is not a circle."""
    ax, ay = x.abs(), y.abs()
    return torch.maximum(ay - 0.78, (0.78 * ax + 0.5 * ay - 0.78) / math.hypot(0.78, 0.5))


_SHAPE_DISTANCES = (_circle, _square, _triangle, _star, _ring, _cross, _diamond, _hexagon)


def shape_distances(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """One distance per entry of `SHAPES`."""
    return tuple(distance(x, y) for distance in _SHAPE_DISTANCES)


def shape_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """The distance to one shape of `SHAPES`."""
    return _SHAPE_DISTANCES[SHAPES.index(shape)](x, y)


def select(distances: tuple[Tensor, ...], which: Tensor) -> Tensor:
    """`distances[which]` element-wise; `which` broadcasts. A chain of `where`: compilers fuse it."""
    out = distances[0]
    for index, distance in enumerate(distances[1:], start=1):
        out = torch.where(which == index, distance, out)
    return out


# All bodies stand on y = 0.62, so that the legs fit each of them; what sits on a body is given per body.
HAT_LINE = (-0.46, -0.33, -0.58, -0.34, -0.45, -0.03)
EYE_LINE = (0.02, 0.06, -0.14, 0.18, 0.04, 0.17)
FACE = 0.045  # plain rim around an eye
DOT_ROW = 0.31  # below the eyes: a row of dots that no eye hides
EYE_OFFSET = (0.22, 0.22, 0.18, 0.18, 0.22, 0.22)  # + 0.17 stays inside every body


def body_distances(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """One distance per entry of `BODIES`."""
    ax = x.abs()
    rho = torch.hypot(x, y - 0.06)
    lobes = 0.51 + 0.115 * torch.cos(6 * torch.atan2(x, y - 0.06))
    return (
        rho - 0.56,
        _box(x, y - 0.14, 0.48, 0.48),
        torch.hypot(x, (y.abs() - 0.25).clamp(min=0)) - 0.37,
        torch.maximum(y - 0.62, _half_plane(ax, y, (0.0, -0.62), (0.64, 0.62))),
        rho - lobes,
        torch.maximum(torch.hypot(x, y - 0.62) - 0.68, y - 0.62),
    )


def limb_distance(x: Tensor, y: Tensor, jumps: Tensor) -> Tensor:
    """Arms and legs: down when standing or lying, arms up and legs apart when jumping; `jumps` broadcasts."""
    ax = x.abs()
    rest = torch.minimum(
        _capsule(ax, y, (0.21, 0.5), (0.21, 0.93), 0.10), _capsule(ax, y, (0.2, 0.25), (0.80, 0.50), 0.09)
    )
    leap = torch.minimum(
        _capsule(ax, y, (0.21, 0.5), (0.58, 0.90), 0.10), _capsule(ax, y, (0.2, 0.25), (0.85, -0.22), 0.09)
    )
    return torch.where(jumps, leap, rest)


def hat_distances(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """One distance per entry of `HATS`; y = 0 is the line on which the hat sits. "none" is far away."""
    cap = torch.minimum(
        torch.maximum(torch.hypot(x, y - 0.04) - 0.34, y - 0.06), _box(x - 0.26, y, 0.26, 0.06)
    )
    cone = torch.maximum(y - 0.06, _half_plane(x.abs(), y, (0.0, -0.50), (0.32, 0.06)))
    teeth = -0.40 + 0.26 * (2 * (x / 0.33 - torch.round(x / 0.33)).abs())
    crown = torch.maximum(_box(x, y + 0.17, 0.33, 0.23), (teeth - y) * 0.6)
    return (torch.full_like(cap, 10.0), cap, cone, crown)


def eye_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(white of an open eye, its pupil, lid of a sleepy eye); origin between the eyes, x already folded."""
    white = torch.hypot(x, y) - 0.17
    pupil = torch.hypot(x, y) - 0.09
    return white, pupil, _box(x, y, 0.15, 0.065)
