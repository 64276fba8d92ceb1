"""Capture: attention weights of chosen queries and keys, reduced while a model runs, never S x S."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffctrl.attention.capture import ROUTES, CaptureResult, CaptureSpec, Route
from diffctrl.control import Context, Contributions, ControlHandle, Published, apply
from diffctrl.control.capture_task import run_task
from diffctrl.control.collector import Collector, chosen_sites
from diffctrl.control.context import BatchLayout
from diffctrl.control.control import Control
from diffctrl.families import Call, Site
from diffctrl.processors.base import ControlAttnProcessor, published

Specs = CaptureSpec | Mapping[str, CaptureSpec]
MAX_BYTES = 256 << 20


class EverythingRead(Exception):  # noqa: N818 - no error
    """Breaks a forward off after the last block that is read; see `CaptureAttnProcessor`."""


class CaptureAttnProcessor(ControlAttnProcessor):
    """Keeps what the specs ask for of the attention weights, and changes nothing.

    The weights are those that the model attends with: of queries and keys after norms and rotary embedding,
    under its masks and under the block lists of other controls. It stands in a list with other processors:
    `diffctrl.apply(pipe, [SoftPAGAttnProcessor(), captured := CaptureAttnProcessor(spec)])`.

    Args:
        specs: one spec, or several by name. Specs of the same queries, keys, rows and heads share the work.
        max_bytes: of all totals and the working memory. More is refused before a forward.
        route: "lse", "chunked" or "one_hot" (see `diffctrl.attention.capture.routes`); None for the cheapest
            of each call.
        ends_forwards: raise `EverythingRead` after the last block that a spec reads, for a caller that wants
            no output. Compiled blocks run to the end.

    Raises:
        TypeError, ValueError: an argument is not accepted.
    """

    method = "capture"

    def __init__(
        self,
        specs: Specs,
        *,
        max_bytes: int = MAX_BYTES,
        route: Route | None = None,
        ends_forwards: bool = False,
    ) -> None:
        super().__init__()
        named = specs if isinstance(specs, Mapping) else {"capture": specs}
        for name, spec in named.items():
            if not isinstance(spec, CaptureSpec):
                raise TypeError(
                    f"capture {name!r} is a {type(spec).__name__}; give a CaptureSpec, or several by name"
                )
        if not named:
            raise ValueError("capture got no spec; give a CaptureSpec, or several by name")
        if route is not None and route not in ROUTES:
            raise ValueError(f"route={route!r} is not known; accepted are None, {', '.join(ROUTES)}")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} is not accepted; give a number of bytes above 0")
        self.specs: dict[str, CaptureSpec] = dict(named)
        self._max_bytes = max_bytes
        self._route: Route | None = route
        self._ends_forwards = ends_forwards
        self._collectors: dict[int, tuple[Context, Collector]] = {}
        tells_rows = any(spec.rows != "all" for spec in self.specs.values())
        self.contributes = Contributions(tells_rows=tells_rows, reads_tokens=True)

    def describe(self) -> str:
        return f"capture({', '.join(f'{name}: {spec.quantity}' for name, spec in self.specs.items())})"

    def acts_on(self, site: Site) -> bool:
        return site.kind != "text"

    def specs_on(self, sites: Sequence[Site]) -> Mapping[str, CaptureSpec]:
        """The specs on a model with these sites; a method that reads maps may make them for each model."""
        return self.specs

    def check(self, sites: Sequence[Site]) -> None:
        self.select(sites)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        specs = self.specs_on(sites).values()
        names = {site.name for spec in specs for site in chosen_sites(spec, sites).values()}
        return [site for site in sites if site.name in names]

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        known = self._collectors.get(id(context))
        if known is None:
            self._collectors = {key: one for key, one in self._collectors.items() if _is_on(one[0])}
            sites = list(context.sites.values())
            collector = Collector(self.specs_on(sites), sites, self._max_bytes, self._route)
            # Kept with its context, which has this id for as long as it lives.
            known = self._collectors[id(context)] = context, collector
        tickets = known[1].begin(context)
        return Published(None, tickets) if tickets else None

    def wants_lse(self, site: Site) -> bool:
        return self._route in (None, "lse") and published(site, self) is not None

    def observe(self, site: Site, call: Call, lse: Tensor | None) -> None:
        ticket = published(site, self)
        if ticket is None:
            return
        if getattr(site.module.processor, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"{self.describe()} needs every key of a query, which context parallelism splits over "
                "devices; turn parallelism off for the capture"
            )
        run_task(ticket, call, lse)
        if self._ends_forwards and not torch.compiler.is_compiling():
            _, collector = self._collectors[id(site.context)]
            if collector.is_done:
                raise EverythingRead

    def result(self, name: str | None = None, *, model: str | None = None) -> CaptureResult:
        """What was captured so far.

        Args:
            name: of the spec, where there are several.
            model: component name, where the pipeline has several denoisers.

        Raises:
            ValueError: no such spec or model.
            RuntimeError: no forward was captured in full.
        """
        name = _the_one("spec", name, list(self.specs))
        models = {context.model_name: collector for context, collector in self._collectors.values()}
        if not models:
            raise RuntimeError(f"nothing was captured for {name!r}: the model has not run yet")
        if len(models) < len(self._collectors):
            raise RuntimeError(
                "this capture is on two pipelines, and which is meant is not known; give each one of its own"
            )
        return models[_the_one("model", model, list(models))].result(name)

    def reset(self) -> None:
        """Forget what was captured."""
        for _, collector in self._collectors.values():
            collector.reset()


def _is_on(context: Context) -> bool:
    return any(getattr(site.module, "diffctrl_site", None) is site for site in context.sites.values())


def _the_one(what: str, name: str | None, known: list[str]) -> str:
    if name is None and len(known) == 1:
        return known[0]
    if name not in known:
        raise ValueError(f"{what}={name!r} is not among what was captured; accepted are {', '.join(known)}")
    return name


class CaptureHandle:
    """A capture on a model: results, statistics, and the way back. Also a context manager."""

    def __init__(self, processor: CaptureAttnProcessor, control: ControlHandle) -> None:
        self.processor, self.control = processor, control

    def __enter__(self) -> CaptureHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.control.__exit__(*exception)

    def result(self, name: str | None = None, *, model: str | None = None) -> CaptureResult:
        """See `CaptureAttnProcessor.result`; also after the control was taken off."""
        return self.processor.result(name, model=model)

    def reset(self) -> None:
        """Forget what was captured."""
        self.processor.reset()

    def stats(self) -> dict[str, Any]:
        """See `ControlHandle.stats`; "captures" counts the route of each captured call."""
        return self.control.stats()

    def remove(self) -> None:
        """Put the same processor objects back."""
        self.control.remove()


def capture(
    target: Any,
    specs: Specs,
    *,
    also: Sequence[Control] = (),
    max_bytes: int = MAX_BYTES,
    route: Route | None = None,
    scheduler: Any = None,
    batch_layout: BatchLayout | None = None,
) -> CaptureHandle:
    """Keep what the specs ask for of the attention weights of a pipeline or a bare denoiser.

    `with diffctrl.capture(pipe, CaptureSpec(only_keys=(2, 3))) as maps: pipe(...)`, then
    `maps.result().on_grid()`: (batch, keys, frames, rows, columns), the mean over heads, blocks and steps.
    The output of the model is the same, bit for bit.

    Args:
        target: a diffusers pipeline or a bare transformer or UNet.
        specs: one spec, or several by name.
        also: further processors to apply with it.
        max_bytes: of all totals and the working memory. More is refused before a forward.
        route: to the weights; None for the cheapest of each call.
        scheduler, batch_layout: see `diffctrl.apply`.

    Raises:
        TypeError, ValueError, RuntimeError: as `diffctrl.apply`; a spec that does not fit the model.
    """
    processor = CaptureAttnProcessor(specs, max_bytes=max_bytes, route=route)
    controls = [processor, *also]
    return CaptureHandle(processor, apply(target, controls, scheduler=scheduler, batch_layout=batch_layout))


__all__ = ["CaptureAttnProcessor", "CaptureHandle", "EverythingRead", "capture"]
