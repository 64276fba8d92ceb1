"""Referring expressions as records: how they are said, and which objects of a scene they are true of.

Truth has two levels. An expression is *sure* of an object where nobody would doubt it (clearly the largest,
clearly to the left), and *possible* for an object that somebody could still mean. It refers to one object
where both levels name that object and no other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .scenes import Scenes
from .vocabulary import COLOURS, IN_FRONT_OF, PATTERNS, SHAPES

SIZE_RATIO = 1.4
SIDE_GAP = 0.15  # of the side: the leftmost of its kind is this far from the next
STRICT_ALONG, STRICT_ACROSS = 0.10, 0.60  # a relation that nobody doubts: this far, and this straight
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind")
SIDES = ("left", "right", "top", "bottom")

# "world" uses words of the embedded model's vocabulary alone; "english" the words that people would.
Wording = Literal["world", "english"]
WORDINGS: tuple[Wording, ...] = ("world", "english")
_WORD = re.compile(r"[\w']+|[^\w\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What expressions are checked against: one scene of shapes as plain values, in z-order.

    Attributes:
        shape, colour, pattern: indices into SHAPES, COLOURS, PATTERNS.
        x, y, radius: fractions of the side, y down.
        overlaps: object 0 lies in front of object 1.
    """

    shape: tuple[int, ...]
    colour: tuple[int, ...]
    pattern: tuple[int, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    radius: tuple[float, ...]
    overlaps: bool

    def __len__(self) -> int:
        return len(self.shape)


def layouts(scenes: Scenes) -> list[Layout]:
    """One record per scene of shapes.

    Raises:
        ValueError: a scene holds characters.
    """
    if bool(scenes.character.any()):
        raise ValueError("referring expressions are about scenes of shapes; use world='shapes'")
    rows = {
        name: getattr(scenes, name).tolist() for name in ("shape", "colour", "pattern", "x", "y", "radius")
    }
    counts, relations = scenes.count.tolist(), scenes.relation.tolist()
    return [
        Layout(
            **{name: tuple(values[index][:count]) for name, values in rows.items()},
            overlaps=relations[index] == IN_FRONT_OF,
        )
        for index, count in enumerate(counts)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """What is said of an object; None where nothing is.

    Attributes:
        shape, colour, pattern: names.
        size: "small" or "large", among the objects that are called the same.
        side: "left", "right", "top" or "bottom", among those too.
        relation: one of RELATIONS, to `anchor`.
    """

    shape: str | None = None
    colour: str | None = None
    pattern: str | None = None
    size: str | None = None
    side: str | None = None
    relation: str | None = None
    anchor: Expression | None = None

    def say(self, wording: Wording = "world") -> str:
        """The expression in words, such as "the large blue star"."""
        size = self.size
        if size is not None and wording == "english":
            size = {"small": "smallest", "large": "largest"}[size]
        noun = self.shape or ("one" if wording == "world" else "shape")
        words = ["the", *(word for word in (size, self.colour, self.pattern) if word), noun]
        if self.side is not None:
            words += ["on" if self.side in ("left", "right") else "at", "the", self.side]
        if self.relation is not None and self.anchor is not None:
            words += [self.relation, self.anchor.say(wording)]
        return " ".join(words)

    def referents(self, layout: Layout) -> tuple[list[int], list[int]]:
        """(sure, possible) objects of a scene; the sure ones are among the possible ones."""
        called = [i for i in range(len(layout)) if self._is_called(layout, i)]
        sure, possible = called, called
        if self.size is not None:
            sign = 1 if self.size == "large" else -1
            sure, possible = _extreme([layout.radius[i] ** sign for i in called], called, ratio=SIZE_RATIO)
        if self.side is not None:
            axis = layout.x if self.side in ("left", "right") else layout.y
            sign = -1 if self.side in ("left", "top") else 1
            sure, possible = _extreme([sign * axis[i] for i in called], called, gap=SIDE_GAP)
        if self.relation is not None and self.anchor is not None:
            anchor = self.anchor.only(layout)
            if anchor is None:
                return [], []
            others = [i for i in called if i != anchor]
            sure = [
                i for i in others if i in sure and _related(layout, i, anchor, self.relation, strict=True)
            ]
            possible = [
                i
                for i in others
                if i in possible and _related(layout, i, anchor, self.relation, strict=False)
            ]
        return sure, possible

    def only(self, layout: Layout) -> int | None:
        """The one object that is meant, or None where none or several could be."""
        sure, possible = self.referents(layout)
        return sure[0] if len(sure) == 1 and possible == sure else None

    def _is_called(self, layout: Layout, index: int) -> bool:
        return (
            (self.shape is None or SHAPES[layout.shape[index]] == self.shape)
            and (self.colour is None or COLOURS[layout.colour[index]] == self.colour)
            and (self.pattern is None or PATTERNS[layout.pattern[index]] == self.pattern)
        )


def _extreme(
    values: list[float], names: list[int], *, ratio: float = 1.0, gap: float = 0.0
) -> tuple[list[int], list[int]]:
    """(surely the largest, possibly the largest) of the values, under a ratio or a gap to the next."""
    if not values:
        return [], []
    largest = max(values)
    near = [name for name, value in zip(names, values, strict=True) if value * ratio + gap > largest]
    return (near if len(near) == 1 else []), near


def _related(layout: Layout, index: int, anchor: int, relation: str, *, strict: bool) -> bool:
    if relation in ("in front of", "behind"):
        pair = (index, anchor) if relation == "in front of" else (anchor, index)
        return layout.overlaps and pair == (0, 1)
    dx, dy = layout.x[anchor] - layout.x[index], layout.y[anchor] - layout.y[index]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        relation
    ]
    return along >= STRICT_ALONG and abs(across) <= STRICT_ACROSS * along if strict else along > 0


def word_spans(text: str) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each word and each punctuation mark, in characters."""
    return tuple(match.span() for match in _WORD.finditer(text))
