"""Where the commands write: results to stdout, progress and complaints to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from diffctrl.errors import BadRequestError


@contextmanager
def complaints() -> Iterator[None]:
    """One sentence and exit code 2 for a bad request, 130 for Ctrl-C; anything else is a bug and shows."""
    try:
        yield
    except BadRequestError as error:
        say_error(f"diffctrl: {printable(str(error))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say_error("diffctrl: stopped; unfinished files were not written")
        raise typer.Exit(130) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A file or folder that cannot be written, as a full disk, is the answer to a request and no bug.

    Raises:
        BadRequestError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise BadRequestError(
            f"{path} cannot be written ({error.strerror or error}); name another place with --out"
        ) from None


def say_error(line: str) -> None:
    """One unwrapped line on stderr."""
    print(line, file=sys.stderr)


def printable(text: str) -> str:
    """Text of foreign origin without control characters: it must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_pair(text: str, example: str) -> tuple[str, str]:
    """NAME=VALUE of --set, apart.

    Raises:
        BadRequestError: it is not of this form.
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise BadRequestError(f"--set {text} is not NAME=VALUE, as in --set {example}")
    return name.strip(), value.strip()


def prepare_libraries() -> None:
    """Settings that the libraries read when they are imported; what the user set stays."""
    # Threads that wait for each other sleep instead of spinning. It costs a drawing 0.2 s on idle cores; with
    # the cores shared, spinning made the same drawing take 32 s instead of 4 (2 cores, measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def no_loading_bars() -> None:
    """Switch off the bars that diffusers and transformers draw while they load; imports both."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
