"""What a search found, for people: a heat map of layers x heads, a table, a grid of sample pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffctrl.softpag.heads import Head, parse_head
from diffctrl.softpag.headset import HeadSet

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_CELL, _GAP, _MARGIN, _TOP = 34, 26, 84, 60
_PAPER, _INK, _QUIET, _MARK = (250, 250, 250), (40, 40, 40), (226, 226, 226), (20, 20, 20)
# Diverging, for readers who cannot tell red from green: worse than the current set, the same, better.
_WORSE, _SAME, _BETTER = (178, 88, 24), (247, 247, 247), (33, 102, 172)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a chosen head."""

    round: int
    head: str
    score: float | None
    error: float | None
    difference: float | None
    difference_error: float | None


def rows(headset: HeadSet) -> list[Row]:
    """The chosen heads in order, with what their round measured."""
    found = []
    for each in headset.chosen:
        entry = _candidates(headset, each.round).get(each.head, {})
        found.append(
            Row(
                each.round,
                str(each.head),
                each.score,
                entry.get("error"),
                entry.get("difference"),
                entry.get("difference_error"),
            )
        )
    return found


def _candidates(headset: HeadSet, number: int) -> dict[Head, dict[str, Any]]:
    for entry in headset.rounds:
        if entry["round"] == number:
            return {parse_head(each["head"]): each for each in entry["candidates"]}
    return {}


def _lines(headset: HeadSet) -> list[tuple[str | None, int, int]]:
    """(stack or None for the flat index, layer, heads): the rows of a heat map."""
    heads = [parse_head(each["head"]) for entry in headset.rounds for each in entry["candidates"]]
    counts: dict[tuple[str | None, int], int] = {}
    for head in [*headset.heads, *heads]:
        place = (head.stack, head.layer)
        counts[place] = max(counts.get(place, 0), (head.head or 0) + 1)
    order = sorted(counts, key=lambda place: (place[0] is not None, place[0] or "", place[1]))
    return [(stack, layer, counts[stack, layer]) for stack, layer in order]


def heat_map(headset: HeadSet) -> Image:
    """Layers x heads, one panel per round, coloured by the paired difference to the set of the round before.

    Chosen heads have a frame, heads of earlier rounds and heads without a score are grey.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    lines, largest = _lines(headset), _largest(headset)
    name = headset.objective.get("name", "score")
    legend = f"{name}, gain over the set before: -{largest:.3g} .. +{largest:.3g}; framed: chosen"
    columns = max((heads for _, _, heads in lines), default=1)
    step = _MARGIN + columns * _CELL + _GAP
    width = max(step * max(len(headset.rounds), 1) + _GAP, round(font.getlength(legend)) + 2 * _GAP)
    bottom = _TOP + len(lines) * _CELL + _GAP // 2
    sheet = Image.new("RGB", (width, bottom + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, entry in enumerate(headset.rounds):
        left = place * step + _MARGIN
        pen.text((left, 8), f"round {entry['round']}", fill=_INK, font=font)
        for column in range(columns):
            pen.text((left + column * _CELL + 6, 8 + _GAP), f"H{column}", fill=_INK, font=font)
        _draw_round(pen, font, left, lines, _candidates(headset, entry["round"]), entry["chosen"], largest)
    pen.text((_GAP, bottom), legend, fill=_INK, font=font)
    return sheet


def _draw_round(
    pen: ImageDraw,
    font: Any,
    left: int,
    lines: Sequence[tuple[str | None, int, int]],
    found: dict[Head, dict[str, Any]],
    chosen: Sequence[str],
    largest: float,
) -> None:
    framed = {parse_head(name) for name in chosen}
    for index, (stack, layer, heads) in enumerate(lines):
        top = _TOP + index * _CELL
        name = f"{stack + ':' if stack else ''}L{layer}"
        pen.text((left - 10 - font.getlength(name), top + 8), name, fill=_INK, font=font)
        for column in range(heads):
            head = Head(layer, column, stack)
            box = (left + column * _CELL, top, left + (column + 1) * _CELL - 3, top + _CELL - 3)
            frame = _MARK if head in framed else None
            pen.rectangle(box, fill=_colour(found.get(head), largest), outline=frame, width=3 if frame else 0)


def _largest(headset: HeadSet) -> float:
    """The end of the colour scale: the largest difference of any round, either sign."""
    differences = [
        abs(each["difference"])
        for entry in headset.rounds
        for each in entry["candidates"]
        if each.get("difference") is not None
    ]
    return max(differences, default=0.0)


def _colour(entry: dict[str, Any] | None, largest: float) -> tuple[int, int, int]:
    if entry is None or entry.get("difference") is None:
        return _QUIET
    share = entry["difference"] / largest if largest else 0.0
    end = _BETTER if share > 0 else _WORSE
    red, green, blue = (round(same + (to - same) * abs(share)) for same, to in zip(_SAME, end, strict=True))
    return red, green, blue


def sample_grid(columns: Sequence[str], lines: Sequence[tuple[str, Sequence[Image]]]) -> Image:
    """Pictures side by side: one line per (prompt and seed), one column per head set.

    Args:
        columns: a title for each column. lines: (title, pictures) each.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = lines[0][1][0].size
    factor = max(1, -(-160 // min(width, height)))
    width, height = width * factor, height * factor
    font = ImageFont.load_default(13)
    sheet = Image.new(
        "RGB",
        (len(columns) * (width + 8) + 8, _GAP + len(lines) * (height + _GAP)),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        pen.text((8 + column * (width + 8), 6), _fitted(title, width, font), fill=_INK, font=font)
    for line, (title, pictures) in enumerate(lines):
        top = _GAP + line * (height + _GAP)
        for column, picture in enumerate(pictures):
            enlarged = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (8 + column * (width + 8), top))
        pen.text((8, top + height + 5), _fitted(title, sheet.width - 16, font), fill=_INK, font=font)
    return sheet


def _fitted(text: str, width: int, font: Any) -> str:
    """The text, cut where it is wider than the room it has."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
