"""Second stage of the image and of the video model: a transformer that matches flows, with its text encoders.

What the two share: options, the step, the loop over stages of a run, the checkpoint, the facts of the pack.
"""

import copy
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from diffctrl.zoo.models import NOISE_SHIFT

from .training_checkpoint import checkpoint_facts, load_checkpoint, save_checkpoint
from .training_loop import Clock, StepRunner, say
from .training_optimizer import Optimizer, WeightAverage, learning_rate_at
from .training_pack import component_tensors, started_from

_SLICE_MARGIN_SECONDS = 30.0
_REPORT_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowOptions:
    """Options of the stage; the command line's names and defaults.

    Args:
        state: folder of the checkpoint and the encoded pool; a second call with it continues.
        vae: weights of the first stage, with the `.json` beside them.
        pack: file that gets all averaged weights at the end of each slice.
        start_from: pack whose weights a new run starts from.
        minutes: training time of the whole run, without pool, compilation and checks.
        slice_seconds: this process ends within so many seconds of its start, checkpoint included.
        batch: samples per step.
        pool: encoded samples on the device.
        keep_pool: save the pool, so that the next slice loads it.
        learning_rate: peak.
        warmup_steps: linear warm-up.
        optimizer: "adamw", or "muon" for hidden matrices.
        shift: noise shift in training and checks.
        chunk: steps between two looks at the clock.
        check_minutes: training time between two checks by the judge.
        check_captions: captions in a check.
        seed: of weights, samples and noise.
        commit: recorded in the pack.
        compile: use torch.compile for the repeated layers.
        graph: capture the whole step.
        smoke: short CPU run of a small model at 32 px.
    """

    state: Path
    vae: Path
    pack: Path | None = None
    start_from: Path | None = None
    minutes: float
    slice_seconds: float
    batch: int
    pool: int
    keep_pool: bool = True
    learning_rate: float
    warmup_steps: int
    optimizer: str
    shift: float = NOISE_SHIFT
    chunk: int
    check_minutes: float
    check_captions: int
    seed: int = 0
    commit: str = "unknown"
    compile: bool = True
    graph: bool = True
    smoke: bool = False


class Supply(Protocol):
    """Batches in tensors that a captured step reads."""

    def refill(self) -> None:
        """Draw the batches of the next chunk."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the run with one step.

    Args:
        supply: of its batches.
        loss: takes the next batch and computes its loss, under autocast; device work only.
        batch: samples of a step.
        label: for the lines of progress, or empty.
    """

    supply: Supply
    loss: Callable[[], Tensor]
    batch: int
    label: str = ""


