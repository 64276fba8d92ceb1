"""The JSON file of a text: the answer, and everything that is needed to write it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffctrl.drawing.recipe import ControlSpec, Weights, differences, read_table
from diffctrl.errors import BadRequestError

RECIPE_VERSION = 1
_KIND = "diffctrl-text"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """What was asked, with what, on what.

    Attributes:
        model: an embedded model's name, a folder or a hub repository, as it was given.
        sampler: "llada" or "dream".
        sampling: every setting of the sampler.
        controls: the method with all of its settings; empty for dense attention.
        hardware: the card's name, or the instruction set that torch uses on the CPU.
        threads: torch's threads on a CPU, which decide the last bits; None elsewhere.
        versions: package -> version.
    """

    model: str
    weights: Weights
    prompt: str
    seed: int
    sampler: str
    sampling: Mapping[str, Any]
    controls: tuple[ControlSpec, ...]
    device: str
    dtype: str
    hardware: str
    threads: int | None
    versions: Mapping[str, str]
    version: int = field(default=RECIPE_VERSION)

    def differences(self, now: TextRecipe) -> list[str]:
        """What of the surroundings is not as it was, so that the text may differ."""
        return differences(self, now, ("device", "hardware", "threads", "dtype"))

    @classmethod
    def from_table(cls, found: Any) -> TextRecipe:
        """Read an untrusted table.

        Raises:
            BadRequestError: it is no recipe, or one of another version.
        """
        if not isinstance(found, dict) or not isinstance(found.get("controls"), list):
            raise BadRequestError("its recipe is not a table of values with a list of controls")
        if found.get("version") != RECIPE_VERSION:
            raise BadRequestError(
                f"its recipe has version {found.get('version')!r}; this diffctrl reads {RECIPE_VERSION}"
            )
        controls = tuple(read_table(ControlSpec, each, "control") for each in found["controls"])
        weights = read_table(Weights, found.get("weights"), "weights")
        return read_table(cls, {**found, "controls": controls, "weights": weights}, "recipe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An answer.

    Attributes:
        recipe: how to write it again.
        text: cut at its end.
        tokens: all generated ones.
        order: the step that decided each, -1 where none did.
        finished: every token is decided.
        stats: steps, forwards, seconds, and what the method did.
    """

    recipe: TextRecipe
    text: str
    tokens: list[int]
    order: list[int]
    finished: bool
    stats: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the file; an interrupted run leaves nothing behind."""
        table = {"kind": _KIND, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Written:
        """The answer in a file that `save` wrote.

        Raises:
            BadRequestError: there is no such file, or it carries no recipe.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadRequestError(f"there is no file {path}") from None
        except (OSError, ValueError):
            raise BadRequestError(f"{path} is not a JSON file that can be read") from None
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise BadRequestError(
                f"{path} carries no recipe of a text: `diffctrl text --out` did not write it"
            )
        del found["kind"]
        try:
            return read_table(cls, {**found, "recipe": TextRecipe.from_table(found.get("recipe"))}, "answer")
        except BadRequestError as error:
            raise BadRequestError(f"{path} cannot be repeated: {error}") from None
