"""The length LoRA of a request: found, and checked against model, method and length, before weights load."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from diffctrl.drawing.recipe import ControlSpec, LoraSpec
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError


def choose(
    source: ModelSource, name: str, controls: Sequence[ControlSpec], given: Sequence[str]
) -> tuple[LoraSpec, list[str]]:
    """(the LoRA, warnings).

    Args:
        source: the model.
        name: of an embedded LoRA, a file, or a folder that holds one.
        controls: the methods that it runs under.
        given: their settings that the user named, "option" or "method.option".

    Raises:
        BadRequestError: there is no such LoRA, or it belongs to another model or mask.
    """
    from diffctrl.length import read, tuned
    from diffctrl.pipelines.length import check_base, find

    if source.kind.frame_rule is None:
        raise BadRequestError(f"--lora {name} makes clips longer, and {source.name} draws pictures")
    path = find(name)
    lora = read(path)
    model = source.skeleton(source.kind.denoiser)
    check_base(lora, type(model).__name__, dict(model.config), path)
    radial = next((spec for spec in controls if spec.method == "radial"), None)
    warnings = []
    if radial is not None and lora.radial is None:
        raise BadRequestError(
            f"--lora {name} was trained with dense attention; leave --method radial out, or load it from "
            "Python with strict=False"
        )
    if radial is not None and lora.radial is not None:
        _, against = tuned(_config(radial), lora.radial, {key.rpartition(".")[2] for key in given})
        if against:
            raise BadRequestError(
                f"--set {against[0]}: this mask is not the one of --lora {name}; leave the setting out"
            )
    if radial is None and lora.radial is not None:
        warnings.append(f"--lora {name} was trained under a radial mask; add --method radial")
    return LoraSpec(name=name, sha256=hashlib.sha256(path.read_bytes()).hexdigest()), warnings


def _config(spec: ControlSpec) -> Any:
    from diffctrl.methods import METHODS

    return METHODS[spec.method].config_class()(**spec.settings)
