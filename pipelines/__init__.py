"""Ready pipelines: a stock pipeline of diffusers plus a method. Imported when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffctrl.pipelines.softpag import (
        FluxSoftPAGPipeline,
        StableDiffusion3SoftPAGPipeline,
        StableDiffusionXLSoftPAGPipeline,
        WanSoftPAGPipeline,
    )
    from diffctrl.pipelines.softpag_guider import SoftPAGGuidance
    from diffctrl.pipelines.sparsed import DreamSparseDPipeline, LLaDASparseDPipeline

__all__ = [
    "DreamSparseDPipeline",
    "FluxSoftPAGPipeline",
    "LLaDASparseDPipeline",
    "SoftPAGGuidance",
    "StableDiffusion3SoftPAGPipeline",
    "StableDiffusionXLSoftPAGPipeline",
    "WanSoftPAGPipeline",
]

_PLACES = {
    "DreamSparseDPipeline": "diffctrl.pipelines.sparsed",
    "FluxSoftPAGPipeline": "diffctrl.pipelines.softpag",
    "LLaDASparseDPipeline": "diffctrl.pipelines.sparsed",
    "SoftPAGGuidance": "diffctrl.pipelines.softpag_guider",
    "StableDiffusion3SoftPAGPipeline": "diffctrl.pipelines.softpag",
    "StableDiffusionXLSoftPAGPipeline": "diffctrl.pipelines.softpag",
    "WanSoftPAGPipeline": "diffctrl.pipelines.softpag",
}


def __getattr__(name: str) -> Any:
    # One pipeline class imports its whole family of diffusers; a user wants one of them.
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'diffctrl.pipelines' has no attribute {name!r}")
