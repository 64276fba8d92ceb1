"""What the passes of a pipeline are: their names, their batch rows, their guidance scale."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffctrl.control.context import BatchLayout
from diffctrl.families import Family

# What stock pipelines call the pass of the negative prompt; those with a guider say "pred_uncond".
_UNCOND = ("uncond", "pred_uncond")


class PassName:
    """Hears the names that pipelines give their denoiser calls: `with model.cache_context("cond"): ...`.

    It wraps the method on the instance. A hook in diffusers' registry would hear them too, but registering
    one replaces `model.forward`, and taking it off would undo what the user put around it since (offloading).
    """

    def __init__(self) -> None:
        self.current: str | None = None
        self._model: nn.Module | None = None

    def listen(self, model: nn.Module) -> None:
        stock: Callable[..., Any] | None = getattr(model, "cache_context", None)
        if stock is None:
            return

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            previous, self.current = self.current, name
            try:
                with stock(name, *args, **kwargs):
                    yield
            finally:
                self.current = previous

        self._model = model
        setattr(model, "cache_context", cache_context)  # noqa: B010 - torch types attributes as modules

    def stop(self) -> None:
        if self._model is not None:
            del self._model.cache_context
        self._model = None


class Passes:
    """Tells what the rows of a call are, the way the stock pipelines arrange classifier-free guidance."""

    def __init__(
        self, family: Family, pipe: Any, scheduler: Any, batch_layout: BatchLayout | None, names: PassName
    ) -> None:
        self._family, self._pipe, self._scheduler = family, pipe, scheduler
        self._batch_layout: BatchLayout | None = batch_layout
        self._names = names
        self._run: Any = None
        self._run_scale = 0.0
        self._unnamed: tuple[int | None, Any] | None = None

    def layout(self) -> BatchLayout:
        if self._batch_layout is not None:
            return self._batch_layout
        if self._family.cfg == "separate":
            return "uncond" if self._names.current in _UNCOND else "cond"
        if self._pipe is None:
            return "cond"
        self._check_caller()
        return "uncond_cond" if self._guided() else "cond"

    def _check_caller(self) -> None:
        """Refuse a forward that another pipeline makes of the same model: its guidance is not known here.

        diffusers tells a model nothing of who calls it, so the stack is asked. Only frames of a `__call__`
        are opened: before Python 3.13 an opened frame keeps what it holds for as long as it runs.
        """
        from diffusers import DiffusionPipeline

        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "__call__":
                owner = frame.f_locals.get("self")
                if owner is self._pipe:
                    return
                if isinstance(owner, DiffusionPipeline):
                    raise RuntimeError(
                        f"the model runs in a {type(owner).__name__}, which shares it with the "
                        f"{type(self._pipe).__name__} under control; `diffctrl.apply` to the pipeline that "
                        "is called"
                    )
            frame = frame.f_back

    def _guided(self) -> bool:
        perturbs = getattr(self._pipe, "do_perturbed_attention_guidance", False)
        if perturbs or hasattr(self._pipe, "image_guidance_scale"):
            raise RuntimeError(
                f"{type(self._pipe).__name__} guides with three passes in one batch, which diffctrl cannot "
                "tell apart; use a pipeline with [uncond | cond] batches"
            )
        live = getattr(self._pipe, "do_classifier_free_guidance", None)
        if live is not None:
            return bool(live)
        if not hasattr(self._pipe, "_guidance_scale"):
            raise RuntimeError(
                f"{type(self._pipe).__name__} does not say whether it guides with [uncond | cond] batches; "
                "pass batch_layout='uncond_cond' or 'cond' to `diffctrl.apply`"
            )
        # CogVideoX's pipelines keep the answer to themselves and change the scale while they run: it is read
        # where a run begins, which is where the scheduler has new timesteps.
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is None or timesteps is not self._run:
            self._run, self._run_scale = timesteps, self._pipe._guidance_scale
        return self._run_scale > 1.0

    def check_named(self, step: int | None) -> None:
        """Refuse to guide a pipeline whose passes cannot be told apart: two in one step, none named."""
        if self._family.cfg != "separate" or self._batch_layout is not None or step is None:
            return
        here = None if self._names.current else (step, getattr(self._scheduler(), "timesteps", None))
        before, self._unnamed = self._unnamed, here
        if here is not None and before is not None and here[0] == before[0] and here[1] is before[1]:
            raise RuntimeError(
                f"the model ran twice in step {step}, and neither call was named, so that the conditional "
                "and the unconditional pass cannot be told apart; run the passes inside "
                "`with model.cache_context('cond'):` and `'uncond'`, or turn classifier-free guidance off"
            )

    def scale(self) -> float:
        """The pipeline's s in e + s (c - e), for a guidance that has to know the result of that line.

        Raises:
            RuntimeError: it is not known before the forward, or the line is another one.
        """
        name, pipe = type(self._pipe).__name__, self._pipe
        why = None
        if self._batch_layout is not None or pipe is None:
            why = "the model runs [uncond | cond] batches outside of a pipeline that says its guidance scale"
        elif not self._family.scale_known:
            why = f"{name} changes its guidance scale while it runs"
        elif getattr(pipe, "guidance_rescale", 0.0):
            why = f"{name} rescales too (guidance_rescale={pipe.guidance_rescale:g}); turn one of them off"
        if why is not None:
            raise RuntimeError(f"rescale cannot be exact here: {why}. Leave rescale at 0")
        return float(self._pipe.guidance_scale)
