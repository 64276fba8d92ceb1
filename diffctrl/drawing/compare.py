"""Two pictures or clips side by side, each under a band that says what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

_LEAST_SIDE = 384
_GAP = 12
_TEXT_SIZE = 15
_LINE = 20
_PAPER, _INK, _TITLE = (250, 250, 250), (60, 60, 60), (10, 10, 10)


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture with a title and lines of text below it."""

    image: Image
    title: str
    lines: tuple[str, ...] = ()


def side_by_side(panels: list[Panel]) -> Image:
    """One picture of all panels, left to right; small pictures are enlarged by a whole factor."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = panels[0].image.size
    factor = max(1, -(-_LEAST_SIDE // min(width, height)))
    width, height = width * factor, height * factor
    title_font, font = ImageFont.load_default(_TEXT_SIZE + 2), ImageFont.load_default(_TEXT_SIZE)
    texts = [_wrapped(panel, width, font) for panel in panels]
    band = _GAP + _LINE * max(map(len, texts)) + _GAP // 2
    sheet = Image.new("RGB", (len(panels) * (width + _GAP) + _GAP, _GAP + height + band), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (panel, lines) in enumerate(zip(panels, texts, strict=True)):
        left = _GAP + index * (width + _GAP)
        enlarged = panel.image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, _GAP))
        for row, line in enumerate(lines):
            top = _GAP + height + _GAP // 2 + row * _LINE
            pen.text((left, top), line, fill=_INK if row else _TITLE, font=font if row else title_font)
    return sheet


def clips_side_by_side(clips: list[tuple[np.ndarray, str, tuple[str, ...]]]) -> np.ndarray:
    """One clip (T, H, W, 3) uint8 of several of the same length, each with a title and lines of text."""
    import numpy as np
    from PIL import Image

    sheets = []
    for frames in zip(*(frames for frames, _, _ in clips), strict=True):
        panels = [
            Panel(Image.fromarray(frame), title, lines)
            for frame, (_, title, lines) in zip(frames, clips, strict=True)
        ]
        sheet = np.asarray(side_by_side(panels))
        sheets.append(sheet[: sheet.shape[0] // 2 * 2, : sheet.shape[1] // 2 * 2])  # MP4 wants even sides
    return np.stack(sheets)


def _wrapped(panel: Panel, width: int, font: FreeTypeFont | BitmapFont) -> list[str]:
    """The title on one line, then the lines folded to the width in pixels."""
    wrapped = [panel.title]
    for line in panel.lines:
        wrapped.append("")
        for word in line.split():
            longer = f"{wrapped[-1]} {word}".strip()
            if wrapped[-1] and font.getlength(longer) > width:
                wrapped.append(word)
            else:
                wrapped[-1] = longer
    return wrapped
