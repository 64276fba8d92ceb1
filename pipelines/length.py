"""Length LoRAs on pipelines: weights and mask together, and a word where one runs without the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffctrl
from diffctrl.control import ControlHandle
from diffctrl.control.install import denoisers, sites_of
from diffctrl.errors import BadRequestError, nearest
from diffctrl.families import Site, family_of
from diffctrl.length import (
    Base,
    LengthLoRA,
    Loaded,
    at_work,
    mark,
    marked,
    merged,
    read,
    read_weights,
    unmark,
)
from diffctrl.processors import RadialAttnProcessor

logger = logging.getLogger("diffctrl.length")

# Weights that were trained further stay nearly parallel to what they were; others are at random angles.
_SAME_WEIGHTS = 0.9
_SAMPLED = 64
_WATCH = "_diffctrl_length_watch"


def find(source: str | Path) -> Path:
    """The file of a length LoRA: an embedded one by its name, a file, or a folder that holds one.

    Raises:
        BadRequestError: there is no such LoRA.
    """
    from diffctrl.zoo import registry

    embedded = registry.loras()
    if str(source) in embedded:
        return embedded[str(source)]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        files = [file for file in files if file.stem != "checkpoint"]
        if len(files) != 1:
            raise BadRequestError(f"the folder {source} holds {len(files)} LoRA files; name the one to load")
        return files[0]
    if not path.is_file():
        known = f" ({', '.join(embedded)})" if embedded else ""
        raise BadRequestError(
            f"there is no length LoRA {str(source)!r}{nearest(str(source), embedded)}: it is no embedded "
            f"one{known} and no file; `diffctrl train-length-lora` trains one"
        )
    return path


def load_length_lora(
    pipe: Any,
    source: str | Path,
    *,
    adapter_name: str = "length",
    mask: bool = True,
    strict: bool = True,
    **settings: Any,
) -> ControlHandle | None:
    """Load a LoRA for longer videos, and put on the mask that it was trained under.

    ```python
    control = load_length_lora(pipe, "length-4x")
    video = pipe("a red ball rolls to the left", num_frames=129).frames
    pipe.load_lora_weights("style.safetensors", adapter_name="style")  # a second adapter, as usual
    pipe.set_adapters(["length", "style"])
    ```

    Adapters that are active stay active. Fuse with `pipe.fuse_lora()` if wanted: the mask stays.

    Args:
        pipe: a diffusers pipeline of a video model. Ready pipelines of Radial Attention have this function
            as a method, and keep the mask for all calls.
        source: name of an embedded LoRA, a file of `diffctrl train-length-lora`, or a folder that holds one.
        adapter_name: as in `pipe.load_lora_weights`.
        mask: whether to put on the mask; without it, apply a `RadialAttnProcessor` of your own later.
        strict: refuse masks and weights that do not belong to the LoRA; else they are warned of.
        settings: of `RadialConfig`, e.g. `dense_steps`.

    Returns:
        The handle of the mask; None for a ready pipeline, which holds it as `pipe.control`, for a LoRA that
        was trained with dense attention, and without `mask`.

    Raises:
        BadRequestError: there is no such LoRA, or it was trained on another model.
        ValueError: a setting or a mask that is on contradicts the LoRA, the pipeline has a length LoRA, or an
            adapter has this name already.
        RuntimeError: the pipeline is under a control of `diffctrl.apply`; remove it first, or say mask=False.
    """
    path = find(source)
    lora = read(path)
    model = _one_denoiser(pipe)
    check_base(lora, type(model).__name__, dict(model.config), path)
    if (complaint := unlike(lora, model, path)) is not None:
        if strict:
            raise BadRequestError(f"{complaint}; load the LoRA with strict=False to try it all the same")
        logger.warning("%s", complaint)
    if settings and (not mask or lora.radial is None):
        raise BadRequestError(f"{', '.join(settings)} change a mask, and none is put on here")
    sites = adapted(model)
    modules = [site.module for site in sites]
    if (other := marked(modules[0])) is not None:
        raise ValueError(
            f"this pipeline has the length LoRA {other.adapter!r}; unload_length_lora(pipe) takes it off"
        )
    weights, metadata = read_weights(path)
    _add_adapter(pipe, model, weights, metadata, adapter_name)
    mark(modules, Loaded(lora=lora, adapter=adapter_name, strict=strict))
    _watch(model, modules[0])
    try:
        if mask and lora.radial is not None:
            return _put_mask_on(pipe, settings)
        for control in getattr(modules[0].processor, "controls", ()):
            control.check(sites)  # a mask that was put on before may not be the LoRA's
        return None
    except BaseException:
        unload_length_lora(pipe)
        raise


def unload_length_lora(pipe: Any) -> None:
    """Take the LoRA off, other adapters and the mask stay.

    Raises:
        ValueError: the pipeline has none, or it is fused.
    """
    model = _one_denoiser(pipe)
    modules = [site.module for site in adapted(model)]
    loaded = marked(modules[0])
    if loaded is None:
        raise ValueError("this pipeline has no length LoRA; `load_length_lora` loads one")
    if any(merged(module, loaded.adapter) for module in modules):
        raise ValueError(f"the length LoRA {loaded.adapter!r} is fused; call `pipe.unfuse_lora()` first")
    unmark(modules)
    if handle := vars(model).pop(_WATCH, None):
        handle.remove()
    model.delete_adapters(loaded.adapter)


class LengthLoRAMixin:
    """Mixed in before `ControlledPipelineMixin`: the same as methods, with the mask kept on the pipeline."""

    def load_length_lora(self, source: str | Path, **options: Any) -> None:
        """Load a LoRA for longer videos, and put on the mask that it was trained under; see
        `diffctrl.pipelines.length.load_length_lora`."""
        load_length_lora(self, source, **options)

    def unload_length_lora(self) -> None:
        """Take the LoRA off, other adapters and the mask stay."""
        unload_length_lora(self)


def base_of(model: nn.Module, name: str) -> Base:
    """What identifies a transformer, for the file of a LoRA that is trained on it."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return Base(name=name, class_name=type(model).__name__, config=config, sample=tuple(sample_of(model)))


