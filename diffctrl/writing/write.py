"""Carry out a plan: load the model, write the answer, say with what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diffctrl.drawing import environment
from diffctrl.drawing.choices import processors
from diffctrl.drawing.source import fingerprint
from diffctrl.writing.plan import TextPlan
from diffctrl.writing.recipe import TextRecipe, Written

if TYPE_CHECKING:
    from diffctrl.dlm import StepEvent
    from diffctrl.pipelines.text import TextPipeline

# Called after each denoising step.
OnStep = Callable[["StepEvent"], None]


def load(plan: TextPlan) -> TextPipeline:
    """The plan's pipeline on its device, with dense attention.

    Raises:
        BadRequestError: its weights are not those of its config.
    """
    import torch

    from diffctrl.pipelines.sparsed import PIPELINES

    if plan.threads is not None and 1 <= plan.threads <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(plan.threads)
    dtype = getattr(torch, plan.dtype)
    pipe = PIPELINES[plan.sampler].from_checkpoint(plan.checkpoint, dtype=dtype, sparsed=None)
    return pipe if plan.device == "cpu" else pipe.to(plan.device)


def write(plan: TextPlan, pipe: Any, on_step: OnStep = lambda event: None) -> Written:
    """The answer to the plan's prompt.

    Ctrl-C gives what is decided by then, with `finished` false.
    """
    from diffctrl.dlm import GenerationInterrupted

    controls = processors(plan.controls)
    began = time.perf_counter()
    try:
        output = pipe(
            input_ids=[list(plan.ids)],
            sparsed=controls[0].config if controls else False,
            seed=plan.seed,
            callback_on_step_end=lambda pipe, step, block, found: on_step(found["event"]),
            **asdict(plan.sampling),
        )
    except GenerationInterrupted as interrupted:
        output = interrupted.output
    seconds = time.perf_counter() - began
    tokens = output.sequences[0, len(plan.ids) :].tolist()
    return Written(
        recipe=_recipe(plan),
        text=output.texts[0],
        tokens=tokens,
        order=output.orders[0],
        finished=output.finished,
        stats={**output.stats, "seconds": round(seconds, 3)},
    )


def _recipe(plan: TextPlan) -> TextRecipe:
    import torch

    return TextRecipe(
        model=plan.checkpoint.name,
        weights=fingerprint(plan.checkpoint.folder, plan.checkpoint.weight_files),
        prompt=plan.prompt,
        seed=plan.seed,
        sampler=plan.sampler,
        sampling=asdict(plan.sampling),
        controls=plan.controls,
        device=plan.device,
        dtype=plan.dtype,
        hardware=environment.hardware(plan.device),
        threads=torch.get_num_threads() if plan.device == "cpu" else None,
        versions=environment.versions(),
    )
