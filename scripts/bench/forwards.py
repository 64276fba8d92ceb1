"""Timing whole forwards of a model under a control: rotation, memory, single blocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import diffctrl
from diffctrl.processors import RadialAttnProcessor
from diffctrl.scripts.bench.harness import Figure
from diffctrl.scripts.bench.video_models import QUICK, VideoModel


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how thoroughly.

    Attributes:
        device, dtype: of the models.
        quick: tiny models, few rounds.
    """

    device: str
    dtype: torch.dtype
    quick: bool

    def subject(self, model: VideoModel) -> VideoModel:
        return QUICK[model.name] if self.quick else model

    def sparse(self, **settings: Any) -> RadialAttnProcessor:
        """Every step sparse; the rest as the preset of the model has it."""
        if self.quick:
            settings = {"block": 16, **settings}
        return RadialAttnProcessor(dense_steps=0, dense_last_steps=0, **settings)

    def dense(self) -> RadialAttnProcessor:
        return RadialAttnProcessor(dense_fraction=1.0)


# --- time and memory ----------------------------------------------------------------------------------------


def timed(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    if bench.device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    call()
    end.record()
    end.synchronize()
    return start_event.elapsed_time(end) / 1e3


def peak(bench: Bench, call: Callable[[], Any]) -> float:
    """GB allocated at most during a call; 0 on a CPU."""
    if bench.device == "cpu":
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


@dataclass(slots=True)
class Times:
    """Seconds of the rounds of one contender, and the most memory it took."""

    seconds: list[float]
    memory: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def figure(self, name: str, note: str = "") -> Figure:
        return Figure(name, self.median, min(self.seconds), max(self.seconds), "s", note=note)


def ratio(name: str, slow: Times, fast: Times, bar: float | None, note: str = "") -> Figure:
    """Of medians; low and high from the extremes of the few rounds."""
    return Figure(
        name,
        slow.median / fast.median,
        min(slow.seconds) / max(fast.seconds),
        max(slow.seconds) / min(fast.seconds),
        "x",
        bar,
        note=note,
    )


def forward(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def rotate(
    bench: Bench, contenders: dict[str, Any], model: nn.Module, inputs: dict[str, Any], rounds: int
) -> dict[str, Times]:
    """Forwards in rotation, one processor (or None for stock) after the other; the first round warms up."""
    times: dict[str, Times] = {name: Times([], 0.0) for name in contenders}
    for turn in range(rounds + 1):
        for name, processor in contenders.items():
            if turn == 0 and name == "stock":
                continue  # its kernels are torch's own: nothing to compile, and a forward takes half a minute
            if processor is None:
                run_once(bench, times[name], model, inputs, keep=turn > 0)
                continue
            with diffctrl.apply(model, processor):
                run_once(bench, times[name], model, inputs, keep=turn > 0)
        last = ", ".join(f"{n} {t.seconds[-1]:.2f} s" for n, t in times.items() if t.seconds)
        print(f"  round {turn}: {last or 'warm'}", flush=True)
    return times


def run_once(bench: Bench, times: Times, model: nn.Module, inputs: dict[str, Any], keep: bool) -> None:
    taken: list[float] = []
    memory = peak(bench, lambda: taken.append(timed(bench, lambda: forward(model, inputs))))
    times.memory = max(times.memory, memory)
    if keep:
        times.seconds.append(taken[0])


@dataclass(frozen=True, slots=True)
class Scaled:
    """A forward put together from its parts.

    Attributes:
        times: of the whole.
        each: seconds of one block of each stack, in the last round.
        others: seconds outside of blocks.
    """

    times: Times
    each: dict[str, float]
    others: float

    def __str__(self) -> str:
        parts = ", ".join(f"{stack} {seconds:.3f} s" for stack, seconds in self.each.items())
        memory = f"; peak {self.times.memory:.1f} GB with one of each" if self.times.memory else ""
        return f"blocks times their number: {parts}, else {self.others:.2f} s{memory}"


class BlockTimes:
    """Seconds of each block of a forward that has one of each stack, by events on the stream."""

    def __init__(self, bench: Bench, network: nn.Module, stacks: tuple[str, ...]) -> None:
        self._bench, self._marks, self._handles = bench, [], []
        for stack in stacks:
            for block in getattr(network, stack):
                self._handles += [
                    block.register_forward_pre_hook(lambda *_, stack=stack: self._mark(stack)),
                    block.register_forward_hook(lambda *_, stack=stack: self._mark(stack)),
                ]

    def _mark(self, stack: str) -> None:
        if self._bench.device == "cpu":
            self._marks.append((stack, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((stack, event))

    def scaled(self, call: Callable[[], Any], counts: dict[str, int], rounds: int) -> Scaled:
        """A forward with so many blocks of each stack, from one with one of each; a first round warms up."""
        times, each, others = Times([], 0.0), dict.fromkeys(counts, 0.0), 0.0
        for turn in range(rounds + 1):
            self._marks.clear()
            taken: list[float] = []
            memory = peak(self._bench, lambda taken=taken: taken.append(timed(self._bench, call)))
            for (stack, start), (_, end) in zip(self._marks[::2], self._marks[1::2], strict=True):
                each[stack] = end - start if self._bench.device == "cpu" else start.elapsed_time(end) / 1e3
            others = taken[0] - sum(each.values())
            times.memory = max(times.memory, memory)
            if turn:
                times.seconds.append(others + sum(each[stack] * count for stack, count in counts.items()))
        return Scaled(times, each, others)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
