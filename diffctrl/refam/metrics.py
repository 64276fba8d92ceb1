"""Measures of grounding, exactly as the field defines them. One sample is one expression, not one picture.

Masks are bool tensors (H, W); tracks are (F, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffctrl.refam.locate import peak

PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


def overlap(predicted: Tensor, truth: Tensor) -> tuple[int, int]:
    """(pixels of the intersection, pixels of the union)."""
    return int((predicted & truth).sum()), int((predicted | truth).sum())


def iou(intersection: int, union: int) -> float:
    """Intersection over union; 1 where both masks are empty."""
    return intersection / union if union else 1.0


def mean_iou(pairs: Sequence[tuple[int, int]]) -> float:
    """The mean over samples of their IoU.

    >>> round(mean_iou([(50, 100), (1, 2), (0, 10)]), 6)
    0.333333
    """
    return sum(iou(*pair) for pair in pairs) / len(pairs)


def overall_iou(pairs: Sequence[tuple[int, int]]) -> float:
    """Sum of intersections over sum of unions ("overall", "cumulative" IoU); not a mean over samples.

    >>> round(overall_iou([(50, 100), (1, 2), (0, 10)]), 6)
    0.455357
    """
    return iou(sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs))


def precision_at(pairs: Sequence[tuple[int, int]], threshold: float) -> float:
    """Share of samples whose IoU is above the threshold."""
    return sum(iou(*pair) > threshold for pair in pairs) / len(pairs)


def points_at(heat: Tensor, truth: Tensor, radius: float = 0.0) -> bool:
    """Whether the largest value of a map (H, W) lies in the mask, or within `radius` pixels of it.

    Equal values: the first one in reading order counts.
    """
    row, column = peak(heat)
    return point_inside((column + 0.5, row + 0.5), truth, radius)


def point_inside(point: tuple[float, float], truth: Tensor, radius: float = 0.0) -> bool:
    """Whether the pixel that holds (x, y) lies in the mask, or within `radius` pixels of it."""
    column, row = int(point[0]), int(point[1])
    if radius <= 0:
        return bool(truth[row, column])
    rows, columns = truth.nonzero(as_tuple=True)
    if not len(rows):
        return False
    return bool(((rows - row) ** 2 + (columns - column) ** 2).min() <= radius**2)


def average_precision(heat: Tensor, truth: Tensor) -> float:
    """Area under precision over recall of the pixels, ranked by the map; equal values enter together."""
    score, hit = heat.flatten().double(), truth.flatten()
    if not bool(hit.any()):
        return math.nan
    order = score.argsort(descending=True, stable=True)
    score, hit = score[order], hit[order]
    last = torch.cat([score[1:] != score[:-1], torch.tensor([True])])
    hits = hit.cumsum(0)[last].double()
    taken = torch.arange(1, len(score) + 1, dtype=torch.float64)[last]
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=torch.float64))
    return float((hits / taken * gained).sum() / hits[-1])


def inside_ratio(heat: Tensor, truth: Tensor) -> float:
    """Mean of a map inside of the mask over its mean outside."""
    return float(heat[truth].double().mean() / heat[~truth].double().mean())


@dataclass(frozen=True, slots=True)
class Generalised:
    """gRefCOCO's measures, where an expression may mean nothing.

    Attributes:
        giou: mean IoU, a correct empty answer counting 1 and a wrong one 0.
        none_accuracy: share of the samples without a target that were answered with nothing; nan without any.
    """

    giou: float
    none_accuracy: float


def generalised(predicted: Sequence[Tensor], truth: Sequence[Tensor]) -> Generalised:
    """gIoU and N-acc over samples."""
    values, empty = [], []
    for answer, mask in zip(predicted, truth, strict=True):
        if bool(mask.any()):
            values.append(iou(*overlap(answer, mask)))
        else:
            right = not bool(answer.any())
            values.append(float(right))
            empty.append(right)
    return Generalised(sum(values) / len(values), sum(empty) / len(empty) if empty else math.nan)


# --- video --------------------------------------------------------------------------------------------------


def boundary(mask: Tensor) -> Tensor:
    """The one-pixel boundary (H, W) bool: pixels whose right, lower or lower right neighbour differs.

    As in DAVIS' own measure (seg2bmap): the frame is no boundary.
    """
    padded = F.pad(mask[None].float(), (0, 1, 0, 1), mode="replicate")[0].bool()
    here = padded[:-1, :-1]
    return (here ^ padded[:-1, 1:]) | (here ^ padded[1:, :-1]) | (here ^ padded[1:, 1:])


def tolerance(size: tuple[int, int]) -> int:
    """Pixels by which boundaries may differ: ceil(0.008 of the diagonal).

    >>> tolerance((480, 854))
    8
    """
    return math.ceil(0.008 * math.hypot(*size))


def _dilated(mask: Tensor, radius: int) -> Tensor:
    """All pixels within a disk of the mask's."""
    if not bool(mask.any()):
        return mask
    # Row by row of the disk: each offset is a shift, and each shift a one-dimensional maximum.
    out = torch.zeros_like(mask)
    height = mask.shape[0]
    for down in range(-radius, radius + 1):
        reach = int(math.sqrt(radius * radius - down * down))
        wide = F.max_pool1d(mask[None].float(), 2 * reach + 1, stride=1, padding=reach)[0].bool()
        source = wide[max(0, -down) : height - max(0, down)]
        out[max(0, down) : height + min(0, down)] |= source
    return out


