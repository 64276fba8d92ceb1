"""What one forward pass is about: a hook writes it before the pass, processors read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffctrl.attention import EngineStats
from diffctrl.families.base import ForwardInfo, Site

# How a pipeline arranges classifier-free guidance in the denoiser's batch; "perturbed" rows are all twins.
BatchLayout = Literal["cond", "uncond", "uncond_cond", "perturbed"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Which batch rows of the running forward are what; half-open (start, stop) pairs.

    Attributes:
        total: rows of the forward, twin rows included.
        uncond: rows of the unconditional or negative prompt.
        cond: rows of the positive prompt.
        perturbed: twin rows that a guidance method appended; empty where none did.
    """

    total: int
    uncond: tuple[int, int]
    cond: tuple[int, int]
    perturbed: tuple[int, int]

    @classmethod
    def of(cls, batch: int, layout: BatchLayout) -> Rows:
        """The rows of a stock forward.

        Raises:
            ValueError: an odd batch cannot hold [uncond | cond] halves.
        """
        if layout == "uncond_cond":
            if batch % 2:
                raise ValueError(
                    f"the denoiser got {batch} rows, but classifier-free guidance in one batch "
                    "needs an even number ([uncond | cond]); pass batch_layout='cond' to "
                    "`diffctrl.apply` if every row is conditional"
                )
            return cls(batch, (0, batch // 2), (batch // 2, batch), (batch, batch))
        if layout == "uncond":
            return cls(batch, (0, batch), (batch, batch), (batch, batch))
        if layout == "perturbed":
            return cls(batch, (0, 0), (0, 0), (0, batch))
        return cls(batch, (0, 0), (0, batch), (batch, batch))

    @property
    def has_cond(self) -> bool:
        return self.cond[0] < self.cond[1]

    def with_twins(self) -> Rows:
        """The same rows with one perturbed twin appended for every conditional row."""
        twins = self.cond[1] - self.cond[0]
        return Rows(self.total + twins, self.uncond, self.cond, (self.total, self.total + twins))


@dataclass(slots=True, eq=False)
class Context:
    """The state of one controlled model.

    Attributes:
        info: what the family read off the running forward.
        rows: which batch rows are conditional, unconditional or perturbed.
        auxiliary: whether the pipeline makes this call for a guidance of its own, besides cond and uncond.
        step: index of the denoising step, or None where no scheduler is known.
        total_steps: steps of the scheduler's schedule, or None.
        first_step: index of the step that the run began with (image to image begins late).
        experts: denoisers of the pipeline that take turns over the steps of one run.
        stats: counts of the engine.
        forwards, twin_forwards, masked_forwards: forwards of the model, those among them that ran perturbed
            twins, and those in which some attention had block lists.
    """

    model_name: str
    sites: dict[str, Site]
    info: ForwardInfo | None = None
    rows: Rows | None = None
    auxiliary: bool = False
    step: int | None = None
    total_steps: int | None = None
    first_step: int = 0
    experts: int = 1
    stats: EngineStats = field(default_factory=EngineStats)
    forwards: int = 0
    twin_forwards: int = 0
    masked_forwards: int = 0

    def grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of image tokens.

        Raises:
            RuntimeError: the forward did not say.
        """
        if self.info is None or self.info.grid is None:
            raise RuntimeError(
                f"{self.model_name}: this call does not say its token grid (frames, rows, columns), and "
                "diffctrl does not guess it from the token count; call the model through its pipeline, or "
                "pass the arguments that carry it (for FLUX: img_ids; for LTX: num_frames, height, width)"
            )
        return self.info.grid

    def fraction(self) -> float:
        """Progress of the run in [0, 1): step / total steps.

        Raises:
            RuntimeError: no scheduler is known.
        """
        step, total = self._known_step()
        return step / total

    def run_step(self) -> tuple[int, int]:
        """(step, steps) of the run itself: 0 is the step that it began with.

        Raises:
            RuntimeError: no scheduler is known.
        """
        step, total = self._known_step()
        return step - self.first_step, total - self.first_step

    def _known_step(self) -> tuple[int, int]:
        if self.step is None or not self.total_steps:
            raise RuntimeError(
                f"{self.model_name}: a step window needs the denoising step, but no scheduler is known; "
                "apply to the pipeline instead of the bare model, or pass scheduler=... to `diffctrl.apply`"
            )
        return self.step, self.total_steps


def current_step(scheduler: Any, timestep: Any) -> tuple[int | None, int | None]:
    """(step index, total steps) of the forward that is about to run.

    The scheduler's own index is read where there is one (no device synchronisation). Before its first step it
    is None and means its begin index. Schedulers without one (DDIM, DDPM) are matched by timestep.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None, None
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        index = _matching_step(timesteps, timestep)
    if index is None and hasattr(scheduler, "step_index"):
        index = 0  # a begin index is set wherever it is not 0
    return None if index is None else int(index), len(timesteps)


def _matching_step(timesteps: Any, timestep: Any) -> int | None:
    """The nearest of the scheduler's timesteps, if one is near: models get them rounded to their dtype."""
    if timestep is None:
        return None
    value = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
    distances = [abs(float(known) - value) for known in torch.as_tensor(timesteps).tolist()]
    nearest = min(range(len(distances)), key=distances.__getitem__)
    return nearest if distances[nearest] <= 0.005 * max(abs(value), 1.0) else None
