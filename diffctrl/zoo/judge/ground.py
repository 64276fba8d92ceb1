"""The background: its colour, its texture, and how far each pixel is from it."""

from dataclasses import dataclass

import numpy as np

from diffctrl.zoo.worlds.vocabulary import BACKGROUND_RGB, BACKGROUNDS, TEXTURES

from .regions import grow

Array = np.ndarray
BORDER = 3
BLOCK = 4
FLAT, LINEAR, RANKED = 0.10, 0.86, 0.80


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """Attributes: name in BACKGROUNDS; tones (2, 3), as they are in this picture; distance (H, W) of each
    pixel's colour from the segment between the tones; mix (H, W), where on that segment it is, 0 to 1."""

    name: str
    tones: Array
    distance: Array
    mix: Array


def to_segment(rgb: Array, tones: Array) -> tuple[Array, Array]:
    """Distance of colours (..., 3) from the segment between two tones (2, 3), and where on it, 0 to 1."""
    span = tones[1] - tones[0]
    mix = ((rgb - tones[0]) @ span / (span @ span)).clip(0, 1)
    rest = rgb - (tones[0] + mix[..., None] * span)
    return np.sqrt(np.einsum("...c,...c", rest, rest)), mix


def read_ground(rgb: Array) -> Ground:
    """Find the background of a picture (H, W, 3) from the pixels along its frame."""
    frame = np.ones(rgb.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    edge = rgb[frame]
    palette = np.asarray(BACKGROUND_RGB)
    # Clipped: stray pixels in the corners must not outvote the frame.
    costs = [np.minimum(to_segment(edge, tones)[0], 0.3).mean() for tones in palette]
    best = int(np.argmin(costs))
    tones = palette[best]
    _, mix = to_segment(edge, tones)
    offset = np.median(edge - (tones[0] + mix[:, None] * (tones[1] - tones[0])), axis=0)
    tones = tones + offset.clip(-0.06, 0.06)
    distance, mix = to_segment(rgb, tones)
    return Ground(name=BACKGROUNDS[best], tones=tones, distance=distance, mix=mix)


def read_texture(ground: Ground, foreground: Array) -> str:
    """Which of TEXTURES the background has, from its pixels away from the foreground (H, W) bool."""
    clear = ~grow(foreground, 3)
    clear[:2], clear[-2:], clear[:, :2], clear[:, -2:] = False, False, False, False
    # Means of blocks: less noise, and both a line and a chequerboard stay a product of a row and a column.
    values = _blocks(ground.mix)
    free = _blocks(clear.astype(np.float32)) > 0.99
    if free.sum() < 500 / BLOCK**2:
        return TEXTURES[0]
    seen = values[free]
    spread = seen.std()
    if spread < FLAT:
        return TEXTURES[0]
    centred = np.where(free, values - seen.mean(), 0.0)
    total = (centred[free] ** 2).sum()
    y, x = np.nonzero(free)
    design = np.stack([x, y, np.ones_like(x)], 1) / values.shape[0]
    solution, *_ = np.linalg.lstsq(design, centred[free], rcond=None)
    if 1 - ((centred[free] - design @ solution) ** 2).sum() / total > LINEAR:
        return "gradient"
    for axis in (0, 1):
        mean = centred.sum(axis) / np.maximum(free.sum(axis), 1)
        model = np.broadcast_to(np.expand_dims(mean, axis), values.shape)
        if 1 - ((centred - model)[free] ** 2).sum() / total > RANKED:
            return "lined"
    return "checkered" if _rank_one(centred, free) / total > 0.7 else "noisy"


def _blocks(values: Array) -> Array:
    height, width = values.shape
    return values.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean((1, 3))


def _rank_one(values: Array, free: Array) -> float:
    """Sum of squares that one product column x row explains: a chequerboard is one, smooth noise is not."""
    centre = values - values[free].mean()
    column = np.where(free, centre, 0)[:, np.argmax(free.sum(0))] + 1e-6
    mask = free.astype(float)
    row = np.zeros(values.shape[1])
    for _ in range(8):
        row = (centre * mask).T @ column / np.maximum(mask.T @ column**2, 1e-9)
        column = (centre * mask) @ row / np.maximum(mask @ row**2, 1e-9)
    model = np.outer(column, row)
    return (centre[free] ** 2).sum() - ((centre - model)[free] ** 2).sum()
