"""Stock pipelines that guide with SoftPAG."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import StableDiffusion3Pipeline

from diffctrl.pipelines.base import ControlledPipelineMixin, joined_signature
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.softpag import SoftPAGConfig


class StableDiffusion3SoftPAGPipeline(ControlledPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` under SoftPAG (arXiv 2506.10978), with the settings in the call.

    ```python
    pipe = StableDiffusion3SoftPAGPipeline.from_pretrained(...)
    pipe("a red star left of a blue ring", u=0.5, w=3.0)
    pipe.set_attn_processor(SoftPAGAttnProcessor("L3H1,L4", u=0.5))  # for every call from now on
    ```
    """

    stock_class = StableDiffusion3Pipeline

    def __call__(
        self,
        *args: Any,
        heads: Any = None,
        u: float | None = None,
        w: float | None = None,
        scope: str | None = None,
        start_fraction: float | None = None,
        stop_fraction: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call, guided.

        Args:
            heads, u, w, scope, start_fraction, stop_fraction: as in `SoftPAGConfig`, for this call; what is
                left out comes from the installed processor, or is the default without one. u=0 is stock.
            args, kwargs: of `StableDiffusion3Pipeline.__call__`.
        """
        named = {
            "heads": heads,
            "u": u,
            "w": w,
            "scope": scope,
            "start_fraction": start_fraction,
            "stop_fraction": stop_fraction,
        }
        settings = {name: value for name, value in named.items() if value is not None}
        if not settings and (self.control is not None or self._controlled_from_outside()):
            return super().__call__(*args, **kwargs)
        with self._controlled(self._with_settings(settings)):
            return super().__call__(*args, **kwargs)

    def _with_settings(self, settings: dict[str, Any]) -> list[Any]:
        """The installed processors with SoftPAG's settings changed, or added where it is not among them."""
        installed = [] if self.control is None else list(self.control.controls)
        for index, control in enumerate(installed):
            if isinstance(control, SoftPAGAttnProcessor):
                installed[index] = SoftPAGAttnProcessor(config=replace(control.config, **settings))
                return installed
        return [*installed, SoftPAGAttnProcessor(config=SoftPAGConfig(**settings))]


_call = StableDiffusion3SoftPAGPipeline.__call__
_call.__signature__ = joined_signature(StableDiffusion3Pipeline.__call__, _call)  # type: ignore[attr-defined]
