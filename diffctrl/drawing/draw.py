"""Carry out a plan: load the model once, draw each seed, say what was drawn with what."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffctrl.drawing import environment
from diffctrl.drawing.choices import processors
from diffctrl.drawing.plan import Plan
from diffctrl.drawing.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from diffctrl.control import ControlHandle

# Called after each denoising step of any picture.
OnStep = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One seed's pictures or clips; a clip is (T, H, W, 3) uint8.

    Attributes:
        image: under the plan's controls and LoRA, or the stock model's where it has none.
        stock: the stock model's, where the plan compares.
        recipe: how to draw it again.
        described: controls and LoRA in words, or "stock".
        stats: what the controls did, per model; empty without controls.
    """

    image: Image | np.ndarray
    stock: Image | np.ndarray | None
    recipe: Recipe
    described: str
    stats: dict[str, Any]


def load(plan: Plan) -> Any:
    """The plan's pipeline on its device, silent."""
    import torch

    if plan.threads is not None and 1 <= plan.threads <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(plan.threads)
    pipe = plan.source.load(getattr(torch, plan.dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe if plan.device == "cpu" else pipe.to(plan.device)


def draw(plan: Plan, pipe: Any, on_step: OnStep = lambda: None) -> Iterator[Drawn]:
    """Draw every seed of the plan, one at a time: a seed's picture does not depend on the others."""
    first = _recipe(plan, pipe)
    # A stock picture to compare with is drawn just before its own: no seed waits for those after it.
    for seeds in [(seed,) for seed in plan.seeds] if plan.compare else [plan.seeds]:
        stock = _one(plan, pipe, seeds[0], on_step) if plan.compare else None
        with _controlled(plan, pipe) as (control, described):
            for seed in seeds:
                image = _one(plan, pipe, seed, on_step)
                stats = {} if control is None else control.stats()
                yield Drawn(image, stock, replace(first, seed=seed), described, stats)


@contextmanager
def _controlled(plan: Plan, pipe: Any) -> Iterator[tuple[ControlHandle | None, str]]:
    """The plan's LoRA and controls on the pipeline, and both in words."""
    import diffctrl

    words, control = [], None
    with ExitStack() as on:
        if plan.lora is not None:
            from diffctrl.pipelines.length import load_length_lora, unload_length_lora

            load_length_lora(pipe, plan.lora.name, mask=False)
            on.callback(unload_length_lora, pipe)
            words.append(f"lora {Path(plan.lora.name).stem}")
        if plan.controls:
            control = on.enter_context(diffctrl.apply(pipe, processors(plan.controls)))
            words = [each.describe() for each in control.controls] + words
        yield control, " + ".join(words) or "stock"


def _one(plan: Plan, pipe: Any, seed: int, on_step: OnStep) -> Image | np.ndarray:
    import numpy as np
    import torch

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    arguments: dict[str, Any] = {
        "prompt": plan.prompt,
        "height": plan.height,
        "width": plan.width,
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
        # On the CPU whatever the device, so that a seed means the same noise everywhere.
        "generator": torch.Generator("cpu").manual_seed(seed),
        "callback_on_step_end": after_step,
    }
    if plan.negative is not None:
        arguments["negative_prompt"] = plan.negative
    if plan.max_sequence_length is not None:
        arguments["max_sequence_length"] = plan.max_sequence_length
    if plan.frames is None:
        return pipe(**arguments).images[0]
    clip = pipe(**arguments, num_frames=plan.frames, output_type="np").frames[0]
    return (np.clip(clip, 0, 1) * 255).round().astype(np.uint8)


def _recipe(plan: Plan, pipe: Any) -> Recipe:
    """The recipe of the plan's first seed."""
    import torch

    return Recipe(
        model=plan.source.name,
        weights=plan.source.weights(),
        prompt=plan.prompt,
        negative=plan.negative,
        seed=plan.seeds[0],
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        height=plan.height,
        width=plan.width,
        max_sequence_length=plan.max_sequence_length,
        scheduler=_scheduler(pipe.scheduler),
        controls=plan.controls,
        compare=plan.compare,
        device=plan.device,
        dtype=plan.dtype,
        hardware=environment.hardware(plan.device),
        threads=torch.get_num_threads() if plan.device == "cpu" else None,
        versions=environment.versions(),
        frames=plan.frames,
        fps=plan.fps,
        lora=plan.lora,
    )


def _scheduler(scheduler: Any) -> dict[str, Any]:
    plain = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    kept = {name: value for name, value in plain.items() if value is None or _is_plain(value)}
    return {"class": type(scheduler).__name__, **kept}


def _is_plain(value: Any) -> bool:
    """Whether JSON keeps the value exactly."""
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