def contour_accuracy(predicted: Tensor, truth: Tensor) -> float:
    """F of one frame: the harmonic mean of precision and recall of boundary pixels within the tolerance."""
    radius = tolerance((truth.shape[0], truth.shape[1]))
    ours, theirs = boundary(predicted), boundary(truth)
    counts = int(ours.sum()), int(theirs.sum())
    if counts == (0, 0):
        return 1.0
    if 0 in counts:
        return 0.0
    precision = int((ours & _dilated(theirs, radius)).sum()) / counts[0]
    recall = int((theirs & _dilated(ours, radius)).sum()) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True, slots=True)
class TrackScore:
    """J and F of one object over its frames."""

    j: float
    f: float

    @property
    def mean(self) -> float:
        return (self.j + self.f) / 2


def track_score(predicted: Tensor, truth: Tensor, *, skip_ends: bool = False) -> TrackScore:
    """J (mean region IoU) and F (mean contour accuracy) of one object.

    Args:
        predicted, truth: (F, H, W) bool.
        skip_ends: leave out the first and the last frame, as DAVIS' semi-supervised track does.

    Raises:
        ValueError: the shapes differ, or no frame is left.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"tracks of shapes {tuple(predicted.shape)} and {tuple(truth.shape)} do not compare")
    frames = range(1, len(truth) - 1) if skip_ends else range(len(truth))
    if not frames:
        raise ValueError(f"{len(truth)} frames leave none without both ends; use skip_ends=False")
    j = [iou(*overlap(predicted[i], truth[i])) for i in frames]
    f = [contour_accuracy(predicted[i], truth[i]) for i in frames]
    return TrackScore(sum(j) / len(j), sum(f) / len(f))


# --- intervals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def apart(self, other: Interval) -> bool:
        """Whether the two intervals do not touch."""
        return self.low > other.high or other.low > self.high


def bootstrap(
    scenes: Sequence[int],
    measure: Callable[[np.ndarray], float],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """A measure over samples, and its interval over scenes drawn with replacement.

    Expressions of one scene are not independent, so scenes are drawn and bring all of their expressions.

    Args:
        scenes: of each sample.
        measure: of sample indices (with repetitions).
        draws: of the bootstrap.
        seed: of the draws.
    """
    numbers, places = np.unique(np.asarray(scenes), return_inverse=True)
    members = [np.nonzero(places == scene)[0] for scene in range(len(numbers))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = rng.integers(0, len(numbers), len(numbers))
        values.append(measure(np.concatenate([members[scene] for scene in drawn])))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Interval(float(measure(np.arange(len(places)))), float(low), float(high))
