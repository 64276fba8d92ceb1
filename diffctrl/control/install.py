"""Install controls on a model and take them off again: `apply`, `attach`, `set_attn_processor`, `summary`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from diffctrl.control.blocks import around_block, block_name
from diffctrl.control.context import BatchLayout, Context
from diffctrl.control.control import Control, check_composition, check_control
from diffctrl.control.hooks import ContextHook
from diffctrl.families import Site, family_of
from diffctrl.families.text import is_text_model

_SITE = "diffctrl_site"
_KEPT = "diffctrl_stock_processor"
# The denoisers of diffusers' pipelines, in the order in which they run.
_DENOISERS = ("transformer", "transformer_2", "unet")


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The controllable models of a pipeline or a bare model, by component name.

    Raises:
        TypeError: the target is neither.
    """
    if isinstance(target, nn.Module):
        target = getattr(target, "_orig_mod", target)
        return {type(target).__name__: target}
    found = {}
    for name in _DENOISERS:
        model = getattr(target, name, None)
        if isinstance(model, nn.Module):
            found[name] = getattr(model, "_orig_mod", model)
    if not found:
        raise TypeError(
            f"diffctrl cannot control a {type(target).__name__}: pass a diffusers pipeline with one of "
            f"{', '.join(_DENOISERS)}, or a bare transformer or UNet"
        )
    return found


def sites_of(model: nn.Module) -> list[Site]:
    """The attention modules of a supported model, under a control or not.

    Raises:
        TypeError: the model, or a processor that it carries, is not supported.
    """
    controlled = [getattr(module, _SITE) for module in model.modules() if hasattr(module, _SITE)]
    return controlled or family_of(model).sites(model)


