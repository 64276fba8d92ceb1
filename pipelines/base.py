"""What every ready pipeline adds to a stock one: controls that stay on it, and controls for one call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        """The handle of what `set_attn_processor` installed, or None."""
        return self._handle

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
        if self._handle is not None:
            controls = self._handle.controls
            self._handle.remove()
            self._handle = None
        return controls

    def _put_back(self, controls: tuple[Any, ...]) -> None:
        if controls:
            self._handle = diffctrl.apply(self, list(controls))

    def _controlled_from_outside(self) -> bool:
        """Whether `diffctrl.apply(pipe, ...)` rules this pipeline already."""
        models = denoisers(self).values()
        return self._handle is None and any(hasattr(m, "diffctrl_site") for x in models for m in x.modules())

    def to_json_string(self) -> str:
        """The pipeline's model_index.json, under the stock class's name."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = self.stock_class.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def joined_signature(stock: Callable[..., Any], own: Callable[..., Any]) -> inspect.Signature:
    """The stock call's signature with the keyword-only parameters of `own` at its end (before `**kwargs`)."""
    signature = inspect.signature(stock)
    extra = [p for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [*signature.parameters.values(), *extra]
    return signature.replace(parameters=sorted(parameters, key=lambda p: p.kind))  # a stable sort
