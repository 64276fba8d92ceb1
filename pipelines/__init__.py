"""Ready pipelines: a stock pipeline of diffusers plus a method. Imported when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffctrl.pipelines.radial import (
        CogVideoXRadialPipeline,
        HunyuanVideoRadialPipeline,
        LTXRadialPipeline,
        MochiRadialPipeline,
        WanImageToVideoRadialPipeline,
        WanRadialPipeline,
    )
    from diffctrl.pipelines.refam import (
        FluxRefAMPipeline,
        MochiRefAMPipeline,
        StableDiffusion3RefAMPipeline,
        WanRefAMPipeline,
    )
    from diffctrl.pipelines.softpag import (
        FluxSoftPAGPipeline,
        StableDiffusion3SoftPAGPipeline,
        StableDiffusionXLSoftPAGPipeline,
        WanSoftPAGPipeline,
    )
    from diffctrl.pipelines.softpag_guider import SoftPAGGuidance
    from diffctrl.pipelines.sparsed import DreamSparseDPipeline, LLaDASparseDPipeline

__all__ = [
    "CogVideoXRadialPipeline",
    "DreamSparseDPipeline",
    "FluxRefAMPipeline",
    "FluxSoftPAGPipeline",
    "HunyuanVideoRadialPipeline",
    "LLaDASparseDPipeline",
    "LTXRadialPipeline",
    "MochiRadialPipeline",
    "MochiRefAMPipeline",
    "SoftPAGGuidance",
    "StableDiffusion3RefAMPipeline",
    "StableDiffusion3SoftPAGPipeline",
    "StableDiffusionXLSoftPAGPipeline",
    "WanImageToVideoRadialPipeline",
    "WanRadialPipeline",
    "WanRefAMPipeline",
    "WanSoftPAGPipeline",
]

_PLACES = {
    "CogVideoXRadialPipeline": "diffctrl.pipelines.radial",
    "HunyuanVideoRadialPipeline": "diffctrl.pipelines.radial",
    "LTXRadialPipeline": "diffctrl.pipelines.radial",
    "MochiRadialPipeline": "diffctrl.pipelines.radial",
    "WanImageToVideoRadialPipeline": "diffctrl.pipelines.radial",
    "WanRadialPipeline": "diffctrl.pipelines.radial",
    "DreamSparseDPipeline": "diffctrl.pipelines.sparsed",
    "FluxRefAMPipeline": "diffctrl.pipelines.refam",
    "FluxSoftPAGPipeline": "diffctrl.pipelines.softpag",
    "LLaDASparseDPipeline": "diffctrl.pipelines.sparsed",
    "MochiRefAMPipeline": "diffctrl.pipelines.refam",
    "SoftPAGGuidance": "diffctrl.pipelines.softpag_guider",
    "StableDiffusion3RefAMPipeline": "diffctrl.pipelines.refam",
    "StableDiffusion3SoftPAGPipeline": "diffctrl.pipelines.softpag",
    "StableDiffusionXLSoftPAGPipeline": "diffctrl.pipelines.softpag",
    "WanRefAMPipeline": "diffctrl.pipelines.refam",
    "WanSoftPAGPipeline": "diffctrl.pipelines.softpag",
}


def __getattr__(name: str) -> Any:
    # One pipeline class imports its whole family of diffusers; a user wants one of them.
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'diffctrl.pipelines' has no attribute {name!r}")
