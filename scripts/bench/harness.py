"""Shared by the benchmarks: contenders timed in rotation, device time by graph replay, clocks watched, one
JSON out.

Two times for each contender. call: back-to-back calls as a model makes them, so the longer of host and
device. device: replays of a CUDA graph of the same calls, so no host at all. On a CPU both are the wall
clock.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "flash-attn-4", "nvidia-cutlass-dsl", "numpy")
# A contender that takes this long hides its host time completely: its call time is its device time.
LONG_CALL_MS = 5.0


@dataclasses.dataclass(slots=True)
class Figure:
    """One number of a report. bar and compare (">=" or "<=") make it a claim that holds or not."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    bar: float | None = None
    compare: str = ">="
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        if self.bar is None:
            return fields | {"compare": None, "holds": None}
        good = self.value >= self.bar if self.compare == ">=" else self.value <= self.bar
        return fields | {"holds": bool(good)}


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: the median over rounds and its 95 % interval."""

    median: float
    low: float
    high: float
    rounds: int
    dropped: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    call: Timing
    device: Timing


def summarise(times: Sequence[float], dropped: int = 0) -> Timing:
    """The median with the distribution-free interval of order statistics."""
    ordered = sorted(times)
    n = len(ordered)
    reach = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a binomial with p = 1/2
    low = ordered[max(0, math.floor(n / 2 - reach))]
    high = ordered[min(n - 1, math.ceil(n / 2 + reach) - 1 if n > 1 else 0)]
    return Timing(statistics.median(ordered), low, high, n, dropped)


def time_rotation(
    contenders: dict[str, Callable[[], Any]], *, device: str, rounds: int, warm_seconds: float = 0.5
) -> dict[str, Measured]:
    """Times all contenders in rotation (A B C A B C ...); those that fail here are left out, with a printed
    line."""
    if device == "cpu":
        return _time_on_cpu(contenders, rounds)
    repeats, graphs = {}, {}
    for name, call in list(contenders.items()):
        first = _event_ms(call, 1)
        first = min(first, _event_ms(call, 1))
        repeats[name] = 1 if first > LONG_CALL_MS else min(20, max(2, round(2.0 / max(first, 0.05))))
        if first <= LONG_CALL_MS:
            graphs[name] = _captured(name, call, repeats[name])
    clock = Clock()
    _warm(contenders, warm_seconds)
    calls: dict[str, list[tuple[float, float | None]]] = {name: [] for name in contenders}
    replays: dict[str, list[tuple[float, float | None]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            calls[name].append((_event_ms(call, repeats[name]) / repeats[name], clock.mhz()))
            graph = graphs.get(name)
            if graph is not None:
                replays[name].append((_event_ms(graph.replay, 1) / repeats[name], clock.mhz()))
    clocks = [mhz for samples in calls.values() for _, mhz in samples if mhz is not None]
    floor = 0.97 * statistics.median(clocks) if clocks else 0.0
    result = {}
    for name in contenders:
        call_time = _kept(calls[name], floor)
        result[name] = Measured(call_time, _kept(replays[name], floor) if replays[name] else call_time)
    return result


def _kept(samples: list[tuple[float, float | None]], floor: float) -> Timing:
    good = [ms for ms, mhz in samples if mhz is None or mhz >= floor]
    return summarise(good or [ms for ms, _ in samples], len(samples) - len(good) if good else 0)


def _event_ms(call: Callable[[], Any], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _captured(name: str, call: Callable[[], Any], times: int) -> Any:
    """A CUDA graph of `times` calls, or None where the contender cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        print(f"  {name}: no graph ({type(error).__name__}: {lines[0][:120]})")
        torch.cuda.synchronize()
        return None
    return graph


def _warm(contenders: dict[str, Callable[[], Any]], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call in contenders.values():
            call()
        torch.cuda.synchronize()


def _time_on_cpu(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Measured]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Measured(summarise(t), summarise(t)) for name, t in times.items()}


class Clock:
    """SM clock and throttle reasons of the first visible card, through NVML where the package is there."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml = pynvml
        except Exception as error:  # no package, no driver: rounds are then not filtered by clock
            print(f"  clock: not watched ({type(error).__name__})")

    def mhz(self) -> float | None:
        if self._nvml is None:
            return None
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))


def card_state() -> str:
    """One line of nvidia-smi: clocks, throttle reasons, temperature, power; "" on a CPU."""
    fields = "clocks.sm,clocks.mem,clocks_event_reasons.active,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """Of the checkout; a copy without its history names it in DIFFCTRL_COMMIT."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("DIFFCTRL_COMMIT")
    return done.stdout.strip() or os.environ.get("DIFFCTRL_COMMIT")


def write_report(
    path: Path | None, topic: str, figures: Sequence[Figure], *, seeds: Sequence[int], **extra: Any
) -> None:
    """Writes `docs/results` JSON; called after each part, so that a run cut short leaves what it has."""
    if path is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    report = {
        "topic": topic,
        "command": " ".join(["python", "-m", _module_name(), *_arguments(topic)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device,
        "versions": versions(),
        "seeds": list(seeds),
        "figures": [figure.as_dict() for figure in figures],
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _arguments(topic: str) -> list[str]:
    """Those of this run, but the file as it is committed, wherever this run wrote it."""
    arguments = list(sys.argv[1:])
    for i, argument in enumerate(arguments):
        if argument == "--out" and i + 1 < len(arguments):
            arguments[i + 1] = f"docs/results/{topic}.json"
        elif argument.startswith("--out="):
            arguments[i] = f"--out=docs/results/{topic}.json"
    return arguments


def _module_name() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_figures(figures: Sequence[Figure]) -> None:
    """The figures as a table: value, interval, bar and whether it holds."""
    rows = []
    for figure in figures:
        interval = "" if figure.low is None else f"[{figure.low:.4g}, {figure.high:.4g}]"
        holds = {None: "", True: "yes", False: "NO"}[figure.as_dict()["holds"]]
        bar = "" if figure.bar is None else f"{figure.compare} {figure.bar:g}"
        value = f"{figure.value:.4g} {figure.unit}"
        rows.append([figure.name, value, interval, bar, holds, figure.note])
    print_table(["figure", "value", "95 % interval", "bar", "holds", "note"], rows)
