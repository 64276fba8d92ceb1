"""The hooks that publish a context before each forward and guide the prediction after it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffctrl.control.context import BatchLayout, Context, Rows, current_step
from diffctrl.control.control import Control, Guidance
from diffctrl.control.passes import Passes, PassName
from diffctrl.control.publish import Publisher
from diffctrl.control.twin import (
    add_delta,
    append_grouped_twins,
    append_twins,
    prediction_of,
    with_prediction,
)
from diffctrl.control.twin_pass import TwinPass
from diffctrl.families import Family, ForwardInfo, Site


class _Memory:
    """What a guidance keeps from step to step of one run (momentum); a new run begins empty."""

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._scheduler = scheduler
        self._run: Any = None
        self._step = -1
        self._kept: MutableMapping[str, Any] = {}

    def of(self, step: int | None) -> MutableMapping[str, Any]:
        run = getattr(self._scheduler(), "timesteps", None)
        if run is not self._run or step is None or step <= self._step:
            self._kept = {}
        self._run, self._step = run, -1 if step is None else step
        return self._kept

    def clear(self) -> None:
        self._run, self._step, self._kept = None, -1, {}


class ContextHook:
    """Forward hooks of one model. They run eagerly, outside the blocks that a user compiles."""

    def __init__(
        self,
        family: Family,
        sites: Sequence[Site],
        context: Context,
        pipe: Any,
        scheduler: Any,
        batch_layout: BatchLayout | None,
    ) -> None:
        self._family, self._sites, self._context = family, sites, context
        # Looked up each time: a pipeline's scheduler may be replaced while the control is on.
        self._scheduler: Callable[[], Any] = lambda: (
            scheduler if scheduler is not None else getattr(pipe, "scheduler", None)
        )
        self._run: tuple[Any, int] = (None, 0)  # the schedule, and the step that its run began with
        self._names = PassName()
        self._passes = Passes(family, pipe, self._scheduler, batch_layout, self._names)
        self._publisher = Publisher(sites, family)
        self._guidance: Guidance | None = None
        self._stock_rows: Rows | None = None
        # (step, delta) of the last guided cond pass, for the uncond pass of the same step.
        self._pending: tuple[int | None, Tensor] | None = None
        self._twin = TwinPass(family, context)
        self._memory = _Memory(self._scheduler)
        self._handles: list[Any] = []

    def register(self, model: nn.Module) -> None:
        before: Any = torch.compiler.disable(self._before)
        after: Any = torch.compiler.disable(self._after)
        failed: Any = torch.compiler.disable(self._failed)
        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
            model.register_forward_hook(failed, always_call=True),
        ]
        self._names.listen(model)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._names.stop()
        self._publisher.clear()
        self._twin.forget()
        self._memory.clear()
        self._pending = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context, family = self._context, self._family
        controls = self._publisher.controls()
        call = family.bind(model, args, kwargs)
        info = family.describe(model, call)
        if self._twin.running:
            context.info, context.rows = info, Rows.of(info.batch, "perturbed")
            self._publish(controls)
            return args, kwargs
        self._twin.forget()
        auxiliary = context.auxiliary = family.auxiliary(call)
        context.info = info
        context.rows = self._stock_rows = Rows.of(info.batch, "cond" if auxiliary else self._passes.layout())
        scheduler = self._scheduler()
        context.step, context.total_steps = current_step(scheduler, info.timestep)
        context.first_step = self._first_step(scheduler, context.step)
        context.forwards += 1
        self._guidance = self._active_guidance(controls)
        if not auxiliary and (self._guidance or any(c.contributes.tells_rows for c in controls)):
            self._passes.check_named(context.step)
        if self._guidance is not None and not auxiliary:
            if not context.rows.has_cond:
                pass
            elif self._guidance.mode == "batched":
                args, kwargs = (), self._with_twins(call, info, context.rows)
            else:
                chosen = next(c for c in controls if c.guidance is self._guidance).select(self._sites)
                self._twin.keep(model, call, info.batch, context.rows, self._guidance.mode, chosen)
        self._publish(controls)
        return args, kwargs

    def _failed(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After a forward that raised, take off what listens for a twin."""
        if output is None and not self._twin.running:
            self._twin.forget()

    def _publish(self, controls: Sequence[Control]) -> None:
        # What is kept from forward to forward must be no inference tensor: a later one may want gradients.
        with torch.inference_mode(False), torch.no_grad():
            self._publisher.publish(self._context, controls)

    def _first_step(self, scheduler: Any, step: int | None) -> int:
        if (begin := getattr(scheduler, "begin_index", None)) is not None:
            return begin
        # Not said by DDIM and the like, nor by Wan's video-to-video: where a new schedule is first seen,
        # unless the control came when the run was under way.
        timesteps, step = getattr(scheduler, "timesteps", None), step or 0
        if timesteps is not self._run[0] or step < self._run[1]:
            under_way = getattr(scheduler, "step_index", None) is not None
            self._run = timesteps, 0 if under_way else step
        return self._run[1]

    def _active_guidance(self, controls: Sequence[Control]) -> Guidance | None:
        context = self._context
        guidance = next((c.guidance for c in controls if c.guidance is not None), None)
        twins_only = context.rows is not None and context.rows.perturbed == (0, context.rows.total)
        if guidance is None or twins_only or not guidance.active(context):
            return None
        if guidance.remembers and context.step is None:
            raise RuntimeError(
                f"{context.model_name}: momentum needs to know where a run begins, but no "
                "scheduler is known; apply to the pipeline instead of the bare model, or "
                "pass scheduler=... to `diffctrl.apply`"
            )
        return guidance

    def _with_twins(self, call: dict[str, Any], info: ForwardInfo, rows: Rows) -> dict[str, Any]:
        context, family = self._context, self._family
        for name in family.batched:
            if name in call:
                call[name] = append_twins(call[name], info.batch, rows)
        for name in family.grouped:
            if call.get(name) is not None:
                call[name] = append_grouped_twins(call[name], info.batch, rows)
        context.rows = rows.with_twins()
        valid = info.text_valid
        context.info = replace(
            info,
            batch=context.rows.total,
            text_valid=None if valid is None else valid + valid[rows.cond[0] : rows.cond[1]],
        )
        context.twin_forwards += 1
        return call

    def _after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        guidance, stock = self._guidance, self._stock_rows
        if self._twin.running or guidance is None or stock is None:
            return None
        context, prediction = self._context, prediction_of(output)
        rows = context.rows
        perturbed = None
        if self._twin.kept:
            perturbed = self._twin.run(model)
        elif rows is not None and rows.perturbed[0] < rows.perturbed[1]:
            perturbed = prediction[rows.perturbed[0] : rows.perturbed[1]]
        if perturbed is not None:
            shift = self._shift(guidance, prediction, perturbed, stock)
            self._pending = (context.step, shift)
        elif self._pending is not None and self._pending[0] == context.step:
            shift = self._pending[1]
            if guidance.rescales and not stock.has_cond:
                raise RuntimeError(
                    f"rescale cannot be exact here: {context.model_name} runs the conditional and the "
                    "unconditional pass one after the other, so that the guided prediction is not known in "
                    "either. Leave rescale at 0, or turn classifier-free guidance off"
                )
        else:
            raise RuntimeError(
                f"{context.model_name}: the unconditional pass of step {context.step} ran before "
                "its conditional one, so its share of the perturbation guidance is not known yet; use a "
                "pipeline that runs the conditional pass first"
            )
        return with_prediction(output, add_delta(prediction, shift, stock.total))

    def _shift(self, guidance: Guidance, prediction: Tensor, perturbed: Tensor, rows: Rows) -> Tensor:
        """What is added to every half, so that the pipeline's own line yields the guided prediction."""
        cond = prediction[rows.cond[0] : rows.cond[1]]
        delta = guidance.delta(self._context, cond, perturbed, self._memory.of(self._context.step))
        if not guidance.rescales:
            return delta
        # (e + x) + s ((c + x) - (e + x)) = base + x: with x = finish(base + delta) - base it is the result.
        base = cond.to(delta.dtype)
        if rows.uncond[0] < rows.uncond[1]:
            uncond = prediction[rows.uncond[0] : rows.uncond[1]].to(delta.dtype)
            base = uncond + self._passes.scale() * (base - uncond)
        return guidance.finish(base + delta, cond) - base
