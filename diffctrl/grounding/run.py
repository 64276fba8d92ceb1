"""Carry out a plan: load the model once, ground each expression, say what was done with what."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffctrl.drawing import environment
from diffctrl.errors import BadRequestError
from diffctrl.grounding.overlay import mask_picture, overlay
from diffctrl.grounding.plan import Grounder, GroundPlan

if TYPE_CHECKING:
    from diffctrl.drawing.source import ModelSource

RECIPE_VERSION = 1
_BATCH = 8


def load(plan: GroundPlan) -> Any:
    """The plan's ready pipeline on its device."""
    import torch

    pipe = ready_pipeline(plan.source, plan.grounder, getattr(torch, plan.dtype))
    return pipe if plan.device == "cpu" else pipe.to(plan.device)


def ready_pipeline(source: ModelSource, grounder: Grounder, dtype: Any) -> Any:
    """The ready pipeline of a model, silent, on the CPU."""
    import inspect

    import diffctrl.pipelines

    stock = source.load(dtype)
    takes = inspect.signature(type(stock).__init__).parameters
    extra = {n: v for n, v in stock.config.items() if n in takes and n not in stock.components}
    pipe = getattr(diffctrl.pipelines, grounder.ready)(**stock.components, **extra)
    pipe.set_progress_bar_config(disable=True)
    call = source.recommended()
    if {"height", "width"} <= call.keys():  # Wan's pipeline does not say at which size it was trained
        pipe.reader.area = call["height"] * call["width"]
    return pipe


def ground(plan: GroundPlan, pipe: Any) -> Iterator[Any]:
    """One `Grounding` per expression, in order.

    Raises:
        BadRequestError: the picture, its size or the segmentation model cannot be used.
    """
    picture = plan.frames if len(plan.frames) > 1 else plan.frames[0]
    try:
        yield from pipe.ground(
            [(picture, phrase) for phrase in plan.phrases],
            config=plan.config,
            size=plan.size,
            frames=plan.most_frames,
            batch_size=_BATCH,
        )
    except ValueError as error:
        raise BadRequestError(str(error)) from None


def recipe(plan: GroundPlan) -> dict[str, Any]:
    """What was used: enough to do the same again."""
    import torch

    name = plan.image.name.encode(errors="replace").decode()  # names of files may be no UTF-8
    return {
        "version": RECIPE_VERSION,
        "picture": {"name": name, "sha256": plan.picture_sha256, "frames": plan.count},
        "model": plan.source.name,
        "weights": asdict(plan.source.weights()),
        "size": None if plan.size is None else list(plan.size),
        "most_frames": plan.most_frames,
        "device": plan.device,
        "dtype": plan.dtype,
        "hardware": environment.hardware(plan.device),
        "threads": torch.get_num_threads() if plan.device == "cpu" else None,
        "versions": environment.versions(),
    }


def write(plan: GroundPlan, found: Any, used: dict[str, Any], out: Path) -> list[Path]:
    """Overlay, mask and JSON of one expression, each whole or not at all; of a video a mask per frame too."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.image.stem).strip("-.")[:48] or "picture"
    name = f"{stem}-{plan.source.slug}-{plan.digest(found.expression)}"
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}-mask.png", out / f"{name}.json"]
    _save(overlay(plan.frames[found.frame], found), paths[0])
    _save(mask_picture(found.mask), paths[1])
    if found.track is not None:
        folder = out / f"{name}-track"
        folder.mkdir(exist_ok=True)
        for index, mask in enumerate(found.track):
            _save(mask_picture(mask), folder / f"{index:05d}.png")
        paths.append(folder)
    text = json.dumps({**found.as_dict(), "recipe": used}, indent=2, ensure_ascii=False)
    unfinished = paths[2].with_name(f".{paths[2].name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, paths[2])
    finally:
        unfinished.unlink(missing_ok=True)
    return paths


def _save(picture: Any, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(unfinished, format="PNG", optimize=True)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
