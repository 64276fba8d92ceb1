"""What each update of a training is made on: clips, left-out captions, noise and its levels.

All of it follows from the seed and a clip's place in the endless sequence alone, and is drawn on the CPU: the
same in any batch, on any number of devices, and after a killed training goes on. A thread draws the next
batch while one is in use.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from diffctrl.lengthening.encoded import EncodedClips
from diffctrl.lengthening.plan import TrainPlan

# Steps of the run that a training stands for: the first is dense if any is, the last never (`plan._mask`).
MARKS = 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """Of one part of an update, on the CPU.

    Attributes:
        clean: latents (B, C, F, h, w) float16.
        noise: like them, float32.
        level: noise levels (B,) in [0, 1], after the model's shift.
        text: arguments of the transformer by name, first axis B.
        mark: the step of a run of `MARKS` that such levels belong to.
    """

    clean: Tensor
    noise: Tensor
    level: Tensor
    text: dict[str, Tensor]
    mark: int


class Batches:
    """The batches of one process, by the step and the part of its update.

    Args:
        plan: of the training.
        clips: encoded.
        shift: of the model's noise levels.
        rank, world: of the process, and how many there are.
    """

    def __init__(self, plan: TrainPlan, clips: EncodedClips, *, shift: float, rank: int, world: int) -> None:
        self.plan, self.clips, self.shift, self.rank, self.world = plan, clips, shift, rank, world
        self._orders: dict[int, list[int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}

    def take(self, step: int, part: int) -> Batch:
        """The batch of a part of an update; the one after it is begun."""
        batch = self._ahead.pop((step, part), None) or self._thread.submit(self._draw, step, part)
        following = (step, part + 1) if part + 1 < self.plan.accumulate else (step + 1, 0)
        self._ahead.clear()
        if following[0] < self.plan.steps:
            self._ahead[following] = self._thread.submit(self._draw, *following)
        return batch.result()

    def levels(self, uniform: Tensor, step: int) -> tuple[Tensor, int]:
        """Noise levels (B,) before the model's shift, from uniform draws, and their mark.

        A run meets its highest levels in its dense steps. An update has levels of these alone or of the
        others alone, as often as the distribution of levels has them; which, follows from seed and step.
        """
        plan = self.plan
        highest = 1.0 - (plan.mask or {}).get("dense_fraction", 0.0)
        # The share of the levels below; logit-normal levels are sigmoids of normal draws.
        below = torch.tensor(highest, dtype=torch.float64)
        below = float(below if plan.sampling == "uniform" else torch.special.ndtr(below.logit()))
        draw = torch.Generator().manual_seed(_mixed(plan.seed, -(1 << 32) - step))
        if float(torch.rand((), generator=draw)) < below:
            quantile, mark = uniform * below, MARKS - 1
        else:
            quantile, mark = below + uniform * (1.0 - below), 0
        return (quantile if plan.sampling == "uniform" else torch.special.ndtri(quantile).sigmoid()), mark

    def clip(self, place: int) -> int:
        """The clip at a place of the endless sequence: each epoch has all of them in an order of its own."""
        epoch, index = divmod(place, len(self.clips))
        if epoch not in self._orders:
            draw = torch.Generator().manual_seed(_mixed(self.plan.seed, -1 - epoch))
            order = torch.randperm(len(self.clips), generator=draw).tolist()
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return self._orders[epoch][index]

    def _draw(self, step: int, part: int) -> Batch:
        plan = self.plan
        first = ((step * plan.accumulate + part) * self.world + self.rank) * plan.batch
        places = range(first, first + plan.batch)
        draws = [torch.Generator().manual_seed(_mixed(plan.seed, place)) for place in places]
        left_out = [float(torch.rand((), generator=draw)) < plan.empty_share for draw in draws]
        clean, text = self.clips.batch([self.clip(place) for place in places], left_out)
        level, mark = self.levels(torch.stack([torch.rand((), generator=draw) for draw in draws]), step)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws])
        level = self.shift * level / (1 + (self.shift - 1) * level)
        return Batch(clean=clean, noise=noise, level=level, text=text, mark=mark)


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each (seed, number)."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xC2B2AE3D27D4EB4F + 0x165667B1) % 2**63
