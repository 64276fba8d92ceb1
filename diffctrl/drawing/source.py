"""Where a model comes from (embedded, a folder, a hub repository), read without loading its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffctrl.drawing.kinds import KINDS, PipelineKind
from diffctrl.drawing.recipe import Weights
from diffctrl.errors import BadRequestError, nearest

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Components come from these libraries only: any other name in model_index.json would be code of the model's.
# diffusers calls its own safety checker, of Stable Diffusion 1.x, by the last.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_CARD = "diffctrl.json"
_READ_WHOLE_BYTES = 512 * 2**20
_END_BYTES = 2**20
_HUB_SECONDS = 10


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read about and loaded.

    Attributes:
        name: as the user gave it.
        folder: where it lies, or None for a hub repository.
        embedded: whether it is one of the package's own.
    """

    name: str
    folder: Path | None
    embedded: bool = False
    _configs: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def find(cls, name: str) -> ModelSource:
        """The model of this name; an embedded one first, then a folder, then the hub.

        Raises:
            BadRequestError: it is none of the three.
        """
        from diffctrl.zoo import registry

        if name in registry.EMBEDDED:
            if registry.EMBEDDED[name].kind == "text":
                raise BadRequestError(f"{name} writes text, it draws nothing; use it with `diffctrl text`")
            try:
                folder = registry.path(name)
            except FileNotFoundError as error:
                raise BadRequestError(str(error)) from None
            return cls(name, folder, embedded=True)
        folder = Path(name).expanduser()
        if folder.is_dir():
            return cls(name, folder)
        if _REPOSITORY.fullmatch(name):
            return cls(name, None)
        raise BadRequestError(
            f"there is no model {name!r}{nearest(name, registry.EMBEDDED)}: it is no embedded model "
            f"({', '.join(registry.EMBEDDED)}), no folder, and no hub repository (owner/name)"
        )

    @property
    def slug(self) -> str:
        """The model in a file name: letters, digits, dots, dashes and underscores only."""
        base = self.name if self.folder is None else self.folder.resolve().name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-.")[:48] or "model"

    def config(self, component: str | None = None) -> dict[str, Any]:
        """A component's config.json, or model_index.json.

        Raises:
            BadRequestError: it cannot be read.
        """
        relative = "model_index.json" if component is None else _config_file(component)
        if relative not in self._configs:
            path = self._file(relative)
            try:
                self._configs[relative] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise BadRequestError(f"{self.name}: {relative} cannot be read as JSON") from None
        return self._configs[relative]

    def _file(self, relative: str) -> Path:
        if self.folder is not None:
            path = self.folder / relative
            if not path.is_file():
                raise BadRequestError(
                    f"the folder {self.name} has no {relative}: it is no diffusers pipeline"
                )
            return path
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.name, relative, local_files_only=self._hub_silence is not None))
        except Exception as error:  # the hub client has many classes; each means that there is no file
            raise BadRequestError(
                f"there is no folder {self.name} here, and no {relative} of that repository on the hub "
                f"({self._hub_silence or _first_line(error)})"
            ) from None

    @cached_property
    def _hub_silence(self) -> str | None:
        """Why the hub cannot be asked for this repository, or None; without it, only cached files are used.

        One question with a short limit: a download would try again and again for each file.
        """
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(self.name, timeout=_HUB_SECONDS)
        except Exception as error:  # as above
            return _first_line(error)
        return None

    @cached_property
    def kind(self) -> PipelineKind:
        """What is known of the pipeline's class.

        Raises:
            BadRequestError: it does not draw from text, or wants code of its own.
        """
        index = self.config()
        name = str(index.get("_class_name"))
        if name not in KINDS:
            raise BadRequestError(
                f"{self.name} is a {name}; the commands draw with {', '.join(KINDS)}. From Python, "
                "diffctrl.apply takes every pipeline of the families that `diffctrl info` lists"
            )
        for component, entry in index.items():
            library = entry[0] if isinstance(entry, list) and entry else None
            if not component.startswith("_") and library is not None and library not in _LIBRARIES:
                raise BadRequestError(
                    f"{self.name}: its {component} comes from {library!r}; components of diffusers and "
                    "transformers are loaded, code of the model's own is not"
                )
        return KINDS[name]

    def recommended(self) -> dict[str, Any]:
        """Arguments of a call that the model was trained for, by the card of the package's own models; empty
        for others.

        Raises:
            BadRequestError: the card cannot be read.
        """
        card = None if self.folder is None else self.folder / _CARD
        if card is None or not card.is_file():
            return {}
        try:
            found = dict(json.loads(card.read_text(encoding="utf-8"))["call"])
        except (OSError, ValueError, TypeError, KeyError):
            found = {"": None}
        if not all(type(value) in (int, float) for value in found.values()):
            raise BadRequestError(f"{self.name}: {_CARD} names no arguments of a call")
        return found

    @property
    def asks_hub(self) -> bool:
        """Whether loading may ask the network."""
        return self.folder is None and self._hub_silence is None

    def components(self) -> dict[str, str]:
        """Component -> class name, of those that the pipeline has."""
        index = self.config()
        return {
            name: entry[1]
            for name, entry in index.items()
            if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1]
        }

    def skeleton(self, component: str) -> Any:
        """A component of diffusers with all of its modules and no memory for weights.

        Raises:
            BadRequestError: its configuration makes no model.
        """
        import diffusers
        import torch

        model_class = getattr(diffusers, self.components()[component])
        try:
            with torch.device("meta"):
                return model_class.from_config(self.config(component))
        except (ValueError, TypeError) as error:
            raise BadRequestError(f"{self.name}: its {component} cannot be made ({error})") from None

    def load(self, dtype: Any, *, without: Sequence[str] = ()) -> Any:
        """The stock pipeline, weights and all.

        Args:
            dtype: of the weights, or one for each component by name ("default" for the others).
            without: components that are not loaded; an embedded model comes whole.

        Raises:
            BadRequestError: diffusers cannot load it.
        """
        if self.embedded:
            from diffctrl.zoo import registry

            return registry.load(self.name, dtype)
        from diffusers import DiffusionPipeline

        where = str(self.folder) if self.folder is not None else self.name
        try:
            return DiffusionPipeline.from_pretrained(
                where,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=not self.asks_hub,
                **dict.fromkeys(without),
            )
        except (OSError, ValueError) as error:
            raise BadRequestError(f"{self.name} cannot be loaded: {_first_line(error)}") from None

    def weights(self) -> Weights:
        """What identifies the weights; the files of a hub repository must have been loaded before."""
        folder = self.folder if self.folder is not None else self._snapshot()
        names = self.components()
        files = sorted(path for name in names for path in (folder / name).glob("*.safetensors"))
        return fingerprint(folder, files)

    def _snapshot(self) -> Path:
        return self._file("model_index.json").parent


def _config_file(component: str) -> str:
    return f"{component}/" + ("scheduler_config.json" if component == "scheduler" else "config.json")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def fingerprint(folder: Path, files: Sequence[Path]) -> Weights:
    """What identifies weight files below a folder: names, sizes and contents, both ends of large ones."""
    total = sum(path.stat().st_size for path in files)
    sampled = total > _READ_WHOLE_BYTES
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if not sampled:
                digest.update(file.read())
            else:
                digest.update(file.read(_END_BYTES))
                file.seek(max(0, size - _END_BYTES))
                digest.update(file.read(_END_BYTES))
    return Weights(sha256=digest.hexdigest(), bytes=total, sampled=sampled)
