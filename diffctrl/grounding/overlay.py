"""A grounding drawn on its picture: heat, mask edge, box, point, expression."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffctrl.refam import Grounding
from diffctrl.refam.locate import enlarged, ranged
from diffctrl.refam.metrics import boundary

_LEAST_SIDE, _MOST_SIDE = 256, 1024
_HEAT = np.array([255.0, 96.0, 0.0])
_STRENGTH = 0.65  # of the heat's colour where the map is largest
_EDGE, _BOX, _PAPER, _INK = (255, 255, 255), (0, 220, 255), (250, 250, 250), (20, 20, 20)


def overlay(picture: Any, found: Grounding) -> Any:
    """A PIL image: the picture under its heat map, with the mask's edge, its box, the point and the words.

    Small pictures are enlarged by a whole factor, large ones made smaller.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = picture.size
    scale = _scale(width, height)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    base = np.asarray(picture.convert("RGB").resize((size[1], size[0]), resample), dtype=np.float64)
    warm = (_STRENGTH * ranged(enlarged(found.heat, size))).numpy()[..., None]
    drawn = base * (1 - warm) + _HEAT * warm
    drawn[boundary(_resized(found.mask, size)).numpy()] = _EDGE
    font = ImageFont.load_default(15)
    lines = _wrapped(found.expression, size[1] - 8, font)
    sheet = Image.new("RGB", (size[1], size[0] + 20 * len(lines) + 6), _PAPER)
    sheet.paste(Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8)), (0, 0))
    pen = ImageDraw.Draw(sheet)
    if found.box is not None:
        left, top, right, bottom = (round(value * scale) for value in found.box)
        left, top = min(left, size[1] - 1), min(top, size[0] - 1)  # rounded out of a picture that is thin
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=_BOX)
    x, y = (value * scale for value in found.point)
    pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_EDGE, outline=_INK, width=2)
    for index, line in enumerate(lines):
        pen.text((4, size[0] + 3 + 20 * index), line, fill=_INK, font=font)
    return sheet


def mask_picture(mask: Tensor) -> Any:
    """A PIL image of mode "L": 255 inside."""
    from PIL import Image

    return Image.fromarray(mask.to(torch.uint8).mul(255).numpy())


def _scale(width: int, height: int) -> float:
    shorter, longer = min(width, height), max(width, height)
    if longer > _MOST_SIDE:
        return _MOST_SIDE / longer
    return float(max(1, min(-(-_LEAST_SIDE // shorter), _MOST_SIDE // longer)))


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0].bool()


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
