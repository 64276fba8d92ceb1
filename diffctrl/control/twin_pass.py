"""The perturbed twin as a forward of its own: the least memory, and from a later block on the least work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from diffctrl.control.context import Context, Rows
from diffctrl.control.prefix import Prefix
from diffctrl.control.twin import cond_rows, grouped_cond_rows, prediction_of
from diffctrl.families import Family, Site


class TwinPass:
    """Keeps the arguments of a guided forward, and runs its conditional rows once more, perturbed.

    Attributes:
        running: whether the twin's forward runs now; the hooks of the model see it too.
    """

    def __init__(self, family: Family, context: Context) -> None:
        self._family, self._context = family, context
        self._call: dict[str, Any] | None = None
        self._rows: tuple[int, Rows] | None = None
        self._prefix: Prefix | None = None
        self.running = False

    @property
    def kept(self) -> bool:
        """Whether the forward that is running, or has just run, has a twin."""
        return self._call is not None

    def keep(
        self,
        model: nn.Module,
        call: dict[str, Any],
        batch: int,
        rows: Rows,
        mode: str,
        chosen: Sequence[Site],
    ) -> None:
        """Note the forward that begins.

        Args:
            model: the denoiser.
            call: its arguments by name.
            batch, rows: what its batch rows are.
            mode: "sequential" or "prefix".
            chosen: the perturbed sites.
        """
        # Taken now: a model may empty the lists that it gets (UNets: residuals of adapters).
        taken = dict(call)
        for name in self._family.batched:
            if name in taken:
                taken[name] = cond_rows(taken[name], batch, rows)
        for name in self._family.grouped:
            if taken.get(name) is not None:
                taken[name] = grouped_cond_rows(taken[name], batch, rows)
        self._call, self._rows = taken, (batch, rows)
        if mode == "prefix":
            self._prefix = Prefix(model, self._family.chains, [site.name for site in chosen])
            self._prefix.listen()

    def forget(self) -> None:
        """Drop what was kept; also after a forward that failed."""
        self._call = self._rows = None
        if self._prefix is not None:
            self._prefix.restore()
        self._prefix = None

    def run(self, model: nn.Module) -> Tensor:
        """(rows of cond, ...), the perturbed prediction; the context is that of the main forward again."""
        assert self._call is not None
        assert self._rows is not None
        call, (batch, rows) = dict(self._call), self._rows
        context, prefix = self._context, self._prefix
        before = context.info, context.rows
        self.running = True
        try:
            with ExitStack() as stack:
                if prefix is not None:
                    stack.enter_context(prefix.replayed(lambda value: cond_rows(value, batch, rows)))
                if getattr(model, "_diffusers_hook", None) is not None and hasattr(model, "cache_context"):
                    # Step caches of diffusers keep a state for each name: the twin must not read cond's.
                    stack.enter_context(model.cache_context("perturbed"))
                output = model(**call)
        finally:
            self.running = False
            context.info, context.rows = before
            self.forget()
        context.twin_forwards += 1
        return prediction_of(output)
