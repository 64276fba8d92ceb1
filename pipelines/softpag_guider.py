"""SoftPAG as a guider of diffusers, for modular pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

import diffctrl
from diffctrl.control import ControlHandle
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.processors.softpag import settled
from diffctrl.softpag import SoftPAGConfig, guidance_delta, rescaled
from diffctrl.softpag.headset import HeadSet

COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_perturbed"


class _Batches(list[Any]):
    """The batches of one step. Walking through it tells the guider which one is about to run.

    `prepare_models` gets the denoiser alone; counting its calls instead is what makes the stock guiders do
    nothing where a pass is missing.
    """

    def __init__(self, guider: SoftPAGGuidance, batches: list[Any]) -> None:
        super().__init__(batches)
        self._guider = guider

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._guider._current = getattr(batch, BaseGuidance._identifier_key)
            yield batch
        self._guider._current = None


class SoftPAGGuidance(BaseGuidance):
    """Steers away from a twin whose chosen attention heads are perturbed (arXiv 2506.10978).

    e + s (c - e) + w (c - p), or c + w (c - p) without classifier-free guidance: w means the same in both.

    ```python
    pipe.update_components(guider=SoftPAGGuidance(guidance_scale=4.0, heads="L7,L8", u=0.5, w=3.0))
    ```

    Args:
        guidance_scale: s, where 1 turns classifier-free guidance off; 7.5 by default.
        base: a guider of diffusers that treats the conditional and unconditional predictions instead, such as
            `AdaptiveProjectedGuidance` or `ClassifierFreeZeroStarGuidance`, with a scale of its own.
            w (c - p) is added to what it gives.
        heads: which heads, as in 'L3H1,L4=0.7', a `HeadSet`, or the name of a shipped one; None for the
            default of `SoftPAGConfig`.
        u, w, kind, scope, path, query_mean, sigma, temperature, difference, apg_parallel, apg_norm,
            apg_momentum, rescale: as in `SoftPAGConfig`.
        start, stop: the half-open part of the run in which heads are perturbed; step 0 is in [0, 1).
        enabled: whether there is any guidance at all.

    Raises:
        ValueError: an option is out of range, options contradict each other, or the base perturbs by itself.
        TypeError: the base is no guider of diffusers.
    """

    _input_predictions = [COND, UNCOND, PERTURBED]  # noqa: RUF012 - as the base class has it

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | None = None,
        heads: Any = None,
        u: float | None = None,
        w: float | None = None,
        kind: str = "identity",
        scope: str = "joint",
        path: str = "linear",
        query_mean: str | None = None,
        sigma: float | None = None,
        temperature: float | None = None,
        difference: str = "plain",
        apg_parallel: float | None = None,
        apg_norm: float | None = None,
        apg_momentum: float | None = None,
        rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        base: Any = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        options: dict[str, Any] = {
            "u": u,
            "w": w,
            "kind": kind,
            "scope": scope,
            "path": path,
            "query_mean": query_mean,
            "sigma": sigma,
            "temperature": temperature,
            "difference": difference,
            "apg_parallel": apg_parallel,
            "apg_norm": apg_norm,
            "apg_momentum": apg_momentum,
            "rescale": rescale,
        }
        self.settings = SoftPAGConfig(heads=heads, start_fraction=start, stop_fraction=stop, **options)
        named = self.settings.heads
        if isinstance(named, HeadSet):  # JSON keeps names, so that u and w of the set are written beside them
            used = self.settings.with_set(named)
            # The set itself stays, to be checked against the model.
            self.settings = replace(self.settings, u=used.u, w=used.w)
            self.register_to_config(u=used.u, w=used.w)
        if named is not None:  # as text, which JSON keeps
            self.register_to_config(heads=named if isinstance(named, str) else ",".join(map(str, named)))
        self._base = _base_guider(base)
        if self._base is not None:
            self.register_to_config(base=_as_json(self._base))
            if guidance_scale is not None:
                raise ValueError(
                    f"guidance_scale={guidance_scale!r} and base={type(self._base).__name__} are both for "
                    "classifier-free guidance; give the scale to the base"
                )
        self.guidance_scale = 7.5 if guidance_scale is None else guidance_scale
        self._current: str | None = None
        self._handle: ControlHandle | None = None
        self._settled = self.settings  # with what a head set of the model says
        self._denoiser: nn.Module | None = None
        self._on = False
        self._memory: dict[str, Any] = {}
        self._remembered = -1

    # --- one step -------------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if self._base is not None:
            self._base.set_state(step, num_inference_steps, timestep)
        self._take_off()  # an earlier run may have failed in the middle of a forward
        self._current = None
        if step <= self._remembered:
            self._memory = {}
        if step == 0:
            self._handle = None  # the model may have got other processors since the last run
        self._remembered = step

    def prepare_inputs(self, data: Any) -> list[Any]:
        passes = [] if self._base is None else list(self._base.prepare_inputs(data))
        passes += [self._prepare_batch(data, int(name == UNCOND), name) for name in self._passes()]
        return _Batches(self, passes)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list[Any]:
        fields = dict(input_fields)
        passes = [] if self._base is None else list(self._base.prepare_inputs_from_block_state(data, fields))
        passes += [
            self._prepare_batch_from_block_state(fields, data, int(name == UNCOND), name)
            for name in self._passes()
        ]
        return _Batches(self, passes)

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self._take_off()
        if self._current is None:
            raise RuntimeError(
                "SoftPAGGuidance does not know which pass begins: walk through what `prepare_inputs` "
                "returned, and call `prepare_models` for each batch while it is the current one"
            )
        if self._current != PERTURBED:
            if self._base is not None:
                self._base.prepare_models(denoiser)
            return
        if self._handle is None or self._denoiser is not denoiser:
            processor = SoftPAGAttnProcessor(config=self.settings)
            self._handle = diffctrl.apply(denoiser, processor, batch_layout="perturbed")
            (context,) = self._handle.contexts.values()
            self._settled = settled(self.settings, list(context.sites.values()))
            self._denoiser = denoiser
        else:
            self._handle.resume()
        self._on = True

    def cleanup_models(self, denoiser: nn.Module) -> None:
        if self._base is not None and self._current != PERTURBED:
            self._base.cleanup_models(denoiser)
        self._take_off()

    def enable(self) -> None:
        super().enable()
        if self._base is not None:
            self._base.enable()

    def disable(self) -> None:
        super().disable()
        if self._base is not None:
            self._base.disable()

    def _take_off(self) -> None:
        if self._on and self._handle is not None:
            self._handle.remove()
        self._on = False

    def forward(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None = None,
        pred_cond_perturbed: Tensor | None = None,
    ) -> GuiderOutput:
        """The guided prediction, computed in float32 at least."""
        wide = torch.promote_types(pred_cond.dtype, torch.float32)
        cond = pred = pred_cond.to(wide)
        if self._base is not None:
            given = {COND: pred_cond} | ({} if pred_uncond is None else {UNCOND: pred_uncond})
            pred = self._base.forward(**given).pred.to(wide)
        elif pred_uncond is not None:
            uncond = pred_uncond.to(wide)
            pred = uncond + self.guidance_scale * (cond - uncond)
        if pred_cond_perturbed is not None:
            pred = pred + guidance_delta(self._settled, cond, pred_cond_perturbed.to(wide), self._memory)
            if self.settings.rescale:
                pred = rescaled(pred, cond, self.settings.rescale)
        return GuiderOutput(pred=pred.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)

    # --- which passes ---------------------------------------------------------------------------------------

    def _passes(self) -> list[str]:
        """The passes that are not the base's."""
        names = [COND] if self._base is None else []
        if self._base is None and self._enabled and self.guidance_scale != 1.0:
            names.append(UNCOND)
        if self._enabled and not self.settings.rests and self._in_window():
            names.append(PERTURBED)
        return names

    def _in_window(self) -> bool:
        if self._num_inference_steps is None:
            return True
        return self._start <= self._step / self._num_inference_steps < self._stop

    @property
    def num_conditions(self) -> int:
        return len(self._passes()) + (0 if self._base is None else self._base.num_conditions)

    @property
    def is_conditional(self) -> bool:
        return self._current != UNCOND


def _base_guider(base: Any) -> BaseGuidance | None:
    """The guider itself, or the one that a saved configuration describes."""
    if isinstance(base, Mapping):
        from diffusers import guiders

        kind = getattr(guiders, str(base.get("class")), None)
        if not (isinstance(kind, type) and issubclass(kind, BaseGuidance)):
            raise ValueError(f"base names the guider {base.get('class')!r}, which diffusers does not have")
        base = kind(**base["config"])
    if base is not None and not isinstance(base, BaseGuidance):
        raise TypeError(f"base is a {type(base).__name__}; it takes a guider of diffusers.guiders")
    if base is not None and not set(base._input_predictions or ()) <= {COND, UNCOND}:
        raise ValueError(
            f"base={type(base).__name__} runs a perturbed pass of its own; take one that guides with the "
            "conditional and unconditional predictions alone, such as AdaptiveProjectedGuidance"
        )
    return base


def _as_json(base: BaseGuidance) -> dict[str, Any]:
    config = {name: value for name, value in base.config.items() if not name.startswith("_")}
    return {"class": type(base).__name__, "config": config}
