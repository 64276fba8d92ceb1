"""Diffusion language models from folders and hub repositories, with no code of the model's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffctrl.dlm.bidirectional import check_bidirectional
from diffctrl.dlm.layouts import Architecture, read_architecture
from diffctrl.dlm.tokens import SpecialTokens
from diffctrl.errors import BadRequestError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Configurations and tokenizers; never Python files, never weights but in safetensors.
_SMALL = ("*.json", "*.txt", "*.jinja")
_INDEX, _WEIGHTS, _SETTINGS = "model.safetensors.index.json", "model.safetensors", "diffctrl.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, read without loading its weights.

    Attributes:
        name: as it was given.
        folder: where it lies.
        architecture: what its config.json describes.
        repository: on the hub, whose weights are fetched when they are first needed; None for a folder.
        revision: of the repository.
    """

    name: str
    folder: Path
    architecture: Architecture
    repository: str | None = None
    revision: str | None = None

    @classmethod
    def open(cls, name: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Read what a model is.

        Args:
            name: a folder, or a hub repository as owner/name, of which only the small files are fetched.
            revision: of the repository.

        Raises:
            BadRequestError: there is no such model, or it cannot be loaded.
        """
        given, folder = str(name), Path(name).expanduser()
        repository = None
        if not folder.is_dir():
            if not _REPOSITORY.fullmatch(given):
                raise BadRequestError(
                    f"there is no model {given}: it is no folder, and no hub repository (owner/name)"
                )
            repository, folder = given, _fetch(given, revision, _SMALL)
        architecture = read_architecture(_table(folder, "config.json", given), given)
        return cls(given, folder, architecture, repository, revision)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The folder's diffctrl.json, empty without one: "sampler", token ids, sampling under "call"."""
        return _table(self.folder, _SETTINGS, self.name) if (self.folder / _SETTINGS).is_file() else {}

    @property
    def sampler(self) -> str | None:
        """The decoding that the model was trained for, "llada" or "dream", or None where nothing says."""
        return self.settings.get("sampler", self.architecture.sampler)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sharded or not.

        Raises:
            BadRequestError: there are none, or one that the index names is missing.
        """
        if self.repository is not None:
            _fetch(self.repository, self.revision, ("*.safetensors",))
        if (self.folder / _INDEX).is_file():
            index = _table(self.folder, _INDEX, self.name)
            shards = index.get("weight_map")
            if not isinstance(shards, dict) or not shards or "metadata" not in index:
                raise BadRequestError(f"{self.name}: {_INDEX} lacks weight_map or metadata")
            names = sorted(set(map(str, shards.values())))
        else:
            names = [_WEIGHTS]
        for name in names:
            # A name with a folder in it could lead out of this one.
            if Path(name).name != name or not (self.folder / name).is_file():
                raise BadRequestError(
                    f"{self.name} has no {name}; weights are read from safetensors files only, never from "
                    "pickles (.bin, .pt)"
                )
        return [self.folder / name for name in names]

    def check_weights(self) -> None:
        """Compare names and shapes of the weights with the architecture's, from the files' headers.

        Raises:
            BadRequestError: a weight is missing, unknown, or of another shape; all of them are named at once.
        """
        model = self.empty()
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        found = dict(self._shapes())
        missing = sorted(wanted.keys() - found.keys() - tied)
        unknown = sorted(found.keys() - wanted.keys())
        wrong = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])
        if missing or unknown or wrong:
            parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
            parts += [f"{len(unknown)} unknown ({_some(unknown)})"] if unknown else []
            parts += [f"{name} is {found[name]} instead of {wanted[name]}" for name in wrong[:3]]
            raise BadRequestError(
                f"the weights of {self.name} are not those of the {self.architecture.layout} model that its "
                f"config.json describes: {'; '.join(parts)}"
            )

    def empty(self) -> Any:
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._model_class(self._config())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        from safetensors import SafetensorError, safe_open

        for path in self.weight_files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - it is no mapping
                        yield self.architecture.rename(name), tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise BadRequestError(f"{self.name}: {path.name} cannot be read ({error})") from None

    def load(self, dtype: Any = None, **options: Any) -> Any:
        """The model in evaluation mode, checked to attend in both directions.

        Weights go from the files to their places one by one, so that memory holds about one copy of them.

        Args:
            dtype: of the weights; None for that of the files.
            options: of transformers' `from_pretrained`: `device_map`, `attn_implementation`,
                `quantization_config`.

        Raises:
            BadRequestError: the weights are not the architecture's.
            ValueError: this version of transformers runs the model with a causal mask.
        """
        self.check_weights()
        model, report = self._model_class.from_pretrained(
            str(self.folder),
            config=self._config(),
            dtype="auto" if dtype is None else dtype,
            key_mapping=dict(self.architecture.renames) or None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if found := report.get(problem):
                raise BadRequestError(
                    f"{self.name} was not loaded whole: {problem} {_some(sorted(map(str, found)))}"
                )
        # Otherwise a save would go back to the original's names under a config that says transformers'.
        model._weight_conversions = None
        model.eval()
        check_bidirectional(model)
        return model

    @property
    def _model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.architecture.model_class)

    def _config(self) -> Any:
        import transformers

        return getattr(transformers, self.architecture.config_class).from_dict(dict(self.architecture.config))

    def tokenizer(self) -> Any:
        """The folder's tokenizer, the same object each time.

        Raises:
            BadRequestError: it has none that transformers builds by itself.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        if (self.folder / "tokenizer.json").is_file():
            # The class that its config names may be code of the model's own; the file says all.
            kind = transformers.PreTrainedTokenizerFast
        elif (self.folder / "vocab.json").is_file() and (self.folder / "merges.txt").is_file():
            kind = transformers.Qwen2Tokenizer  # Dream's own class is this one under another name
        else:
            raise BadRequestError(
                f"{self.name} has no tokenizer that can be read without its own code: neither tokenizer.json "
                "nor vocab.json and merges.txt"
            )
        try:
            return kind.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BadRequestError(f"the tokenizer of {self.name} cannot be loaded ({error})") from None

    def special(self, tokenizer: Any) -> SpecialTokens:
        """The ids of mask, padding and ends."""
        return SpecialTokens.find(tokenizer, self._config(), self.settings)


def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder in which a repository's files of these names lie; asks the hub for what is not there yet."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client has many classes; each means that there is no model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadRequestError(
            f"there is no folder {repository} here, and the hub repository cannot be read ({reason})"
        ) from None


def _table(folder: Path, relative: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / relative).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRequestError(f"the folder {name} has no {relative}: it is no language model") from None
    except (OSError, ValueError):
        raise BadRequestError(f"{name}: {relative} cannot be read as JSON") from None
    if not isinstance(found, dict):
        raise BadRequestError(f"{name}: {relative} is not a table of values")
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
