"""Stock video pipelines under Radial Attention."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CogVideoXPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)

from diffctrl.pipelines.base import MethodPipelineMixin
from diffctrl.pipelines.length import LengthLoRAMixin
from diffctrl.processors import RadialAttnProcessor, RadialConfig


class RadialPipelineMixin(LengthLoRAMixin, MethodPipelineMixin):
    """A stock pipeline whose call also takes the settings of Radial Attention (arXiv 2506.19852).

    ```python
    pipe = WanRadialPipeline.from_pretrained(...)
    pipe("a red ball rolls to the left", num_frames=81)  # with the published settings of the model
    pipe("a red ball rolls to the left", dense_steps=6, decay_factor=0.5)
    pipe.set_attn_processor(RadialAttnProcessor(dense_steps=6))  # for every call from now on
    pipe.load_length_lora("length-4x")  # weights and mask for longer videos
    ```
    """

    processor_class = RadialAttnProcessor
    defaults = RadialConfig()
    call_note = "dense_fraction=1.0 is stock."

    def _changed(self, control: RadialAttnProcessor, settings: dict[str, Any]) -> RadialAttnProcessor:
        return control.changed(**settings)


class WanRadialPipeline(RadialPipelineMixin, WanPipeline):
    """`WanPipeline` under Radial Attention; both transformers of Wan 2.2 are controlled."""

    stock_class = WanPipeline


class WanImageToVideoRadialPipeline(RadialPipelineMixin, WanImageToVideoPipeline):
    """`WanImageToVideoPipeline` under Radial Attention; the image's cross-attention stays as it is."""

    stock_class = WanImageToVideoPipeline


class HunyuanVideoRadialPipeline(RadialPipelineMixin, HunyuanVideoPipeline):
    """`HunyuanVideoPipeline` under Radial Attention."""

    stock_class = HunyuanVideoPipeline


class MochiRadialPipeline(RadialPipelineMixin, MochiPipeline):
    """`MochiPipeline` under Radial Attention."""

    stock_class = MochiPipeline


class CogVideoXRadialPipeline(RadialPipelineMixin, CogVideoXPipeline):
    """`CogVideoXPipeline` under Radial Attention."""

    stock_class = CogVideoXPipeline


class LTXRadialPipeline(RadialPipelineMixin, LTXPipeline):
    """`LTXPipeline` under Radial Attention."""

    stock_class = LTXPipeline
