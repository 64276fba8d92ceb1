"""Controls on language models of transformers: installed through its registry of attention functions.

The registry is global, so nothing of a control is in it: one function for each implementation that was there
before, which finds the control on the attention module, and runs that implementation where there is none.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffctrl.control.control import Control
from diffctrl.control.install import _SITE, ControlHandle
from diffctrl.families.text import TextModel, TextSite, text_model


class TextState(Protocol):
    """What a control keeps for one language model: where a generation is, and what it needs of it."""

    def begin(
        self,
        prompt_lengths: Tensor,
        gen_length: int,
        steps: int,
        left_padding: Tensor | None = None,
        **more: Any,
    ) -> None:
        """A generation begins."""
        ...

    def set_step(self, step: int, **more: Any) -> None:
        """The next forwards belong to this step."""
        ...

    def reset(self) -> None:
        """The generation is over."""
        ...

    def prepare(self, batch: int, tokens: int, device: torch.device, mask: Tensor | None) -> None:
        """A forward of (batch, tokens) begins; mask bool or integer (B, S) or None."""
        ...

    def layer(self, index: int) -> Any:
        """What `attend` is given for a layer: no number, which compiled code would be compiled for."""
        ...

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (B, S, H, D), key and value (B, S, Hkv, D) -> (B, S, H, D)."""
        ...

    def stats(self) -> dict[str, Any]:
        """What was done."""
        ...


class TextControl(Control, ABC):
    """Base of the processors for language models. The object is never written to; `state` makes what is."""

    @abstractmethod
    def state(self, model: TextModel) -> Any:
        """A `TextState` for one model that this control is applied to."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """An attention function of transformers: query (B, H, S, D), key and value (B, Hkv, S, D); returns
        (B, S, H, D) and no weights."""
        bound: _Bound | None = getattr(module, _SITE, None)
        if bound is None:
            raise RuntimeError(
                f"this {type(module).__name__} is under no control; use diffctrl.apply(model, processor)"
            )
        if kwargs.get("output_attentions"):
            raise ValueError(f"{self.method} forms no attention weights; leave output_attentions out")
        if dropout:
            raise ValueError(f"{self.method} is for inference, without attention dropout; call model.eval()")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return bound.state.attend(bound.layer, q, k, v, scale), None


@dataclass(slots=True, eq=False)
class _Bound:
    """What an attention module under a control carries."""

    site: TextSite
    control: TextControl
    state: Any
    layer: Any


# --- the registry of transformers ---------------------------------------------------------------------------

# Implementation that was set before -> the name under which ours is registered over it.
_NAMES: dict[str, str] = {}


def _name_over(previous: str) -> str:
    """The name of our attention function for models that ran `previous`; registered once per process."""
    if previous in _NAMES.values():  # a copy of a config that was under a control
        return previous
    if previous not in _NAMES:
        from transformers import AttentionInterface, AttentionMaskInterface

        # A number, not the name itself: transformers looks for "flash" and "sdpa" in names.
        name = f"diffctrl-{len(_NAMES)}"
        AttentionInterface.register(name, _attention_over(previous))
        AttentionMaskInterface.register(name, _mask)
        _NAMES[previous] = name
    return _NAMES[previous]


def _attention_over(previous: str) -> Any:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        bound: _Bound | None = getattr(module, _SITE, None)
        if bound is not None:
            return bound.control(module, query, key, value, attention_mask, **kwargs)
        # A second model made from the same config object, which is under no control.
        mask = _stock_mask(previous, module, query, attention_mask)
        return _stock(previous, module)(module, query, key, value, mask, **kwargs)

    return attention


def _mask(*, mask_function: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The 2D mask as it is, or None: at 64k tokens the stock (B, 1, S, S) takes 4 GB a row."""
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            "this model asks for a causal, windowed or otherwise shaped mask; a control of "
            "diffctrl needs attention in both directions over all tokens: model.config.is_causal "
            "= False, and no mask of pairs"
        )
    return attention_mask


def _stock(previous: str, module: nn.Module) -> Any:
    from transformers import AttentionInterface

    if previous == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return AttentionInterface()[previous]


def _stock_mask(previous: str, module: nn.Module, query: Tensor, mask: Tensor | None) -> Tensor | None:
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function

    make = AttentionMaskInterface().get(previous)
    if make is None or (mask is not None and mask.ndim != 2):
        return mask
    return make(
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=query.shape[2],
        q_offset=0,
        kv_offset=0,
        mask_function=bidirectional_mask_function,
        attention_mask=mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
        dtype=query.dtype,
        config=module.config,
        device=query.device,
    )


class _Implementation:
    """The attention implementation of one config object, which several models may share."""

    _held: dict[int, _Implementation] = {}  # noqa: RUF012 - shared on purpose, keyed by the config it holds

    def __init__(self, config: Any) -> None:
        self.config, self.previous = config, config._attn_implementation
        self.name = _name_over(self.previous or "sdpa")
        self.users = 0

    @classmethod
    def of(cls, config: Any) -> _Implementation:
        return cls._held.get(id(config)) or cls(config)

    def take(self, model: Any) -> None:
        if self.users == 0:
            model.set_attn_implementation(self.name)
            self._held[id(self.config)] = self
        self.users += 1

    def leave(self) -> None:
        self.users -= 1
        if self.users == 0:
            del self._held[id(self.config)]
            # As it was, without the checks of a new choice; not where the user made one since.
            if self.config._attn_implementation == self.name:
                self.config._attn_implementation = self.previous


# --- applying -----------------------------------------------------------------------------------------------