def sample_of(model: nn.Module) -> list[float]:
    """Some weights of the first query projection, evenly spaced; none of quantised or absent ones."""
    layer: Any = next(module.to_q for site in adapted(model) if hasattr(module := site.module, "to_q"))
    weight = getattr(layer, "base_layer", layer).weight
    if not weight.is_floating_point() or weight.device.type == "meta":
        return []
    flat = weight.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), device=flat.device).long()
    return flat[places].float().tolist()


def adaptable(family: Any, sites: Sequence[Site]) -> list[Site]:
    """Self- and joint attention of the main blocks: where a length LoRA acts, and the mask."""
    return [site for site in sites if site.kind in ("self", "joint") and site.stack in family.stacks]


def check_base(lora: LengthLoRA, class_name: str, config: dict[str, Any], path: Path) -> None:
    """Refuse a LoRA of another architecture; needs no weights.

    Raises:
        BadRequestError: the LoRA was trained on another one.
    """
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    if differences := lora.base.differences(class_name, plain):
        raise BadRequestError(
            f"{path.name} does not fit this model: {', '.join(differences[:4])}; it was trained on "
            f"{lora.base.name}"
        )


def unlike(lora: LengthLoRA, model: nn.Module, path: Path) -> str | None:
    """That the LoRA was trained on other weights of the same architecture, in words; None if it was not."""
    likeness = lora.base.likeness(sample_of(model))
    if likeness >= _SAME_WEIGHTS:
        return None
    return (
        f"{path.name} was trained on other weights than these, those of {lora.base.name} "
        f"(likeness {likeness:.2f})"
    )


def _one_denoiser(pipe: Any) -> Any:
    models = denoisers(pipe)
    if len(models) > 1:
        raise BadRequestError(
            f"{type(pipe).__name__} has {len(models)} denoisers that take turns; length LoRAs are for one"
        )
    (model,) = models.values()
    if not hasattr(model, "load_lora_adapter"):
        raise BadRequestError(f"{type(model).__name__} takes no LoRA in diffusers")
    return model


def adapted(model: nn.Module) -> list[Site]:
    """Sites whose attention can be adapted, under a control or not."""
    return adaptable(family_of(model), sites_of(model))


def _add_adapter(pipe: Any, model: Any, weights: dict[str, Any], metadata: dict[str, Any], name: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = list(model.active_adapters()) if getattr(model, "peft_config", None) else []
    model.load_lora_adapter(
        weights,
        adapter_name=name,
        metadata=metadata,
        _pipeline=pipe if hasattr(pipe, "components") else None,
    )
    # diffusers leaves only the last one active, and its own function for several resets their strengths.
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([*before, name])
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.requires_grad_(False)


def _put_mask_on(pipe: Any, settings: dict[str, Any]) -> ControlHandle | None:
    if not isinstance(pipe, LengthLoRAMixin):
        return diffctrl.apply(pipe, RadialAttnProcessor(**settings))
    ready: Any = pipe
    installed = [] if ready.control is None else list(ready.control.controls)
    masks = [control for control in installed if isinstance(control, RadialAttnProcessor)]
    mask = masks[0].changed(**settings) if masks else RadialAttnProcessor(**settings)
    ready.set_attn_processor([*(control for control in installed if control not in masks), mask])
    return None


def _watch(model: Any, module: nn.Module) -> None:
    """Say once, before a forward, that the LoRA is at work without the mask that it was trained under."""
    said = False

    def before(_: nn.Module, args: tuple) -> None:
        nonlocal said
        loaded = at_work(module)
        controls = getattr(module.processor, "controls", ())
        bare = loaded is not None and loaded.lora.radial is not None
        bare = bare and not any(control.method == "radial" for control in controls)
        if bare and not said:
            logger.warning(
                "the length LoRA %r runs without the mask that it was trained with; put it on with "
                "diffctrl.apply(pipe, RadialAttnProcessor())",
                loaded.adapter if loaded else "",
            )
        said = bare

    if handle := vars(model).pop(_WATCH, None):
        handle.remove()
    vars(model)[_WATCH] = model.register_forward_pre_hook(torch.compiler.disable(before))
