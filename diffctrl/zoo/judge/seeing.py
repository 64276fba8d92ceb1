"""Reads a whole picture."""

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import characters, shapes
from .ground import Ground, read_ground, read_texture
from .pixels import Pixels, classify, colours_in, objects_in
from .reading import Instance, Reading

Array = np.ndarray
SIDE = 128


def _canonical(image: Tensor) -> Array:
    """(3, H, W) -> (128, 128, 3) float32: the shorter side becomes 128, a longer one is not accepted."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be (3, H, W), got {tuple(image.shape)}")
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"the judge reads square images, got {tuple(image.shape[1:])}")
    image = image.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(image).all()):
        raise ValueError("image has values that are not finite")
    if image.shape[1] != SIDE:
        image = functional.interpolate(image[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return image.clamp(0, 1).permute(1, 2, 0).contiguous().numpy()


def read(image: Tensor) -> Reading:
    """Read a picture.

    Args:
        image: (3, H, H) float in [0, 1], any device; brought to 128 pixels.

    Returns:
        What the picture shows: kind, background, texture, style, and every object with all its facts.
    """
    rgb = _canonical(image)
    ground = read_ground(rgb)
    pixels = classify(rgb, ground)
    found = objects_in(pixels)
    everything = np.zeros(rgb.shape[:2], dtype=bool)
    for region in found:
        everything |= region
    kind, objects = _objects(pixels, ground, found)
    styles = Counter(instance.style for instance in objects if instance.style)
    return Reading(
        kind=kind,
        background=ground.name,
        texture=read_texture(ground, everything),
        style=styles.most_common(1)[0][0] if styles else None,
        objects=tuple(objects),
    )


def _objects(pixels: Pixels, ground: Ground, found: list[Array]) -> tuple[str, list[Instance]]:
    """The kind of the picture, the one that its silhouettes are more like, and its objects."""
    coloured = [(region, colours) for region in found if (colours := colours_in(pixels, ground, region))]
    figures = [characters.match_figure(pixels, ground, *one) for one in coloured]
    outlines = [shapes.outlines(pixels, ground, *one) for one in coloured]
    if sum(figure.iou for figure in figures) > sum(outline.likeness for outline in outlines):
        return "characters", [
            characters.read_figure(pixels, *one, figure)
            for one, figure in zip(coloured, figures, strict=True)
        ]
    objects: list[Instance] = []
    for (region, _), outline in zip(coloured, outlines, strict=True):
        front = len(objects)
        objects += [
            shapes.decide(pixels, ground, part, front) for part in shapes.split(pixels, region, outline)
        ]
    return "shapes", objects
