"""The hooks that publish a context before each forward and guide the prediction after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from diffctrl.control.context import BatchLayout, Context, Rows, current_step
from diffctrl.control.control import Control, Guidance
from diffctrl.control.twin import add_delta, append_twins, prediction_of, twin_delta, with_prediction
from diffctrl.families import Family, Site

_PASS_HOOK = "diffctrl_pass"


class _PassState(BaseState):
    def reset(self) -> None:
        pass


class _PassHook(ModelHook):
    """Hears the names that pipelines give their denoiser calls through `model.cache_context("cond")`."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.state_manager = StateManager(_PassState)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module

    @property
    def pass_name(self) -> str | None:
        try:
            return self.state_manager.context.name
        except ValueError:  # outside any cache_context
            return None


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
        self._pipe, self._scheduler, self._batch_layout = pipe, scheduler, batch_layout
        self._pass_hook = _PassHook()
        self._guidance: Guidance | None = None
        self._stock_rows: Rows | None = None
        # (step, delta) of the last guided cond pass, for the uncond pass of the same step.
        self._pending: tuple[int | None, Tensor] | None = None
        self._handles: list[Any] = []
        self._registry: HookRegistry | None = None

    def register(self, model: nn.Module) -> None:
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        if hasattr(model, "cache_context"):
            self._registry = HookRegistry.check_if_exists_or_initialize(model)
            self._registry.register_hook(self._pass_hook, _PASS_HOOK)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._registry is not None:
            self._registry.remove_hook(_PASS_HOOK, recurse=False)
            self._registry = None

    def _layout(self) -> BatchLayout:
        if self._batch_layout is not None:
            return self._batch_layout
        guided = bool(getattr(self._pipe, "do_classifier_free_guidance", False))
        if self._family.cfg == "batched":
            return "uncond_cond" if guided else "cond"
        return "uncond" if self._pass_hook.pass_name == "uncond" else "cond"

    def _controls(self) -> list[Control]:
        found: dict[str, Control] = {}
        for site in self._sites:
            for control in getattr(site.module.processor, "controls", ()):
                found[control.key] = control
        return list(found.values())

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context, controls = self._context, self._controls()
        call = self._family.bind(model, args, kwargs)
        info = self._family.describe(model, call)
        context.info = info
        context.rows = self._stock_rows = Rows.of(info.batch, self._layout())
        context.step, context.total_steps = current_step(self._scheduler, info.timestep)
        context.forwards += 1
        self._guidance = next((c.guidance for c in controls if c.guidance is not None), None)
        if self._guidance is not None and not self._guidance.active(context):
            self._guidance = None
        if self._guidance is not None and context.rows.has_cond:
            for name in self._family.batched:
                if name in call:
                    call[name] = append_twins(call[name], info.batch, context.rows)
            context.info = self._family.describe(model, call)
            context.rows = context.rows.with_twins()
            context.twin_forwards += 1
            args, kwargs = (), call
        for control in controls:
            context.published[control.key] = control.prepare(context, context.published.get(control.key))
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        guidance, rows = self._guidance, self._context.rows
        if guidance is None or rows is None or self._stock_rows is None:
            return None
        prediction = prediction_of(output)
        if rows.has_cond:
            delta = twin_delta(prediction, rows, guidance)
            self._pending = (self._context.step, delta)
        elif self._pending is not None and self._pending[0] == self._context.step:
            delta = self._pending[1]
        else:
            raise RuntimeError(
                f"{self._context.model_name}: the unconditional pass of step {self._context.step} ran before its "
                "conditional one, so its share of the perturbation guidance is not known yet; use a pipeline "
                "that runs the conditional pass first"
            )
        return with_prediction(output, add_delta(prediction, delta, self._stock_rows.total))
