"""What every ready pipeline adds to a stock one: controls that stay on it, and controls for one call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

import diffctrl
from diffctrl.control import ControlHandle
from diffctrl.control.install import denoisers


class ControlledPipelineMixin:
    """Mixed in before a stock pipeline class, which it leaves as it is.

    A saved pipeline carries the stock class's name, so that diffusers alone loads it again.
    """

    stock_class: ClassVar[type]
    _handle: ControlHandle | None = None

    @property
    def control(self) -> ControlHandle | None:
        """The handle of what `set_attn_processor` installed; None without one, and while it is removed."""
        return self._handle if self._handle is not None and self._handle.is_on else None

    def set_attn_processor(self, processor: Any) -> None:
        """Control every call from now on.

        Args:
            processor: one processor of `diffctrl.processors`, a list that composes, or None for stock.

        Raises:
            TypeError, ValueError: as `diffctrl.apply`; what was installed before stays.
        """
        previous = self._take_off()
        try:
            if processor is not None:
                self._handle = diffctrl.apply(self, processor)
        except BaseException:
            self._put_back(previous)
            raise

    @contextmanager
    def _controlled(self, processors: Sequence[Any]) -> Iterator[None]:
        """These processors instead of the installed ones, for one call."""
        previous = self._take_off()
        try:
            with diffctrl.apply(self, list(processors)):
                yield
        finally:
            self._put_back(previous)

    def _take_off(self) -> tuple[Any, ...]:
        controls: tuple[Any, ...] = ()
        if self.control is not None:
            controls = self.control.controls
            self.control.remove()
        self._handle = None
        return controls

    def _put_back(self, controls: tuple[Any, ...]) -> None:
        if controls:
            self._handle = diffctrl.apply(self, list(controls))

    def _controlled_from_outside(self) -> bool:
        """Whether `diffctrl.apply(pipe, ...)` rules this pipeline already."""
        models = denoisers(self).values()
        return self.control is None and any(hasattr(m, "diffctrl_site") for x in models for m in x.modules())

    def to_json_string(self) -> str:
        """The pipeline's model_index.json, under the stock class's name."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = getattr(self, "stock_class", type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class MethodPipelineMixin(ControlledPipelineMixin):
    """Mixed in before a stock pipeline class whose call shall also take the settings of a method.

    Attributes:
        processor_class: of the method; built as `processor_class(config=settings)`.
        defaults: the settings where nothing is said; an object of the method's config class.
        call_note: a last sentence for the call's documentation.
    """

    processor_class: ClassVar[type]
    defaults: ClassVar[Any]
    call_note: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stock_class" not in vars(cls):
            return  # a method's own mixin

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it is the class's call
            return self._controlled_call(*args, **kwargs)

        config, settings = type(cls.defaults), cls._settings()
        __call__.__doc__ = (
            f"`{cls.stock_class.__name__}.__call__` with {config.__name__.removesuffix('Config')}.\n\n"
            f"Besides the stock arguments it takes those of `{config.__name__}` ({', '.join(settings)})\n"
            "for this call. What is left out comes from the installed processor, or is the default\n"
            f"without one. {cls.call_note}"
        )
        joined = joined_signature(cls.stock_class.__call__, config)
        parameters = [
            p.replace(default=getattr(cls.defaults, name)) if name in settings else p
            for name, p in joined.parameters.items()
        ]
        __call__.__signature__ = joined.replace(parameters=parameters)  # type: ignore[attr-defined]
        cls.__call__ = __call__  # type: ignore[method-assign]

    @classmethod
    def _settings(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls.defaults))

    def _controlled_call(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in self._settings() if name in kwargs}
        settings = {name: value for name, value in given.items() if value is not None}
        stock: Any = self.stock_class.__call__
        if not settings and (self.control is not None or self._controlled_from_outside()):
            return stock(self, *args, **kwargs)
        with self._controlled(self._with_settings(settings)):
            return stock(self, *args, **kwargs)

    def _with_settings(self, settings: dict[str, Any]) -> list[Any]:
        """The installed processors with the method's settings changed, or added where it is not among
        them."""
        make: Any = self.processor_class
        installed: list[Any] = [] if self.control is None else list(self.control.controls)
        for index, control in enumerate(installed):
            if isinstance(control, make):
                installed[index] = self._changed(control, settings)
                return installed
        return [*installed, self._changed(make(config=self._defaults_beside(settings)), settings)]

    def _changed(self, control: Any, settings: dict[str, Any]) -> Any:
        """A processor of the method with these settings changed."""
        return type(control)(config=replace(control.config, **settings))

    def _defaults_beside(self, settings: dict[str, Any]) -> Any:
        """What holds where these settings say nothing."""
        return self.defaults


def joined_signature(stock: Callable[..., Any], own: Callable[..., Any]) -> inspect.Signature:
    """The stock call's signature with the keyword-only parameters of `own` at its end (before `**kwargs`)."""
    signature = inspect.signature(stock)
    extra = [p for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [*signature.parameters.values(), *extra]
    return signature.replace(parameters=sorted(parameters, key=lambda p: p.kind))  # a stable sort
