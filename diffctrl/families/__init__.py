"""Model families, found by the exact class of the model. A family is imported when its model is met."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from diffctrl.families.base import Call, Family, ForwardInfo, Inputs, Route, Site, Span

__all__ = [
    "FAMILIES",
    "Call",
    "Family",
    "ForwardInfo",
    "Inputs",
    "Route",
    "Site",
    "Span",
    "family_of",
    "load_family",
]

# Model class (module-independent qualified name) -> where its family lives. The class object itself is
# compared after the import, so a same-named class of another library is refused.
FAMILIES: dict[str, str] = {
    "SD3Transformer2DModel": "diffctrl.families.sd3:SD3Family",
    "FluxTransformer2DModel": "diffctrl.families.flux:FluxFamily",
    "UNet2DConditionModel": "diffctrl.families.unet:UNetFamily",
    "WanTransformer3DModel": "diffctrl.families.wan:WanFamily",
    "WanVACETransformer3DModel": "diffctrl.families.wan_vace:WanVACEFamily",
    "HunyuanVideoTransformer3DModel": "diffctrl.families.hunyuan_video:HunyuanVideoFamily",
    "HunyuanVideo15Transformer3DModel": "diffctrl.families.hunyuan_video15:HunyuanVideo15Family",
    "MochiTransformer3DModel": "diffctrl.families.mochi:MochiFamily",
    "CogVideoXTransformer3DModel": "diffctrl.families.cogvideox:CogVideoXFamily",
    "LTXVideoTransformer3DModel": "diffctrl.families.ltx:LTXFamily",
}


def load_family(class_name: str) -> Family:
    """The family registered for a model class of this name.

    Raises:
        KeyError: no family is registered for the name.
    """
    module, _, attribute = FAMILIES[class_name].partition(":")
    return getattr(import_module(module), attribute)()


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its exact class.

    Raises:
        TypeError: the class has no family.
    """
    name = type(model).__name__
    family = load_family(name) if name in FAMILIES else None
    if family is None or type(model) is not family.model_class():
        raise TypeError(
            f"diffctrl does not know the model class {type(model).__module__}.{name}; it supports "
            f"{', '.join(sorted(FAMILIES))} of diffusers. Pass one of these, or a pipeline that holds one."
        )
    return family
