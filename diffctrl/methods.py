"""The register of methods: what the command line, the demo and the documents know of each.

Nothing is imported until it is asked for: a misspelt method is answered before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from diffctrl.errors import BadRequestError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        name: what `--method` takes.
        title: the name for people.
        summary: what the user gets, in one line.
        config: where the frozen settings class is, "module:Class".
        processor: where the processor class is, "module:Class"; built as `Class(config=settings)`.
        families: the model families it works on, or None for every family.
        paper: the source.
        command: the command that it is used by.
        licence: of our implementation.
    """

    name: str
    title: str
    summary: str
    config: str
    processor: str
    families: tuple[str, ...] | None
    paper: str
    command: str = "generate"
    licence: str = "Apache-2.0"

    def config_class(self) -> type:
        """The settings class; imports torch, not diffusers."""
        return _resolve(self.config)

    def build(self, settings: Mapping[str, Any]) -> Any:
        """A processor with these settings; imports diffusers.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        return _resolve(self.processor)(config=self.config_class()(**settings))


def _resolve(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


_ALL = (
    Method(
        name="refam",
        title="RefAM",
        summary='"the red cup left of the plate" becomes a point, a mask and a box, on a picture or a video',
        config="diffctrl.refam:RefAMConfig",
        processor="diffctrl.processors:RefAMAttnProcessor",
        families=("sd3", "flux", "mochi", "wan"),
        paper="arXiv 2509.22650",
        command="ground",
    ),
    Method(
        name="softpag",
        title="SoftPAG",
        summary="better pictures without CFG or on top of it, by steering away from chosen attention heads",
        config="diffctrl.softpag:SoftPAGConfig",
        processor="diffctrl.processors:SoftPAGAttnProcessor",
        families=None,
        paper="arXiv 2506.10978",
    ),
    Method(
        name="radial",
        title="Radial Attention",
        summary="the same video in less time: what lies far away in time is attended in ever thinner bands",
        config="diffctrl.radial:RadialConfig",
        processor="diffctrl.processors:RadialAttnProcessor",
        families=(
            "wan",
            "wan_vace",
            "hunyuan_video",
            "hunyuan_video15",
            "mochi",
            "cogvideox",
            "ltx",
        ),
        paper="arXiv 2506.19852",
    ),
    Method(
        name="sparsed",
        title="SparseD",
        summary="long-context diffusion language models faster: each head keeps the key blocks it looks at",
        config="diffctrl.sparsed:SparseDConfig",
        processor="diffctrl.processors:SparseDAttnProcessor",
        families=("llada", "dream"),
        paper="arXiv 2509.24014",
        command="text",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def find(name: str) -> Method:
    """The method of this name.

    Raises:
        BadRequestError: there is none; names the nearest and all accepted.
    """
    if name not in METHODS:
        raise BadRequestError(
            f"unknown method {name!r}{nearest(name, METHODS)}; accepted: {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]