class _TextAttachment:
    """One language model under a control; takes off exactly what it put on."""

    def __init__(self, model: Any, control: TextControl) -> None:
        if any(hasattr(module, _SITE) for module in model.modules()):
            raise RuntimeError(
                f"{type(model).__name__} is already under a control; call `.remove()` on "
                "its handle before applying another"
            )
        self.text = text_model(model)
        self.name, self.model, self.control = self.text.name, model, control
        self.state = control.state(self.text)
        self._implementation = _Implementation.of(model.config)
        self._signature = inspect.signature(self.text.base.forward)
        self._hook: Any = None

    def open(self) -> None:
        for site in self.text.sites:
            setattr(site.module, _SITE, _Bound(site, self.control, self.state, self.state.layer(site.layer)))
        self._implementation.take(self.model)
        before: Any = torch.compiler.disable(self._before)
        self._hook = self.text.base.register_forward_pre_hook(before, with_kwargs=True)

    reopen = open

    def close(self) -> None:
        for site in self.text.sites:
            if hasattr(site.module, _SITE):
                delattr(site.module, _SITE)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._implementation.leave()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        self._check(given)
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given.get("inputs_embeds")
        if inputs is None:
            return  # the model says what is missing
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{self.control.method} takes an attention_mask (B, S) that says which tokens "
                f"are padding, not {kind}: no S x S mask is made"
            )
        self.state.prepare(inputs.shape[0], inputs.shape[1], inputs.device, mask)

    def _check(self, given: dict[str, Any]) -> None:
        config = self.model.config
        use_cache = given.get("use_cache")
        # transformers 5.24 calls `cache` what was `past_key_values`.
        cached = given.get("past_key_values") is not None or given.get("cache") is not None
        if cached or (config.use_cache if use_cache is None else use_cache):
            raise ValueError(
                f"{self.control.method} works without a cache of keys and values: the queries "
                "of a step are all tokens. Leave past_key_values and use_cache out, and "
                "set model.config.use_cache = False"
            )
        if config._attn_implementation != self._implementation.name:
            raise RuntimeError(
                f"{self.name} runs attention {config._attn_implementation!r} instead of what diffctrl put "
                "there, so that the control would do nothing; `remove()` the control first, then change it"
            )


class TextControlHandle(ControlHandle):
    """What `apply` returns for a language model: the generation's state, statistics, and the way back."""

    def __init__(self, attachments: list[_TextAttachment], controls: Sequence[Control]) -> None:
        super().__init__(attachments, controls)  # type: ignore[arg-type]
        self._texts = attachments

    @property
    def contexts(self) -> dict[str, Any]:
        """Empty: contexts are of denoisers; see `controller`."""
        return {}

    @property
    def controller(self) -> Any:
        """The state of the control on this model."""
        return self._texts[0].state

    def begin(
        self,
        prompt_lengths: Tensor,
        gen_length: int,
        steps: int,
        left_padding: Tensor | None = None,
        **more: Any,
    ) -> None:
        """A generation begins; called by samplers.

        Args:
            prompt_lengths: integer (B,), real prompt tokens of each row.
            gen_length: tokens to generate.
            steps: denoising steps.
            left_padding: integer (B,), or None where no row is padded.
            more: what the control knows besides.
        """
        self.controller.begin(prompt_lengths, gen_length, steps, left_padding, **more)

    def set_step(self, step: int, **more: Any) -> None:
        """The next forwards belong to this step."""
        self.controller.set_step(step, **more)

    def reset(self) -> None:
        """The generation is over. Statistics can still be read."""
        self.controller.reset()

    def stats(self) -> dict[str, Any]:
        """By model class: family, control, attention modules under control, and what the control did."""
        return {
            text.name: {
                "family": text.text.family.name,
                "controls": [control.describe() for control in self.controls],
                "sites": len(text.text.sites),
                **text.state.stats(),
            }
            for text in self._texts
        }


def apply_text(model: Any, controls: Sequence[Control]) -> TextControlHandle:
    """`diffctrl.apply` for a language model.

    Raises:
        TypeError: the model's class is not supported, or the processor is not for language models.
        ValueError: more than one processor, or a model that is causal or keeps a cache.
        RuntimeError: the model is already under a control.
    """
    names = ", ".join(control.method for control in controls)
    for control in controls:
        if not isinstance(control, TextControl):
            raise TypeError(f"{control.method} does not work on language models; SparseDAttnProcessor does")
    if len(controls) != 1:
        raise ValueError(f"a language model takes one processor; {len(controls)} were given ({names})")
    (control,) = controls
    assert isinstance(control, TextControl)
    attachment = _TextAttachment(model, control)
    if control.families is not None and attachment.text.family.name not in control.families:
        raise TypeError(
            f"{control.method} does not support {attachment.text.family.title}; it supports "
            f"{', '.join(control.families)}"
        )
    try:
        attachment.open()
    except BaseException:
        attachment.close()
        raise
    return TextControlHandle([attachment], controls)


def state_of(model: nn.Module) -> Any:
    """The `TextState` of the control that a language model is under, or None."""
    bound = (getattr(module, _SITE, None) for module in model.modules())
    return next((each.state for each in bound if each is not None), None)


def summary_text(model: Any) -> str:
    """What is active on a language model, in one or two lines."""
    carried = [getattr(module, _SITE) for module in model.modules() if hasattr(module, _SITE)]
    name = type(model).__name__
    if not carried:
        return f"{name}: stock attention ({model.config._attn_implementation})"
    first, last = carried[0].site.name, carried[-1].site.name
    return f"{name}: {len(carried)} attention modules\n  {carried[0].control.describe()}: {first} .. {last}"
