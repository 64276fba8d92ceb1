"""From a heat map to a place: spatial bias, point, mask and box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffctrl.refam.words import Direction

Box = tuple[int, int, int, int]
Rule = Literal["region", "mean", "otsu"]


def spatial_bias(directions: Sequence[Direction], rows: int, columns: int, floor: float = 0.1) -> Tensor:
    """(rows, columns) weights in [floor, 1]: linear ramps, a tent for "middle"; several multiply.

    The paper has such a bias and does not define it; this one is ours. Nothing is forbidden.

    >>> spatial_bias(["left"], 1, 3, floor=0.1)[0].tolist() == [1.0, 0.5, torch.tensor(0.1).item()]
    True
    """
    across = torch.linspace(0, 1, columns)[None, :] if columns > 1 else torch.full((1, 1), 0.5)
    down = torch.linspace(0, 1, rows)[:, None] if rows > 1 else torch.full((1, 1), 0.5)
    ramps = {
        "left": 1 - across,
        "right": across,
        "top": 1 - down,
        "bottom": down,
        "middle": (1 - (2 * across - 1).abs()) * (1 - (2 * down - 1).abs()),
    }
    bias = torch.ones(rows, columns)
    for direction in directions:
        bias = bias * ramps[direction]
    return bias.clamp_min(floor)


def peak(heat: Tensor) -> tuple[int, int]:
    """(row, column) of the largest value of (rows, columns); the first one in reading order among equals."""
    flat = heat.flatten()
    place = int((flat == flat.max()).nonzero()[0, 0])
    return divmod(place, heat.shape[1])


def centre(row: int, column: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """(x, y) in pixels of the middle of a token.

    Args:
        grid: (rows, columns) of tokens.
        size: (height, width) in pixels.

    >>> centre(0, 0, (64, 64), (1024, 1024))
    (8.0, 8.0)
    """
    return (column + 0.5) * size[1] / grid[1], (row + 0.5) * size[0] / grid[0]


def enlarged(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, on pixel centres: (..., h, w) -> (..., H, W)."""
    flat = heat.reshape(1, -1, *heat.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(
        *heat.shape[:-2], *size
    )


def ranged(heat: Tensor) -> Tensor:
    """Scaled to [0, 1]; zeros where all values are equal."""
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if high > low else torch.zeros_like(heat)


def mask_of(heat: Tensor, point: tuple[float, float], size: tuple[int, int], rule: Rule) -> Tensor:
    """(H, W) bool from a map.

    Args:
        heat: (h, w).
        point: (x, y) in pixels.
        size: (height, width) in pixels.
        rule: "region": at least half of the range, of which the part that holds the point; "mean": above the
            mean; "otsu": above the threshold that splits the values best. Nothing of a map without a peak.
    """
    if heat.min() == heat.max():  # enlarging would only bring its rounding out
        return torch.zeros(size, dtype=torch.bool)
    large = enlarged(heat.float(), size)
    if rule == "mean":
        return large > large.mean()
    scaled = ranged(large)
    if rule == "otsu":
        return scaled > otsu(scaled)
    return component(scaled >= 0.5, int(point[1]), int(point[0]))


def otsu(values: Tensor, bins: int = 256) -> float:
    """The threshold in [0, 1] with the largest variance between the two sides (Otsu 1979)."""
    counts = torch.histc(values.float().cpu(), bins=bins, min=0.0, max=1.0).double()
    levels = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    below = counts.cumsum(0)
    mass = (counts * levels).cumsum(0)
    above = below[-1] - below
    means = mass / below.clamp_min(1), (mass[-1] - mass) / above.clamp_min(1)
    between = below * above * (means[0] - means[1]) ** 2
    # A gap between the sides makes many thresholds equal; the middle one of them is taken.
    best = (between >= between.max() * (1 - 1e-12)).nonzero().flatten()
    return float((best[(len(best) - 1) // 2] + 1) / bins)


def component(mask: Tensor, row: int, column: int) -> Tensor:
    """The 4-connected part of a (H, W) bool mask that holds a pixel; nothing where the pixel is outside.

    Rows are cut into runs, runs that touch get one label, and what is as large as the picture is done in few
    passes of arrays.
    """
    cells = mask.cpu().numpy()
    height, width = cells.shape
    if not cells[row, column]:
        return torch.zeros(height, width, dtype=torch.bool)
    # All rows in one line with a cell of nothing before each, and one at the end.
    pitch = width + 1
    line = np.zeros(height * pitch + 1, dtype=bool)
    line[:-1].reshape(height, pitch)[:, 1:] = cells
    changes = np.flatnonzero(line[1:] != line[:-1]) + 1
    starts, stops = changes[::2], changes[1::2]
    # Runs of the next row that a run touches: from `first` on, `count` of them.
    first = np.searchsorted(stops, starts + pitch, side="right")
    count = np.searchsorted(starts, stops + pitch, side="left") - first
    upper = np.repeat(np.arange(len(starts)), count)
    lower = np.arange(len(upper)) - np.repeat(count.cumsum() - count - first, count)
    label = _joined(len(starts), upper, lower)
    place = np.searchsorted(starts, row * pitch + 1 + column, side="right") - 1
    mine = label == label[place]
    inside = np.zeros(len(changes) + 1, dtype=bool)  # between changes
    inside[1::2] = mine
    line = np.repeat(inside, np.diff(changes, prepend=0, append=len(line)))
    return torch.from_numpy(line[:-1].reshape(height, pitch)[:, 1:].copy())


def _joined(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(count,) a label for each of `count` things, the same for those that a chain of pairs joins."""
    label = np.arange(count)
    while True:
        ends = label[one], label[other]
        low = np.minimum(*ends)
        for end in ends:
            np.minimum.at(label, end, low)
        while not np.array_equal(label, label[label]):  # labels of labels, to the end
            label = label[label]
        if np.array_equal(label[one], label[other]):
            return label


def box_of(mask: Tensor) -> Box | None:
    """(left, top, right, bottom) in pixels, right and bottom exclusive; None of an empty mask."""
    cells = mask.cpu().numpy()  # many times as fast at this as torch
    rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def compactness(heat: Tensor) -> float:
    """Entropy of a map's shares over that of a uniform one, in [0, 1]; low is compact."""
    shares = heat.flatten().double()
    shares = shares / shares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.xlogy(shares, shares).sum()
    return float(entropy / np.log(max(len(shares), 2)))


def best_frame(heat: Tensor) -> int:
    """The frame of (F, h, w) with the most compact map, the first one among equals."""
    values = [compactness(frame) for frame in heat]
    return values.index(min(values))
