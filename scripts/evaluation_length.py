"""What `evaluate_length.py` draws and reads: ways to make a long clip, and what the judge finds in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffctrl
from diffctrl.pipelines.length import load_length_lora, unload_length_lora
from diffctrl.processors import RadialAttnProcessor, RadialConfig
from diffctrl.scripts.evaluation_video import VideoSuite, named_facts, rates_line
from diffctrl.scripts.training_video_forward import decode
from diffctrl.zoo import clips, judge

_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to make a long clip.

    Attributes:
        name: in tables.
        lora: a length LoRA, or None for the base model.
        mask: of radial attention, or None for dense attention.
        short: frames of clips that are drawn one by one and joined, or None for one whole clip.
    """

    name: str
    lora: Path | None = None
    mask: RadialConfig | None = None
    short: int | None = None


@dataclass(frozen=True, slots=True)
class ClipRead:
    """One clip, read.

    Attributes:
        facts: (kind, right) of what its caption names.
        colour_drift, size_drift: mean over the objects seen, NaN where they cannot be told.
    """

    facts: tuple[tuple[str, bool], ...]
    colour_drift: float
    size_drift: float


@dataclass(slots=True)
class Drawn:
    """All clips of a condition, read in the order of the suite.

    Attributes:
        density: attended share of all calls, dense steps and blocks included; None for dense attention.
        clips: (T, 3, H, W) uint8 each, of the first batch.
    """

    condition: Condition
    reads: list[ClipRead] = field(default_factory=list)
    density: float | None = None
    clips: list[np.ndarray] = field(default_factory=list)

    def flags(self, kind: str) -> list[bool]:
        """Facts of one kind; of the same clips in every condition, in the same order."""
        return [right for read in self.reads for name, right in read.facts if name == kind]

    def line(self) -> str:
        """Shares of right facts in one line, for who waits for the others."""
        kinds = {name for read in self.reads for name, _ in read.facts}
        return f"{self.condition.name}: {rates_line({kind: self.flags(kind) for kind in kinds})}"


class Studio:
    """Draws and reads; the judge works beside the drawing.

    Args:
        pipe: the stock pipeline on its device.
        call: arguments of a call, `num_frames` of the long clips among them.
        batch: clips of a call.
        workers: processes that read; 0 reads in this one.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], batch: int, workers: int) -> None:
        self.pipe, self.call, self.batch = pipe, call, batch
        spawned = get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=spawned) if workers else None

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def draw(self, condition: Condition, suite: VideoSuite, seed: int) -> Drawn:
        """Every caption of the suite; noise by the caption's place, the same in every condition."""
        drawn, jobs = Drawn(condition), []
        with ExitStack() as on:
            if condition.lora is not None:
                load_length_lora(self.pipe, condition.lora, mask=False)
                on.callback(unload_length_lora, self.pipe)
            control = None
            if condition.mask is not None:
                control = on.enter_context(diffctrl.apply(self.pipe, RadialAttnProcessor(condition.mask)))
            for first in range(0, len(suite.captions), self.batch):
                part = slice(first, first + self.batch)
                videos = list(self._videos(condition, suite.captions[part], seed + first))
                drawn.clips = drawn.clips or videos
                jobs += [self._submit(v, f) for v, f in zip(videos, suite.facts[part], strict=True)]
                print(f"  {condition.name}: {len(jobs)} of {len(suite.captions)}", flush=True)
            if control is not None:
                (stats,) = control.stats().values()
                drawn.density = stats["density"]
        drawn.reads = [job.result() if isinstance(job, Future) else job for job in jobs]
        return drawn

    @torch.no_grad()
    def _videos(self, condition: Condition, captions: list[str], seed: int) -> Iterator[np.ndarray]:
        """(T, 3, H, W) uint8 each."""
        frames = self.call["num_frames"]
        pieces = 1 if condition.short is None else math.ceil(frames / condition.short)
        drawn = []
        for piece in range(pieces):
            noise = [
                torch.Generator().manual_seed(seed + index + 1_000_003 * piece)
                for index in range(len(captions))
            ]
            call = self.call if condition.short is None else {**self.call, "num_frames": condition.short}
            drawn.append(
                self._decoded(self.pipe(captions, generator=noise, output_type="latent", **call).frames)
            )
        yield from torch.cat(drawn, 1)[:, :frames].numpy()

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) uint8 on the CPU, all frames at once; the stock decoder takes them two by two."""
        vae = self.pipe.vae
        mean, deviation = (
            torch.tensor(values, device=latents.device)[:, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        clips = [decode(vae, part * deviation + mean) for part in latents.float().transpose(1, 2).split(8)]
        return ((torch.cat(clips) * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().cpu()

    def _submit(self, video: np.ndarray, wanted: clips.ClipFacts) -> Future[ClipRead] | ClipRead:
        return read(video, wanted) if self._pool is None else self._pool.submit(read, video, wanted)


def read(video: np.ndarray, wanted: clips.ClipFacts) -> ClipRead:
    """Read one clip (T, 3, H, W) uint8."""
    torch.set_num_threads(1)
    verdict = judge.check_clip(torch.from_numpy(video).float() / 255, wanted)
    seen = verdict.reading.objects
    return ClipRead(
        facts=tuple(named_facts(verdict, wanted)),
        colour_drift=_mean([one.colour_drift for one in seen]),
        size_drift=_mean([one.size_drift for one in seen]),
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def bootstrapped(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval; NaN without values.

    >>> bootstrapped([1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (_RESAMPLES, len(array)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(array.mean()), float(low), float(high)


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference over the same clips with its 95 % bootstrap interval; unreadable ones are left out."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if not (math.isnan(a) or math.isnan(b))]
    return bootstrapped([a - b for a, b in pairs])
