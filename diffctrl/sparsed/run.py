"""One generation while it runs: its rows, its step, and what its forwards read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffctrl.attention import DeviceLists
from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.layout import Layout
from diffctrl.sparsed.patterns import full_lists
from diffctrl.sparsed.schedule import CommitTrigger, Phase, Schedule


@dataclass(slots=True, eq=False)
class Layer:
    """What compiled code reads of a layer. Tensors, so that the layers of a model share their graphs.

    Attributes:
        number: int64 (1,) on the CPU, its index.
        lists: its pattern on the device of the model, or None.
    """

    number: Tensor
    lists: DeviceLists | None = None


class Run:
    """The state of a generation.

    Args:
        layout: of its rows.
        schedule: its step rule.
        trigger: where the dense part ends by what is committed, not by the step number.
        dense: why it is dense to its end, or None.
        device: of the model.

    Attributes:
        step: the running one, or None before the first.
        phase: of that step.
        is_sparse: whether it is sparse; compiled code depends on this and no more.
        given: whether patterns were loaded.
        token: uint8 (1,); tells compiled code that dense attention has an effect.
    """

    def __init__(
        self,
        layout: Layout,
        schedule: Schedule,
        trigger: CommitTrigger | None,
        dense: str | None,
        device: torch.device,
    ) -> None:
        self.layout, self.schedule, self.trigger, self.dense = layout, schedule, trigger, dense
        self.step: int | None = None
        self.phase = Phase.DENSE
        self.is_sparse = False
        self.given = False
        self.token = torch.zeros(1, dtype=torch.uint8, device=device)
        self.mask: Tensor | None = None
        self._checked: Tensor | None = None
        self._seen = False
        self._expect(layout)

    def _expect(self, layout: Layout) -> None:
        self.layout = layout
        self.padded, self._shifted = layout.padded, layout.shifted
        self.full: DeviceLists | None = None
        self._order: tuple[Tensor, Tensor] | None = None

    def restart(self, config: SparseDConfig) -> None:
        """Step 0 came again: drop what the steps left."""
        self.given, self.step = False, None
        self.trigger = CommitTrigger(config) if self.trigger is not None else None

    def enter(self, step: int, committed: float | None, block: int | None) -> None:
        if not 0 <= step < self.schedule.total:
            raise ValueError(
                f"step {step} is outside of the run, which begin() said has {self.schedule.total} steps"
            )
        self.phase = Phase.DENSE if self.dense is not None else self._phase(step, committed, block)
        self.step = step
        self.is_sparse = self.phase is Phase.SPARSE

    def _phase(self, step: int, committed: float | None, block: int | None) -> Phase:
        if self.trigger is None:
            return self.schedule.phase(step)
        if committed is None or not 0.0 <= committed <= 1.0:
            raise ValueError(
                f"trigger='committed' needs set_step(i, committed=share in [0, 1]), not {committed!r}; "
                "trigger='step' goes by the step number"
            )
        return self.trigger.phase(step, committed, block)

    def check(self, batch: int, tokens: int, mask: Tensor | None) -> None:
        """Refuse a forward that is not of this generation."""
        layout = self.layout
        if batch != layout.batch:
            raise ValueError(
                f"SparseD: the forward has {batch} rows, begin() was told of {layout.batch}. "
                "With guidance in one batch prompt_lengths names the rows of both halves; "
                "guidance in two forwards is not supported"
            )
        if tokens != layout.tokens:
            self._take_length(tokens, mask)
        if self._seen and mask is self._checked:
            return
        if mask is None:
            if self.layout.padded:
                raise ValueError(
                    "SparseD: begin() was told of padding, but the forward has no attention_mask "
                    "(B, S), so that the model would not know of it"
                )
        elif mask.shape != (batch, tokens):
            raise ValueError(
                f"SparseD takes an attention_mask (B, S) = ({batch}, {tokens}), not "
                f"{tuple(mask.shape)}: it makes no S x S mask"
            )
        elif not torch.equal(mask.to("cpu", torch.bool), self.layout.mask()):
            raise ValueError(
                "SparseD: attention_mask and begin() do not agree on which tokens are padding; "
                "prompt_lengths counts real prompt tokens, left_padding the padding before them"
            )
        self._checked, self._seen = mask, True

    def _take_length(self, tokens: int, mask: Tensor | None) -> None:
        """Rows may be longer than `begin` said by padding after the generation, from the first forward on."""
        layout = self.layout
        if self._seen or tokens < layout.tokens or mask is None:
            raise ValueError(
                f"SparseD: the forward has {tokens} tokens, begin() was told of {layout.tokens}. "
                "A pattern fits one length: call begin() for each new one"
            )
        self._expect(Layout.of(layout.prompts, layout.generation, layout.block, layout.starts, tokens))

    def prepare(self, device: torch.device) -> None:
        """Make what the layers read in this forward, on their device."""
        if self._shifted:
            self._order = self.layout.order(device)
        if self.padded and self.full is None:
            # Kept: its tensors on the device know it by a weak reference alone.
            self._full = full_lists(self.layout)
            self.full = self._full.on(device)
            self.mask = self.layout.mask().to(device)
        if self.token.device != device:
            self.token = self.token.to(device)

    def first(self, tensor: Tensor) -> Tensor:
        """(B, S, ...) with the real tokens of each row first."""
        return tensor if self._order is None else _taken(tensor, self._order[0])

    def back(self, tensor: Tensor) -> Tensor:
        """Undoes `first`."""
        return tensor if self._order is None else _taken(tensor, self._order[1])


def _taken(tensor: Tensor, order: Tensor) -> Tensor:
    rows = torch.arange(order.shape[0], device=order.device).unsqueeze(1)
    return tensor[rows, order]