class _Attachment:
    """One model with its sites and context hook; removes exactly what it added."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        pipe: Any,
        scheduler: Any,
        batch_layout: BatchLayout | None,
        experts: int,
    ) -> None:
        if any(_SITE in vars(module) for module in model.modules()):
            raise RuntimeError(
                f"{name} is already under a control; call `.remove()` on its handle before applying another, "
                "or pass all processors in one list"
            )
        self.name, self.model = name, model
        self.family = family_of(model)
        self.sites: list[Site] = self.family.sites(model)
        self.context = Context(name, {site.name: site for site in self.sites}, experts=experts)
        self._hook = ContextHook(self.family, self.sites, self.context, pipe, scheduler, batch_layout)
        self._bound: list[tuple[Site, Any]] = []
        self._installed: list[tuple[Site, Any]] = []
        self._block_hooks: list[Any] = []

    def open(self) -> None:
        for site in self.sites:
            site.context = self.context
            setattr(site.module, _SITE, site)
        self._hook.register(self.model)

    def install(self, controls: Sequence[Control]) -> None:
        selected = [{site.name for site in control.select(self.sites)} for control in controls]
        for site in self.sites:
            acting = [c for c, names in zip(controls, selected, strict=True) if site.name in names]
            if not acting:
                continue
            bound: Any = copy.copy(acting[0])  # one object per layer, so that a backend can be set per layer
            bound.controls = tuple(acting)
            bound._attention_backend = getattr(site.stock, "_attention_backend", None)
            bound._parallel_config = self._parallel_config(site)
            self._bound.append((site, bound))
        self._put_on()

    def _parallel_config(self, site: Site) -> Any:
        """As the stock processor has it; some (Mochi's, CogVideoX's) are passed over where it is enabled."""
        if hasattr(site.stock, "_parallel_config"):
            return site.stock._parallel_config
        config = getattr(self.model, "_parallel_config", None)
        return config if getattr(config, "context_parallel_config", None) is not None else None

    def _put_on(self) -> None:
        for site, bound in self._bound:
            self._installed.append((site, site.module.processor))
            _carry(site.module, bound)
            site.installed = bound
            acting = [control for control in bound.controls if control.contributes.blocks]
            if acting:
                block = self.model.get_submodule(block_name(site))
                self._block_hooks += around_block(block, site, acting)

    def reopen(self) -> None:
        """Put the same processor objects on again after `close`: compiled blocks keep their graphs."""
        for site in self.sites:
            if site.module.processor is not site.stock:
                raise RuntimeError(
                    f"{site.name} of {self.name} carries another {type(site.module.processor).__name__} than "
                    "when the control was made; `diffctrl.apply` again for a new one"
                )
        self.open()
        self._put_on()

    def close(self) -> None:
        for handle in self._block_hooks:
            handle.remove()
        self._block_hooks = []
        for site, previous in self._installed:
            _carry(site.module, previous)
            site.installed = None
        self._installed.clear()
        for site in self.sites:
            # Set by hand on an attached model; without a context it could not run.
            if isinstance(site.module.processor, Control):
                _carry(site.module, site.stock)
            if hasattr(site.module, _SITE):
                delattr(site.module, _SITE)
        self._hook.remove()


def _carry(module: nn.Module, processor: Any) -> None:
    """Put a processor on an attention module.

    A processor with weights of its own (an adapter's) is a child of the module. While another one is on, it
    stays a child under another name, so that it moves with the model.
    """
    previous: Any = module.processor
    module._modules.pop(_KEPT, None)
    if isinstance(previous, nn.Module):
        del module._modules["processor"]
        if not isinstance(processor, nn.Module):
            module.add_module(_KEPT, previous)
    module.processor = processor


class ControlHandle:
    """What `apply` and `attach` return: statistics, and the way back. Also a context manager."""

    def __init__(self, attachments: list[_Attachment], controls: Sequence[Control]) -> None:
        self._attachments = attachments
        self.controls = tuple(controls)
        self._open = True

    def __enter__(self) -> ControlHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open:
            self.remove()

    @property
    def is_on(self) -> bool:
        """Whether the control acts: not after `remove()`, until `resume()`."""
        return self._open

    def remove(self) -> None:
        """Put the same processor objects back, also for ours that were set by hand, and take the hooks off.

        Raises:
            RuntimeError: it was removed before.
        """
        if not self._open:
            raise RuntimeError("this control was removed before; `diffctrl.apply` again for a new one")
        self._open = False
        for attachment in self._attachments:
            attachment.close()

    def resume(self) -> None:
        """Put a removed control on again, with the same processor objects.

        Raises:
            RuntimeError: it is on, or the model has got other processors or another control meanwhile.
        """
        if self._open:
            raise RuntimeError("this control is on; `remove()` takes it off")
        for attachment in self._attachments:
            if any(hasattr(module, _SITE) for module in attachment.model.modules()):
                raise RuntimeError(f"{attachment.name} is under another control; `.remove()` that one first")
        self._open = True
        for attachment in self._attachments:
            try:
                attachment.reopen()
            except BaseException:
                self.remove()
                raise

    @property
    def contexts(self) -> dict[str, Context]:
        """The context of each controlled model, by component name."""
        return {attachment.name: attachment.context for attachment in self._attachments}

    def stats(self) -> dict[str, Any]:
        """Per model: sites under control, forwards, twin forwards, and what the engine ran."""
        return {
            attachment.name: {
                "family": attachment.family.name,
                "controls": [control.on(attachment.sites).describe() for control in self.controls],
                "sites": len(attachment.sites),
                "controlled": len(attachment._installed),
                "forwards": attachment.context.forwards,
                "guided_forwards": attachment.context.twin_forwards,
                "masked_forwards": attachment.context.masked_forwards,
                **attachment.context.stats.as_dict(),
            }
            for attachment in self._attachments
        }


def _open(target: Any, scheduler: Any, batch_layout: BatchLayout | None) -> list[_Attachment]:
    pipe = None if isinstance(target, nn.Module) else target
    models = denoisers(target)
    return [
        _Attachment(name, model, pipe, scheduler, batch_layout, len(models)) for name, model in models.items()
    ]


def attach(target: Any, *, scheduler: Any = None, batch_layout: BatchLayout | None = None) -> ControlHandle:
    """Publish the context of every forward, so that `model.set_attn_processor(...)` works with our
    processors.

    Args:
        target: a diffusers pipeline or a bare denoiser.
        scheduler: where the step index is read; a pipeline's own by default.
        batch_layout: what the batch rows are; read off the pipeline by default, "cond" for a bare model.

    Raises:
        TypeError: the model, or a processor that it carries, is not supported.
        RuntimeError: the model is already under a control.
    """
    attachments = _open(target, scheduler, batch_layout)
    for attachment in attachments:
        attachment.open()
    return ControlHandle(attachments, ())


def apply(
    target: Any,
    processors: Any,
    *,
    scheduler: Any = None,
    batch_layout: BatchLayout | None = None,
) -> ControlHandle:
    """Put one or several controls on a pipeline, a bare denoiser or a language model of transformers.

    Args:
        target: a diffusers pipeline, a bare transformer or UNet, a diffusion language model of transformers,
            or a pipeline with one as its `model`.
        processors: one processor of `diffctrl.processors`, or a list whose controls are composed in order.
        scheduler: where the step index is read; a pipeline's own by default.
        batch_layout: what the batch rows are: "cond", "uncond", "uncond_cond", or "perturbed" for the twins
            of a guidance that is computed elsewhere; read off the pipeline by default, "cond" for a bare
            model.

    Returns:
        A handle with `stats()` and `remove()`, which is also a context manager. Of a language model it has
        `begin`, `set_step` and `reset` for the sampler as well.

    Raises:
        TypeError: the model, a processor that it carries, or an argument is not supported.
        ValueError: the controls cannot be combined, or do not fit the model.
        RuntimeError: the model is already under a control.
    """
    controls = list(processors) if isinstance(processors, (list, tuple)) else [processors]
    for control in controls:
        if not isinstance(control, Control) or not callable(control):
            raise TypeError(
                f"diffctrl.apply got a {type(control).__name__}; it takes processors of diffctrl.processors "
                "(e.g. SoftPAGAttnProcessor()), one or a list"
            )
    if not controls:
        raise ValueError("diffctrl.apply got an empty list of processors; pass at least one")
    language_model = _language_model(target)
    if language_model is not None:
        from diffctrl.control.text import apply_text

        if scheduler is not None or batch_layout is not None:
            raise ValueError("scheduler and batch_layout are for denoisers; a language model takes neither")
        return apply_text(language_model, controls)
    check_composition(controls)
    attachments = _open(target, scheduler, batch_layout)
    for attachment in attachments:
        for control in controls:
            check_control(control, attachment.family, attachment.sites)
    try:
        for attachment in attachments:
            attachment.open()
            attachment.install(controls)
    except BaseException:
        for attachment in attachments:
            attachment.close()
        raise
    return ControlHandle(attachments, controls)


def _language_model(target: Any) -> Any:
    """A model of transformers, or the `model` of a pipeline that holds one; None for everything else."""
    held = target if isinstance(target, nn.Module) else getattr(target, "model", None)
    held = getattr(held, "_orig_mod", held)
    return held if is_text_model(held) else None


def context_parallel_plan(model: nn.Module) -> dict[str, Any]:
    """A plan for `model.enable_parallelism(config=..., cp_plan=...)` under which block lists work (Ulysses).

    diffusers has plans for Wan and LTX-Video, which are returned as they are. With ours, the text is whole on
    every device, which the stock processors of these models do not expect: put a control on the model before
    it runs, and keep it on.

    Raises:
        TypeError: the model has no family, or cannot be split by a plan.
    """
    model = getattr(model, "_orig_mod", model)
    return family_of(model).parallel_plan(model)


def set_attn_processor(target: Any, processor: Any) -> ControlHandle:
    """`model.set_attn_processor` for any pipeline or model, Mochi included: the same as `apply`."""
    return apply(target, processor)


def summary(target: Any) -> str:
    """What is active on a pipeline or model, where: one line per model and per control."""
    language_model = _language_model(target)
    if language_model is not None:
        from diffctrl.control.text import summary_text

        return summary_text(language_model)
    lines = []
    for name, model in denoisers(target).items():
        sites = [getattr(m, _SITE) for m in model.modules() if hasattr(m, _SITE)]
        if not sites:
            lines.append(f"{name} ({type(model).__name__}): stock attention")
            continue
        carried = {c: None for s in sites for c in getattr(s.module.processor, "controls", ())}
        lines.append(f"{name} ({type(model).__name__}): {len(sites)} attention modules")
        for control in carried:
            where = [
                site.name
                for site in control.select(sites)
                if control in getattr(site.module.processor, "controls", ())
            ]
            span = f", {where[0]} .. {where[-1]}" if where else ""
            lines.append(f"  {control.describe()}: {len(where)} modules{span}")
        if not carried:
            lines.append("  context attached, no control active")
    return "\n".join(lines)
