"""Errors that are meant for the person who asked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadRequestError(ValueError):
    """A request that cannot be carried out as given. Its text is one sentence for the person who asked."""


def nearest(name: str, accepted: Iterable[str]) -> str:
    """' Did you mean X?' for a misspelt name, or an empty string where nothing is near.

    >>> nearest("softpeg", ["softpag", "radial"])
    ' (did you mean softpag?)'
    """
    matches = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def check_text(text: str, what: str) -> None:
    """Refuse text that is no Unicode, which no tokenizer takes: bytes of a command line that are not UTF-8.

    Raises:
        BadRequestError: it has such bytes.

    >>> check_text("ein roter Stern", "the prompt")
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequestError(
            f"{what} {ascii(text)} is not UTF-8 text; type it in a terminal that is set to UTF-8"
        ) from None
