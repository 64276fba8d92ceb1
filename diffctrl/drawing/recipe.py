"""The recipe of a picture: everything that is needed to draw the same pixels again."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from diffctrl.errors import BadRequestError

RECIPE_VERSION = 1
# What two recipes must share to ask for the same picture; the rest describes where it was drawn.
_REQUEST = (
    "model",
    "prompt",
    "negative",
    "seed",
    "steps",
    "guidance_scale",
    "height",
    "width",
    "max_sequence_length",
    "controls",
    "compare",
    "dtype",
    "frames",
    "fps",
    "lora",
)
# Entries that only clips have: the recipe of a picture is without them.
_OPTIONAL = ("frames", "fps", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSpec:
    """One method with all of its settings as plain values."""

    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What identifies a model's weights.

    Attributes:
        sha256: over the names, sizes and contents of the weight files.
        bytes: their total size.
        sampled: the contents are too large to be read whole; sizes and both ends of each file were taken.
    """

    sha256: str
    bytes: int
    sampled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """A length LoRA.

    Attributes:
        name: of an embedded one, or the file or folder as it was given.
        sha256: of its file.
    """

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What was drawn, with what, on what.

    Attributes:
        model: an embedded model's name, a folder or a hub repository, as it was given.
        negative: the negative prompt, or None.
        max_sequence_length: as handed to the pipeline, or None where it takes none.
        scheduler: the sampler's class under "class", and its configuration.
        controls: the methods in order; empty for the stock model.
        compare: the file shows the stock picture beside the controlled one.
        hardware: the card's name, or the instruction set that torch uses on the CPU.
        threads: torch's threads on a CPU, which decide the last bits; None elsewhere.
        versions: package -> version.
        frames, fps: of a clip, its length and frames a second; None for a picture.
        lora: the length LoRA, or None.
    """

    model: str
    weights: Weights
    prompt: str
    negative: str | None
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int
    max_sequence_length: int | None
    scheduler: Mapping[str, Any]
    controls: tuple[ControlSpec, ...]
    compare: bool
    device: str
    dtype: str
    hardware: str
    threads: int | None
    versions: Mapping[str, str]
    frames: int | None = None
    fps: int | None = None
    lora: LoraSpec | None = None
    version: int = field(default=RECIPE_VERSION)

    def digest(self) -> str:
        """Eight hexadecimal digits that name the request: the same request gives the same file name."""
        asked = {name: value for name, value in self._entries().items() if name in _REQUEST}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]

    def to_json(self) -> str:
        """The recipe as one line of JSON."""
        return json.dumps(self._entries(), ensure_ascii=False, allow_nan=False)

    def _entries(self) -> dict[str, Any]:
        entries = asdict(self)
        return {name: value for name, value in entries.items() if value is not None or name not in _OPTIONAL}

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            BadRequestError: the text is no recipe, or one of a later version.
        """
        try:
            found = json.loads(text)
        except ValueError:
            raise BadRequestError("its recipe is not JSON") from None
        if not isinstance(found, dict):
            raise BadRequestError("its recipe is not a table of values")
        version = found.get("version")
        if version != RECIPE_VERSION:
            raise BadRequestError(f"its recipe has version {version!r}; this diffctrl reads {RECIPE_VERSION}")
        controls = found.get("controls")
        if not isinstance(controls, list):
            raise BadRequestError("its recipe names no list of controls")
        specs = tuple(read_table(ControlSpec, control, "control") for control in controls)
        made: dict[str, Any] = {
            "controls": specs,
            "weights": read_table(Weights, found.get("weights"), "weights"),
        }
        if found.get("lora") is not None:
            made["lora"] = read_table(LoraSpec, found["lora"], "lora")
        return read_table(cls, {**dict.fromkeys(_OPTIONAL), **found, **made}, "recipe")

    def differences(self, now: Recipe) -> list[str]:
        """What of the surroundings is not as it was, so that the pixels may differ."""
        found = differences(self, now, ("device", "hardware", "threads", "scheduler"))
        if self.lora is not None and now.lora is not None and self.lora.sha256 != now.lora.sha256:
            found.append(f"the LoRA was {self.lora.sha256[:12]}, is {now.lora.sha256[:12]}")
        return found


def differences(was: Any, now: Any, names: Iterable[str]) -> list[str]:
    """What differs between two recipes of one kind: weights, versions, and the attributes named."""
    found = []
    if was.model == now.model and was.weights != now.weights:
        found.append(f"weights of {now.model} were {was.weights.sha256[:12]}, are {now.weights.sha256[:12]}")
    for package, version in was.versions.items():
        if now.versions.get(package) != version:
            found.append(f"{package} was {version}, is {now.versions.get(package, 'missing')}")
    for name in names:
        if getattr(was, name) != getattr(now, name):
            found.append(f"{name} was {_short(getattr(was, name))}, is {_short(getattr(now, name))}")
    return found


def _short(value: Any) -> str:
    return str(value.get("class")) if isinstance(value, Mapping) else str(value)


def read_table(kind: type, found: Any, what: str) -> Any:
    """A dataclass from an untrusted table: exact field names, exact types.

    Raises:
        BadRequestError: an entry is missing, unknown, or of another type.
    """
    if not isinstance(found, dict):
        raise BadRequestError(f"the {what} in its recipe is not a table of values")
    names = {f.name for f in fields(kind)}
    if missing := sorted(names - found.keys()):
        raise BadRequestError(f"the {what} in its recipe lacks {', '.join(missing)}")
    if unknown := sorted(found.keys() - names):
        raise BadRequestError(f"the {what} in its recipe has an unknown entry {unknown[0]!r}")
    hints = typing.get_type_hints(kind)
    for name, value in found.items():
        if not _fits(hints[name], value):
            raise BadRequestError(f"the {what} in its recipe has {name}={value!r}, not {hints[name]}")
    return kind(**found)


def _fits(hint: Any, value: Any) -> bool:
    kinds = typing.get_args(hint) if typing.get_origin(hint) not in (Mapping, list, tuple, None) else (hint,)
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        accepted = (int, float) if plain is float else plain
        if isinstance(value, accepted) and not (isinstance(value, bool) and plain is not bool):
            return True
    return False
