"""Stock pipelines that guide with SoftPAG."""

from __future__ import annotations

from typing import Any

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline, WanPipeline

from diffctrl.pipelines.base import MethodPipelineMixin
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.softpag import SoftPAGConfig
from diffctrl.softpag.headset import HeadSet


class SoftPAGPipelineMixin(MethodPipelineMixin):
    """A stock pipeline whose call also takes the settings of SoftPAG (arXiv 2506.10978).

    ```python
    pipe = StableDiffusion3SoftPAGPipeline.from_pretrained(...)
    pipe("a red star left of a blue ring", u=0.5, w=3.0)
    pipe.set_attn_processor(SoftPAGAttnProcessor("L3H1,L4", u=0.5))  # for every call from now on
    ```
    """

    processor_class = SoftPAGAttnProcessor
    defaults = SoftPAGConfig()
    call_note = "u=0 is stock."


class StableDiffusion3SoftPAGPipeline(SoftPAGPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` under SoftPAG; works with and without classifier-free guidance."""

    stock_class = StableDiffusion3Pipeline


class FluxSoftPAGPipeline(SoftPAGPipelineMixin, FluxPipeline):
    """`FluxPipeline` under SoftPAG, without classifier-free guidance or on top of `true_cfg_scale`."""

    stock_class = FluxPipeline
    defaults = SoftPAGConfig(w=8.0)  # published for FLUX.1-dev

    def _defaults_beside(self, settings: dict[str, Any]) -> SoftPAGConfig:
        heads = SoftPAGConfig(heads=settings.get("heads")).heads
        # A head set comes with the scale that suits it.
        own = isinstance(heads, str) or (isinstance(heads, HeadSet) and heads.w is not None)
        return SoftPAGConfig() if own else self.defaults


class StableDiffusionXLSoftPAGPipeline(SoftPAGPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` under SoftPAG, in the middle block unless heads are named."""

    stock_class = StableDiffusionXLPipeline


class WanSoftPAGPipeline(SoftPAGPipelineMixin, WanPipeline):
    """`WanPipeline` under SoftPAG; both transformers of Wan 2.2 are guided."""

    stock_class = WanPipeline
