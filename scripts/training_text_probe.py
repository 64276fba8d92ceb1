"""Exact match of the text model while it trains: fixed unseen exercises, decoded by confidence."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffctrl.zoo.tasks import TASKS, Draw, Examples, sample
from diffctrl.zoo.tasks.vocabulary import MASK

from .training_text_data import answer_offsets
from .training_text_forward import TextForward

_SEED = 991


@dataclass(frozen=True, slots=True)
class Probe:
    """Exercises of one length, the same at every look.

    Args:
        examples: a batch per entry, by label.
        steps: forwards of the decoding.
    """

    examples: dict[str, Examples]
    steps: int

    @classmethod
    def of(cls, tokens: int, rows: int, device: torch.device, *, every_task: bool, steps: int) -> "Probe":
        """Lookups with one question and with several, and the other tasks where `every_task`."""
        draw = Draw("cpu", _SEED + tokens)
        found = {
            "one fact": sample({"facts": rows}, tokens=tokens, draw=draw, split="test", queries=1),
            "facts": sample({"facts": rows}, tokens=tokens, draw=draw, split="test"),
        }
        if every_task:
            for name in TASKS[1:]:
                found[name] = sample({name: rows}, tokens=tokens, draw=draw, split="test")
        return cls({name: on_device(each, device) for name, each in found.items()}, steps)

    def shares(self, model: Any) -> dict[str, float]:
        """Share of rows whose whole answer and end are right, by label."""
        forward = TextForward(model, compiled=False)
        return {
            name: exact(decoded(forward, each, self.steps), each).float().mean().item()
            for name, each in self.examples.items()
        }


def on_device(examples: Examples, device: torch.device) -> Examples:
    """The same exercises on a device."""
    return Examples(*(x.to(device) for x in (examples.ids, examples.start, examples.length, examples.task)))


@torch.no_grad()
def decoded(forward: TextForward, examples: Examples, steps: int) -> Tensor:
    """Answers filled in, the surest tokens first, as many in each step: (B, S) int64.

    The evaluation's sampler is `diffctrl.dlm`'s; this one takes whole rows, tails of `<eos>` included, in one
    batch and without a look at the device.
    """
    ids = examples.masked()
    for step in range(steps):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            logits = forward.logits(ids)
        logits[..., MASK] = -torch.inf
        sureness, guess = logits.softmax(dim=-1).max(dim=-1)
        masked = ids == MASK
        left = masked.sum(dim=1, keepdim=True)
        quota = -(-left // (steps - step))
        order = sureness.masked_fill(~masked, -1.0).argsort(dim=1, descending=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(ids.shape[1], device=ids.device).expand_as(order)
        )
        ids = torch.where(masked & (rank < quota), guess, ids)
    return ids


def exact(ids: Tensor, examples: Examples) -> Tensor:
    """(B,) bool: the answer and the `<eos>` after it are right."""
    offset = answer_offsets(examples)
    counts = (offset >= 0) & (offset <= examples.length[:, None])
    return ((ids == examples.ids) | ~counts).all(dim=1)
