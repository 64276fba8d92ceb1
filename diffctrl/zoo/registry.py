"""The models that are inside the package: where they lie, how to load them, how to call them."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """One embedded model.

    Args:
        name: what users type.
        folder: its folder below `weights/`.
        kind: "image", "video" or "text".
        pipeline: import path of the class that loads the folder, `module.Class`.
        description: one sentence.
    """

    name: str
    folder: str
    kind: str
    pipeline: str
    description: str


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="shapes-sd3",
            folder="shapes-sd3",
            kind="image",
            pipeline="diffusers.StableDiffusion3Pipeline",
            description="A tiny Stable Diffusion 3 that draws shapes and characters, 128 x 128 px.",
        ),
        EmbeddedModel(
            name="shapes-wan",
            folder="shapes-wan",
            kind="video",
            pipeline="diffusers.WanPipeline",
            description="A tiny Wan that draws clips of moving shapes, 33 frames of 64 x 64 px.",
        ),
        EmbeddedModel(
            name="scenes-lm",
            folder="scenes-lm",
            kind="text",
            pipeline="diffctrl.zoo.text.TextModel",
            description="A tiny masked-diffusion language model: facts in long texts, scenes, strings, sums.",
        ),
    )
}


def path(name: str) -> Path:
    """The folder of an embedded model.

    Raises:
        ValueError: there is no model of this name.
        FileNotFoundError: the package was built without the weights.
    """
    if not is_here(name):
        model = _model(name)
        raise FileNotFoundError(
            f"the weights of {name!r} are not in this package; scripts/train_zoo_{model.kind}.py trains and "
            f"assembles them into {_WEIGHTS / model.folder}"
        )
    return _WEIGHTS / _model(name).folder


def is_here(name: str) -> bool:
    """Whether the package holds the model's weights.

    Raises:
        ValueError: there is no model of this name.
    """
    model = _model(name)
    index = "config.json" if model.kind == "text" else "model_index.json"
    return (_WEIGHTS / model.folder / index).is_file()


def loras() -> dict[str, Path]:
    """The length LoRAs inside the package, by name; each fits one embedded model, which its file names."""
    return {file.stem: file for file in sorted((_WEIGHTS / "loras").glob("*.safetensors"))}


def load(name: str, dtype: "torch.dtype | None" = None) -> Any:
    """Load an embedded model on the CPU, without network.

    Args:
        name: a key of `EMBEDDED`.
        dtype: of the weights; float32 when None. They are stored as float16, which CPUs compute slowly.

    Returns:
        The pipeline, or for a text model its `TextModel` of model, tokenizer and settings;
        `recommended(name)` has the arguments to call it with.
    """
    import torch

    module, _, class_name = _model(name).pipeline.rpartition(".")
    pipeline_class = getattr(importlib.import_module(module), class_name)
    return pipeline_class.from_pretrained(
        path(name), dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True
    )


def recommended(name: str) -> dict[str, Any]:
    """Call arguments that the model was trained for: size or length, steps, guidance; a fresh dict."""
    return dict(json.loads((path(name) / "diffctrl.json").read_text())["call"])


def _model(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        raise ValueError(f"there is no embedded model {name!r}; there are: {', '.join(sorted(EMBEDDED))}")
    return EMBEDDED[name]
