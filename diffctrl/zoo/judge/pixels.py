"""What single pixels say: which palette colour, white, black, or the background."""

from dataclasses import dataclass

import numpy as np

from diffctrl.zoo.worlds.vocabulary import BACKGROUNDS, COLOUR_RGB, DARK_BACKGROUNDS

from .ground import Ground
from .regions import despeckled, filled, grow, regions

Array = np.ndarray
FOREGROUND = 0.105  # distance from the background's tones, RGB in [0, 1]
CHROMA = 0.20
FRAME = 2  # pixels along the frame that cannot be an object: decoders leave stray ones there
SMALLEST = 60  # pixels of a region that can be an object; the smallest object has about 200


def _hue(rgb: Array) -> Array:
    """Hue in [0, 6) of (P, 3): unchanged by mixing with white or black, so by patterns and light."""
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-6)
    red, green, blue = rgb.T
    other = np.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span)
    return np.where(high == red, (green - blue) / span, other) % 6


_PALETTE_HUE = _hue(np.asarray(COLOUR_RGB))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pixels:
    """Masks and maps (H, W) of one picture.

    Attributes:
        foreground: differs from the background; never along the frame.
        colour: index of the palette colour by hue, -1 where there is none (too gray, or background).
        white, black: gray pixels at the two ends. value: of HSV.
        ink: what an outline looks like on this background.
    """

    rgb: Array
    foreground: Array
    colour: Array
    white: Array
    black: Array
    ink: Array
    value: Array


def classify(rgb: Array, ground: Ground) -> Pixels:
    """Sort the pixels of a picture (H, W, 3)."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    foreground = ground.distance > FOREGROUND
    colourful = (value - low > CHROMA) & (ground.distance > FOREGROUND)
    colour = np.full(value.shape, -1)
    apart = np.abs((_hue(rgb[colourful])[:, None] - _PALETTE_HUE + 3) % 6 - 3)
    colour[colourful] = apart.argmin(-1)
    _bridge(rgb, colour, foreground)
    _bridge(rgb.transpose(1, 0, 2), colour.T, foreground.T)
    foreground[:FRAME] = foreground[-FRAME:] = False
    foreground[:, :FRAME] = foreground[:, -FRAME:] = False
    saturation = (value - low) / np.maximum(value, 1e-3)
    white = (saturation < 0.27) & (value > 0.45)
    dark = DARK_BACKGROUNDS[BACKGROUNDS.index(ground.name)]
    return Pixels(
        rgb=rgb,
        foreground=foreground,
        colour=colour,
        white=white,
        black=value < 0.28,
        ink=white if dark else (value < 0.36) & (value - low < 0.13),
        value=value,
    )


def _bridge(rgb: Array, colour: Array, foreground: Array) -> None:
    """Add to `foreground`, in place, one or two pixels of a column between two colours if they blend these.

    A blend can look like the background (yellow and blue on gray): it must not cut an object.
    """
    for gap in (1, 2):
        top, left = np.nonzero(
            (colour[: -gap - 1] >= 0) & (colour[gap + 1 :] >= 0) & (colour[: -gap - 1] != colour[gap + 1 :])
        )
        ends = [rgb[top, left], rgb[top + gap + 1, left]]
        blends = [_on_segment(rgb[top + step, left], *ends) for step in range(1, gap + 1)]
        whole = np.logical_and.reduce(blends)
        for step in range(1, gap + 1):
            foreground[top[whole] + step, left[whole]] = True


def _on_segment(rgb: Array, first: Array, second: Array) -> Array:
    """Which colours (P, 3) lie near the segments between two others, each (P, 3) or (3,)."""
    span = second - first
    length = np.maximum((span * span).sum(-1), 1e-6)
    part = (((rgb - first) * span).sum(-1) / length).clip(0, 1)
    return np.linalg.norm(rgb - first - part[..., None] * span, axis=-1) < 0.10


def objects_in(pixels: Pixels) -> list[Array]:
    """Filled foreground regions, largest first, that are large enough to be objects.

    Filled before they are smoothed: on a background of the stripes' tone only a rim of a pixel closes a
    shape, and the majority that removes specks and whiskers would break it.
    """
    whole = (despeckled(filled(region)) for region in regions(pixels.foreground, SMALLEST // 3))
    return sorted((mask for mask in whole if mask.sum() >= SMALLEST), key=lambda mask: -int(mask.sum()))


def colours_in(pixels: Pixels, ground: Ground, region: Array, *, most: int = 2) -> list[int]:
    """Palette colours of a region that are no blends of others, the one with the largest area first."""
    cores = {}
    for colour in np.unique(pixels.colour[region]):
        if colour >= 0:
            area = region & (pixels.colour == colour)
            core = area & ~grow(~area)
            if core.sum() >= 8:
                cores[int(colour)] = (core, int(area.sum()))
    means = {colour: np.median(pixels.rgb[core], axis=0) for colour, (core, _) in cores.items()}
    for colour, (core, _) in sorted(cores.items(), key=lambda item: item[1][1]):
        others = [*ground.tones, *(mean for name, mean in means.items() if name != colour)]
        if len(means) > 1 and _blended(pixels.rgb[core], others):
            del means[colour]
    return sorted(means, key=lambda colour: -cores[colour][1])[:most]


def _blended(rgb: Array, anchors: list[Array]) -> bool:
    """Whether most of these pixels (P, 3) are mixtures of two anchor colours: the ramp of a soft edge."""
    near = np.zeros(len(rgb), dtype=bool)
    for first in range(len(anchors)):
        for second in range(first + 1, len(anchors)):
            near |= _on_segment(rgb, anchors[first], anchors[second])
    return near.mean() > 0.6
