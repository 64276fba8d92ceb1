"""Stock pipelines that guide with SoftPAG."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline, WanPipeline

from diffctrl.pipelines.base import ControlledPipelineMixin, joined_signature
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.softpag import SoftPAGConfig

_SETTINGS = tuple(field.name for field in fields(SoftPAGConfig))


class SoftPAGPipelineMixin(ControlledPipelineMixin):
    """A stock pipeline whose call also takes the settings of SoftPAG (arXiv 2506.10978).

    ```python
    pipe = StableDiffusion3SoftPAGPipeline.from_pretrained(...)
    pipe("a red star left of a blue ring", u=0.5, w=3.0)
    pipe.set_attn_processor(SoftPAGAttnProcessor("L3H1,L4", u=0.5))  # for every call from now on
    ```
    """

    # What this model is guided with where nothing is said.
    softpag: ClassVar[SoftPAGConfig] = SoftPAGConfig()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it is the class's call
            return self._guided_call(*args, **kwargs)

        __call__.__doc__ = (
            f"`{cls.stock_class.__name__}.__call__`, guided with SoftPAG.\n\n"
            f"Besides the stock arguments it takes those of `SoftPAGConfig` ({', '.join(_SETTINGS)})\n"
            "for this call. What is left out comes from the installed processor, or is the default\n"
            "without one. u=0 is stock."
        )
        joined = joined_signature(cls.stock_class.__call__, SoftPAGConfig)
        parameters = [
            p.replace(default=getattr(cls.softpag, name)) if name in _SETTINGS else p
            for name, p in joined.parameters.items()
        ]
        __call__.__signature__ = joined.replace(parameters=parameters)  # type: ignore[attr-defined]
        cls.__call__ = __call__  # type: ignore[method-assign]

    def _guided_call(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        settings = {name: value for name, value in given.items() if value is not None}
        stock: Any = self.stock_class.__call__
        if not settings and (self.control is not None or self._controlled_from_outside()):
            return stock(self, *args, **kwargs)
        with self._controlled(self._with_settings(settings)):
            return stock(self, *args, **kwargs)

    def _with_settings(self, settings: dict[str, Any]) -> list[Any]:
        """The installed processors with SoftPAG's settings changed, or added where it is not among them."""
        installed = [] if self.control is None else list(self.control.controls)
        for index, control in enumerate(installed):
            if isinstance(control, SoftPAGAttnProcessor):
                installed[index] = SoftPAGAttnProcessor(config=replace(control.config, **settings))
                return installed
        return [*installed, SoftPAGAttnProcessor(config=replace(self.softpag, **settings))]


class StableDiffusion3SoftPAGPipeline(SoftPAGPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` under SoftPAG; works with and without classifier-free guidance."""

    stock_class = StableDiffusion3Pipeline


class FluxSoftPAGPipeline(SoftPAGPipelineMixin, FluxPipeline):
    """`FluxPipeline` under SoftPAG, without classifier-free guidance or on top of `true_cfg_scale`."""

    stock_class = FluxPipeline
    softpag = SoftPAGConfig(w=8.0)  # published for FLUX.1-dev


class StableDiffusionXLSoftPAGPipeline(SoftPAGPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` under SoftPAG, in the middle block unless heads are named."""

    stock_class = StableDiffusionXLPipeline


class WanSoftPAGPipeline(SoftPAGPipelineMixin, WanPipeline):
    """`WanPipeline` under SoftPAG; both transformers of Wan 2.2 are guided."""

    stock_class = WanPipeline
