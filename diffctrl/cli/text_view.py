"""The order of decoding as colours: each token by the step that decided it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.style import Style
from rich.text import Text

from diffctrl.cli.output import printable

if TYPE_CHECKING:
    from diffctrl.dlm import StepEvent

_BLANK, _END = "░", "∎"
# Early to late: dark blue, green, yellow, as of perceptually even colour maps.
_STOPS = ((70, 90, 200), (30, 150, 170), (80, 190, 100), (230, 200, 40))
_LEGEND_CELLS = 24


def colour(share: float) -> tuple[int, int, int]:
    """Red, green, blue of a share in [0, 1] of the run.

    >>> colour(0.0), colour(1.0)
    ((70, 90, 200), (230, 200, 40))
    """
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    left = min(int(place), len(_STOPS) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - left)) for a, b in zip(_STOPS[left], _STOPS[left + 1], strict=True)
    )
    return red, green, blue


class OrderView:
    """What is decided of one answer, and when.

    Args:
        tokenizer: of transformers.
        ends: ids that end the answer.
        length: of the answer.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int], length: int) -> None:
        self._tokenizer, self._ends = tokenizer, frozenset(ends)
        self._tokens: list[int | None] = [None] * length
        self._order = [0] * length
        self._step, self._steps = 0, 1

    def update(self, event: StepEvent) -> None:
        """Take over what a step decided of the batch's first row."""
        self._step, self._steps = event.step + 1, event.steps
        for row, place, token in zip(
            event.rows.tolist(), event.positions.tolist(), event.tokens.tolist(), strict=True
        ):
            if row == 0 and place >= 0:
                self._tokens[place], self._order[place] = token, event.step

    def __rich__(self) -> Group:
        return Group(self._answer(), self._legend())

    def _answer(self) -> Text:
        text = Text()
        before: int | None = None
        for token, step in zip(self._tokens, self._order, strict=True):
            style = Style(color=_rgb(colour(step / max(1, self._steps - 1))))
            if token is None:
                text.append(_BLANK, Style(dim=True))
            elif token in self._ends:
                text.append(_END, style)
            else:
                text.append(self._piece(token, before), style)
            before = token
        return text

    def _piece(self, token: int, before: int | None) -> str:
        """The token's letters as they stand after the one before: some tokenizers put spaces between."""
        alone = self._tokenizer.decode([token])
        if before is not None and before not in self._ends:
            first = self._tokenizer.decode([before])
            both = self._tokenizer.decode([before, token])
            alone = both[len(first) :] if both.startswith(first) else alone
        return "".join(letter if letter in "\n\t" else printable(letter) for letter in alone)

    def _legend(self) -> Text:
        text = Text()
        text.append("first ", Style(dim=True))
        for cell in range(_LEGEND_CELLS):
            text.append("█", Style(color=_rgb(colour(cell / (_LEGEND_CELLS - 1)))))
        text.append(f" last   step {self._step} of {self._steps}", Style(dim=True))
        return text


def _rgb(values: tuple[int, int, int]) -> str:
    return "rgb({},{},{})".format(*values)