class FlowTraining(ABC):
    """The step, its tensors, the checkpoint and the loop.

    Args:
        options: of the stage.
        parts: components that are trained, and others; on the device.
        device: where they are.
    """

    trained: ClassVar[tuple[str, ...]]
    """Names of the components that learn."""
    vae_facts: ClassVar[tuple[str, ...]]
    """What the pack records of the autoencoder."""
    recorded: ClassVar[tuple[str, ...]] = (
        "smoke", "shift", "batch", "optimizer", "learning_rate", "pool", "seed", "commit",
    )  # fmt: skip
    """Options that the pack records."""

    def __init__(self, options: Any, parts: Any, device: torch.device) -> None:
        self.options, self.parts, self.device = options, parts, device
        copies = {
            name: copy.deepcopy(getattr(parts, name)).eval().requires_grad_(False) for name in self.trained
        }
        self.averaged = type(parts)(vae=parts.vae, **copies)  # the autoencoder is shared
        own, averages = self._parameters(parts), self._parameters(self.averaged)
        self.optimizer = Optimizer(own, kind=options.optimizer)
        self.average = WeightAverage(list(own.values()), [averages[name] for name in own])
        self.total = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.done, self.elapsed_seconds = 0, 0.0

    # --- what a model adds ----------------------------------------------------------------------------------

    @abstractmethod
    def stage(self, number: int) -> Stage:
        """The stage of this number."""

    def stage_at(self, fraction: float) -> int:
        """The number of the stage at a share of the budget; one stage by default."""
        return 0

    @abstractmethod
    def check(self, label: str) -> None:
        """Draw unseen captions with the averaged weights and have them judged."""

    def news(self, *, wait: bool = False) -> Iterable[str]:
        """Lines of checks that are over since the last call; with `wait`, of all of them."""
        return ()

    @abstractmethod
    def write_pack(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the averaged weights."""

    # --- the step -------------------------------------------------------------------------------------------

    def noise_levels(self, batch: int) -> Tensor:
        """(B,) logit-normal noise levels, shifted to high noise; one in each B-th of the distribution."""
        strata = torch.arange(batch, device=self.device, dtype=torch.float32)
        level = torch.special.ndtri((strata + torch.rand(batch, device=self.device)) / batch).sigmoid()
        return self.options.shift * level / (1.0 + (self.options.shift - 1.0) * level)

    def step(self, loss_of_next: Callable[[], Tensor]) -> None:
        """One update; device work only."""
        self.optimizer.zero_grad()
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            loss = loss_of_next()
        loss.backward()
        self.optimizer.step()
        self.average.update()
        self.total.add_(loss.detach())

    # --- the loop -------------------------------------------------------------------------------------------

    def run(self, since: float) -> bool:
        """Train until the budget or the slice ends; saves the checkpoint and the pack.

        Returns whether the whole budget is spent.
        """
        options = self.options
        self._load_checkpoint(since)
        # Another stream of noise and captions in each slice; the generator is captured with the step.
        torch.manual_seed(options.seed * 1_000_003 + self.done + 1)
        clock = Clock(
            options.minutes * 60,
            elapsed_seconds=self.elapsed_seconds,
            slice_ends=since + options.slice_seconds - _SLICE_MARGIN_SECONDS,
        )
        clock.start()
        self._loop(clock, since)
        self.elapsed_seconds = clock.elapsed_seconds
        self._save_checkpoint(since)
        self._write_pack(since)
        if clock.finished:
            self.check("last check")
        self._tell(since, wait=True)
        state = "finished" if clock.finished else "call again with the same --state to continue"
        say(
            f"{self.elapsed_seconds / 60:.2f} of {options.minutes:g} minutes, step {self.done}: {state}",
            since=since,
        )
        return clock.finished

    def _loop(self, clock: Clock, since: float) -> None:
        options = self.options
        number, current = -1, None
        reported, reported_at, checked_at = self.done, clock.elapsed_seconds, clock.elapsed_seconds
        over = clock.finished
        while not over:
            if current is None or self.stage_at(clock.fraction) != number:
                number = self.stage_at(clock.fraction)
                self._set_learning_rate(clock.fraction)
                with clock.pause():
                    current = self._started(self.stage(number), since)
                reported, reported_at = self.done, clock.elapsed_seconds
            stage, runner = current
            rate = self._set_learning_rate(clock.fraction)
            stage.supply.refill()
            runner.run(options.chunk)
            self.done += options.chunk
            total = self.total.item()  # waits for the chunk, so the clock is true
            if not total < float("inf"):
                raise SystemExit(f"the loss is {total} at step {self.done}; lower --learning-rate")
            over = clock.finished or clock.slice_over
            if self.done - reported >= _REPORT_STEPS or over:
                steps, seconds = self.done - reported, clock.elapsed_seconds - reported_at
                say(
                    f"step {self.done}  {stage.label}loss {total / steps:.4f}  lr {rate:.1e}  "
                    f"{100 * clock.fraction:.1f}%  {steps / seconds:.1f} steps/s  "
                    f"{steps * stage.batch / seconds:.0f} samples/s",
                    since=since,
                )
                self.total.zero_()
                reported, reported_at = self.done, clock.elapsed_seconds
            if clock.elapsed_seconds - checked_at > options.check_minutes * 60 and not over:
                with clock.pause():
                    self.check(f"check at step {self.done}")
                checked_at = clock.elapsed_seconds
            self._tell(since)

    def _started(self, stage: Stage, since: float) -> tuple[Stage, StepRunner]:
        """Compile and capture the step of a stage; its warm-up steps are real ones."""
        stage.supply.refill()
        runner = StepRunner(
            lambda: self.step(stage.loss), self.device, graph=self.options.graph, stream=self.stream
        )
        runner.prepare()
        self.done += runner.WARM_UP
        self.total.zero_()
        say(f"{stage.label}{stage.batch} samples a step: step ready", since=since)
        return stage, runner

    def _tell(self, since: float, *, wait: bool = False) -> None:
        for line in self.news(wait=wait):
            say(line, since=since)

    def _set_learning_rate(self, fraction: float) -> float:
        rate = learning_rate_at(
            fraction, self.done, peak=self.options.learning_rate, warmup_steps=self.options.warmup_steps
        )
        self.optimizer.set_learning_rate(rate)
        return rate

    # --- what is kept ---------------------------------------------------------------------------------------

    def _parameters(self, parts: Any) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": value
            for name in self.trained
            for key, value in getattr(parts, name).named_parameters()
        }

    def _state_tensors(self) -> dict[str, Tensor]:
        """Everything a later slice needs, by name: the same objects, so a checkpoint is copied into them."""
        tensors: dict[str, Tensor] = {"average.count": self.average.count}
        for prefix, parts in (("model", self.parts), ("average", self.averaged)):
            for name in self.trained:
                own = component_tensors(name, getattr(parts, name))
                tensors |= {f"{prefix}.{key}": value for key, value in own.items()}
        return tensors | {f"optimizer.{key}": value for key, value in self.optimizer.state_tensors().items()}

    def _save_checkpoint(self, since: float) -> None:
        facts = {
            "step": self.done,
            "elapsed_seconds": self.elapsed_seconds,
            "optimizer": self.options.optimizer,
            "smoke": self.options.smoke,
        }
        save_checkpoint(self.options.state, self._state_tensors(), facts)
        say(f"checkpoint at step {self.done}", since=since)

    def _load_checkpoint(self, since: float) -> None:
        facts = checkpoint_facts(self.options.state)
        if facts is None:
            return
        if facts["optimizer"] != self.options.optimizer or facts["smoke"] != self.options.smoke:
            raise SystemExit(
                f"{self.options.state} was written with optimizer {facts['optimizer']!r}, smoke "
                f"{facts['smoke']}; use the same options or another --state"
            )
        load_checkpoint(self.options.state, self._state_tensors())
        self.done, self.elapsed_seconds = facts["step"], facts["elapsed_seconds"]
        say(f"continuing at step {self.done}, {self.elapsed_seconds / 60:.2f} minutes", since=since)

    def _write_pack(self, since: float) -> None:
        options = self.options
        if options.pack is None:
            return
        autoencoder = json.loads(options.vae.with_suffix(".json").read_text())
        facts = {name: autoencoder[name] for name in self.vae_facts} | {
            "vae_steps": autoencoder["steps"],
            "vae_minutes": autoencoder["minutes"],
            "steps": self.done,
            "minutes": self.elapsed_seconds / 60,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        if "started_from" in autoencoder:
            facts["vae_started_from"] = autoencoder["started_from"]
        facts |= {name: getattr(options, name) for name in self.recorded}
        facts |= started_from(options.start_from)
        self.write_pack(options.pack, facts)
        say(f"averaged weights in {options.pack}", since=since)


def placed(parts: Any, trained: tuple[str, ...], device: torch.device) -> Any:
    """The same parts on the device; those that learn in training mode with gradients, the others without."""
    for name, module in parts.items():
        module.to(device).train(name in trained).requires_grad_(name in trained)
    return parts
