"""Fits a shape that another one partly hides: every template at every place, by correlation."""

import math
from functools import lru_cache

import numpy as np
import torch

from diffctrl.zoo.worlds import sdf
from diffctrl.zoo.worlds.vocabulary import SHAPES

from .templates import OUTER_SHAPES, Match

Array = np.ndarray
WINDOW = 72  # pixels across the window of the refinement; the largest object has 60
SIDE = 64  # half resolution: one cell is 2 pixels of the 128 px picture
RADII = (
    13.5,
    15.5,
    17.5,
    20.5,
    22.5,
    24.5,
    26.5,
    28.5,
    30.5,
)  # pixels at 128, soft edges and outlines included


@lru_cache(maxsize=1)
def _spectra() -> tuple[torch.Tensor, list[tuple[str, float, float]]]:
    """Fourier transforms (T, SIDE, SIDE // 2 + 1) of the templates, centred at the origin, and parameters."""
    line = (torch.arange(SIDE) + 0.5 - SIDE / 2) * 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    drawn, names = [], []
    for radius in RADII:
        for degrees in (-10, 0, 10):
            angle = math.radians(degrees)
            cosine, sine = math.cos(angle), math.sin(angle)
            distances = sdf.shape_distances(
                (x * cosine + y * sine) / radius, (y * cosine - x * sine) / radius
            )
            for name, distance in zip(SHAPES, distances, strict=True):
                if name in OUTER_SHAPES and (name != "circle" or degrees == 0):
                    drawn.append((0.5 - distance * radius / 2).clamp(0, 1))
                    names.append((name, radius, angle))
    stack = torch.fft.ifftshift(torch.stack(drawn), dim=(1, 2))
    return torch.fft.rfft2(stack).conj(), names


def fit_hidden(visible: Array, free: Array) -> Match:
    """The template and place whose visible part covers `visible` best.

    Args:
        visible: (128, 128) bool, what is seen of the object. free: (128, 128) bool, where it could be seen.

    Returns:
        The match; its IoU counts free pixels only.
    """
    spectra, names = _spectra()
    halves = torch.from_numpy(np.stack([visible & free, free]).astype(np.float32))
    halves = torch.nn.functional.avg_pool2d(halves[None], 2)[0]
    transformed = torch.fft.rfft2(halves)
    both = torch.fft.irfft2(spectra * transformed[0], s=(SIDE, SIDE))
    drawn = torch.fft.irfft2(spectra * transformed[1], s=(SIDE, SIDE))
    score = (both / (halves[0].sum() + drawn - both).clamp(min=1e-3)).flatten(1)
    top = score.max(1).values
    matches = []
    for shape in OUTER_SHAPES:
        candidates = [index for index, name in enumerate(names) if name[0] == shape]
        index = max(candidates, key=lambda i: float(top[i]))
        if top[index] > top.max() - 0.08:
            row, column = divmod(int(score[index].argmax()), SIDE)
            # ifftshift puts the template's middle, which lies between two cells, on cell 0.
            start = np.array([2.0 * column, 2.0 * row, names[index][1], names[index][2]])
            matches.append(_refine(shape, start, visible & free, free))
    return max(matches, key=lambda match: match.iou)


def _refine(shape: str, start: Array, visible: Array, free: Array) -> Match:
    """Coordinate descent at full resolution over (x, y, radius, angle), each in turn with shrinking steps."""
    left, top = (int(np.clip(value - WINDOW / 2, 0, 128 - WINDOW)) for value in start[:2])
    window = np.s_[top : top + WINDOW, left : left + WINDOW]
    seen, open_ = (torch.from_numpy(mask[window].astype(np.float32)) for mask in (visible, free))
    y, x = torch.meshgrid(torch.arange(WINDOW) + top + 0.5, torch.arange(WINDOW) + left + 0.5, indexing="ij")
    best, score = start.copy(), -1.0
    for shrink in (1.0, 0.5, 0.25):
        for axis, step in ((2, 1.0), (0, 1.0), (1, 1.0), (3, 0.1), (2, 0.5)):
            if axis == 3 and shape == "circle":
                continue
            trial = np.repeat(best[None], 5, 0)
            trial[:, axis] += np.linspace(-2, 2, 5) * step * shrink
            values = _iou(shape, torch.from_numpy(trial).float(), x, y, seen, open_)
            best, score = trial[int(values.argmax())], float(values.max())
    return Match(
        names=(shape,),
        iou=score,
        x=float(best[0]),
        y=float(best[1]),
        radius=float(best[2]),
        angle=float(best[3]),
        mirror=1.0,
        offset=0.0,
    )


def _iou(
    shape: str, trial: torch.Tensor, x: torch.Tensor, y: torch.Tensor, seen: torch.Tensor, free: torch.Tensor
) -> torch.Tensor:
    """IoU on free pixels of candidates (C, 4) = (x, y, radius, angle)."""
    cx, cy, radius, angle = (column[:, None, None] for column in trial.unbind(1))
    px, py = (x - cx) / radius, (y - cy) / radius
    cosine, sine = torch.cos(angle), torch.sin(angle)
    distance = sdf.shape_distance(shape, px * cosine + py * sine, py * cosine - px * sine)
    cover = (0.5 - distance * radius).clamp(0, 1) * free
    both = (cover * seen).sum((1, 2))
    return both / (seen.sum() + cover.sum((1, 2)) - both).clamp(min=1e-3)
