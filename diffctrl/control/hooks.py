"""The hooks that publish a context before each forward and guide the prediction after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn

from diffctrl.attention import BlockLists
from diffctrl.control.context import BatchLayout, Context, Rows, current_step
from diffctrl.control.control import Control, Guidance, Published, check_composition, check_control
from diffctrl.control.twin import (
    add_delta,
    append_grouped_twins,
    append_twins,
    prediction_of,
    twin_delta,
    with_prediction,
)
from diffctrl.families import Family, ForwardInfo, Site


class _PassName:
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


class _Passes:
    """Tells what the rows of a call are, the way the stock pipelines arrange classifier-free guidance."""

    def __init__(
        self, family: Family, pipe: Any, scheduler: Any, batch_layout: BatchLayout | None, names: _PassName
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
            return "uncond" if self._names.current == "uncond" else "cond"
        return "uncond_cond" if self._pipe is not None and self._guided() else "cond"

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
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None or timesteps is not self._run:
            self._run, self._run_scale = timesteps, self._pipe._guidance_scale
        return self._run_scale > 1.0

    def check_named(self, step: int | None) -> None:
        """Refuse to guide a pipeline whose passes cannot be told apart: two in one step, none named."""
        if self._family.cfg != "separate" or self._batch_layout is not None or step is None:
            return
        here = None if self._names.current else (step, getattr(self._scheduler, "timesteps", None))
        before, self._unnamed = self._unnamed, here
        if here is not None and before is not None and here[0] == before[0] and here[1] is before[1]:
            raise RuntimeError(
                f"the model ran twice in step {step}, and neither call was named, so that the conditional "
                "and the unconditional pass cannot be told apart; run the passes inside "
                "`with model.cache_context('cond'):` and `'uncond'`, or turn classifier-free guidance off"
            )


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
        self._family, self._sites, self._context, self._scheduler = family, sites, context, scheduler
        self._names = _PassName()
        self._passes = _Passes(family, pipe, scheduler, batch_layout, self._names)
        self._publisher = _Publisher(sites, family)
        self._guidance: Guidance | None = None
        self._stock_rows: Rows | None = None
        # (step, delta) of the last guided cond pass, for the uncond pass of the same step.
        self._pending: tuple[int | None, Tensor] | None = None
        self._handles: list[Any] = []

    def register(self, model: nn.Module) -> None:
        before: Any = torch.compiler.disable(self._before)
        after: Any = torch.compiler.disable(self._after)
        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        self._names.listen(model)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._names.stop()
        self._publisher.clear()
        self._pending = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context, family = self._context, self._family
        controls = self._publisher.controls()
        call = family.bind(model, args, kwargs)
        info = family.describe(model, call)
        auxiliary = family.auxiliary(call)
        context.info = info
        context.rows = self._stock_rows = Rows.of(info.batch, "cond" if auxiliary else self._passes.layout())
        context.step, context.total_steps = current_step(self._scheduler, info.timestep)
        context.forwards += 1
        self._guidance = next((c.guidance for c in controls if c.guidance is not None), None)
        if self._guidance is not None and not self._guidance.active(context):
            self._guidance = None
        if self._guidance is not None and not auxiliary:
            self._passes.check_named(context.step)
            if context.rows.has_cond:
                args, kwargs = (), self._with_twins(call, info, context.rows)
        self._publisher.publish(context, controls)
        return args, kwargs

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
        guidance, rows = self._guidance, self._context.rows
        if guidance is None or rows is None or self._stock_rows is None:
            return None
        prediction = prediction_of(output)
        if rows.perturbed[0] < rows.perturbed[1]:
            delta = twin_delta(prediction, rows, guidance)
            self._pending = (self._context.step, delta)
        elif self._pending is not None and self._pending[0] == self._context.step:
            delta = self._pending[1]
        else:
            raise RuntimeError(
                f"{self._context.model_name}: the unconditional pass of step {self._context.step} ran before "
                "its conditional one, so its share of the perturbation guidance is not known yet; use a "
                "pipeline that runs the conditional pass first"
            )
        return with_prediction(output, add_delta(prediction, delta, self._stock_rows.total))


class _Publisher:
    """Hands every site what the controls prepared, so that compiled code reads it without recompiling."""

    def __init__(self, sites: Sequence[Site], family: Family) -> None:
        self._sites, self._family = sites, family
        self._checked: list[Control] = []
        self._prepared: dict[str, Published | None] = {}
        self._masks: dict[tuple, BlockLists] = {}

    def controls(self) -> list[Control]:
        """The controls of the processors that the sites carry now, checked once where they are new."""
        carried = []
        for site in self._sites:
            if site.installed is not None and site.module.processor is not site.installed:
                raise RuntimeError(
                    f"{site.name} runs {type(site.module.processor).__name__} instead of the processor that "
                    "diffctrl put there, so that the control would do nothing; take the control off first "
                    "(`remove()`), change the model, and apply again"
                )
            carried.extend(getattr(site.module.processor, "controls", ()))
        controls = list({id(control): control for control in carried}.values())
        if controls != self._checked:  # `model.set_attn_processor` puts them on without `apply`
            check_composition(controls)
            for control in controls:
                check_control(control, self._family, self._sites)
            self.clear()
            self._checked = controls
        return controls

    def clear(self) -> None:
        """Forget what was published; a handle that outlives its control holds no tensors."""
        for site in self._sites:
            site.published.clear()
            site.mask = None
        self._checked, self._prepared, self._masks = [], {}, {}

    def publish(self, context: Context, controls: Sequence[Control]) -> None:
        prepared = {c.method: c.prepare(context, self._prepared.get(c.method)) for c in controls}
        self._prepared = prepared
        masks: dict[tuple, BlockLists] = {}
        for site in self._sites:
            for method, value in prepared.items():
                site.published[method] = None if value is None else value.sites.get(site.name)
            site.mask = self._mask(context, site, list(prepared.values()), masks)
        self._masks = masks  # what this forward did not use is forgotten

    def _mask(
        self, context: Context, site: Site, prepared: list[Published | None], used: dict[tuple, BlockLists]
    ) -> Any:
        """The blocks that every control attends, cut to the valid text of each row; on the device."""
        parts = [p.masks[site.name] for p in prepared if p is not None and site.name in p.masks]
        info = context.info
        if not parts or info is None:
            return None
        lengths = self._valid_lengths(info, site)
        key = (*parts, lengths)
        lists = self._masks.get(key) or used.get(key)
        if lists is None:
            lists = reduce(and_, parts)
            if lengths is not None:
                lists = replace(lists, n_valid=torch.tensor(lengths, dtype=torch.int32))
        used[key] = lists
        return lists.on(info.device)

    def _valid_lengths(self, info: ForwardInfo, site: Site) -> tuple[int, ...] | None:
        if site.kind != "joint" or self._family.text_side != "last" or info.text_valid is None:
            return None
        if info.grid is None:
            return None
        frames, rows, columns = info.grid
        return tuple(frames * rows * columns + valid for valid in info.text_valid)
