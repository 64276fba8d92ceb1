"""The training of the text model: masked diffusion on generated exercises, in ever longer rows."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.zoo.tasks import FACT_TOKENS, TASKS, Examples
from diffctrl.zoo.tasks.vocabulary import MASK
from diffctrl.zoo.text import TextSize, text_model

from .training_checkpoint import checkpoint_facts, load_checkpoint, save_checkpoint
from .training_loop import Clock, StepRunner, say, training_device
from .training_optimizer import Optimizer, WeightAverage, learning_rate_at
from .training_pack import fill_tensors, started_from
from .training_text_curriculum import Curriculum
from .training_text_data import EVERY_TASK, ExerciseBatches, answer_offsets
from .training_text_forward import TextForward
from .training_text_pack import write_pack
from .training_text_probe import Probe

SMOKE_SIZE = TextSize(width=64, layers=2, heads=2, key_heads=2, head_dim=32, mlp=128)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SMOKE_LENGTHS = (32, 48)
_SLICE_MARGIN_SECONDS = 20.0
_LEAST_MASKED = 1e-3
_TAIL_WEIGHT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Options of the training; the command line's names and defaults.

    Args:
        state: folder of the checkpoint; a second call with it continues.
        pack: file that gets the averaged weights at the end of each slice.
        start_from: pack whose weights a new run starts from.
        minutes: training time of the whole run, without compilation and probes.
        slice_seconds: this process ends within so many seconds of its start, checkpoint included.
        batch_tokens: tokens per step, at every length.
        longest: tokens of the longest rows.
        learning_rate: peak.
        warmup_steps: linear warm-up.
        optimizer: "muon" for hidden matrices and AdamW for the rest, or "adamw" for all.
        weight_decay: decoupled decay of matrices.
        chunk: steps between two looks at the clock.
        report_seconds: between two lines of progress.
        probe_minutes: training time between two looks at exact matches.
        probe_rows: rows per task and length in such a look.
        seed: of weights, exercises and masks.
        commit: recorded in the pack.
        compile: use torch.compile for everything but attention.
        graph: capture the whole step, once per length.
        smoke: short CPU run of a small model on short rows.
    """

    state: Path
    pack: Path | None = None
    start_from: Path | None = None
    minutes: float = 6.0
    slice_seconds: float = 570.0
    batch_tokens: int = 32_768
    longest: int = LENGTHS[-1]
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    optimizer: str = "muon"
    weight_decay: float = 0.01
    chunk: int = 32
    report_seconds: float = 10.0
    probe_minutes: float = 1.0
    probe_rows: int = 64
    seed: int = 0
    commit: str = "unknown"
    compile: bool = True
    graph: bool = True
    smoke: bool = False


class Tally:
    """Loss and right guesses since the last look, in tensors that a captured step adds to."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._guesses = torch.zeros(len(TASKS), 2, device=device)
        self._tasks = torch.arange(len(TASKS), device=device)

    def add(self, loss: Tensor, right: Tensor, counted: Tensor, task: Tensor) -> None:
        """One step: right guesses (B, S) bool among the counted ones (B, S) bool, by the rows' tasks (B,)."""
        self._loss.add_(loss)
        rows = torch.stack([(right & counted).sum(dim=1), counted.sum(dim=1)], dim=1).float()
        self._guesses.addmm_((self._tasks[:, None] == task).float(), rows)

    def take(self) -> tuple[float, list[list[float]]]:
        """Sum of losses, and [right, counted] of every task; waits for the device, and starts anew."""
        found = self._loss.item(), self._guesses.tolist()
        self._loss.zero_()
        self._guesses.zero_()
        return found


class TextTraining:
    """The step, its tensors, the checkpoint and the loop."""

    def __init__(self, options: TextOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        torch.manual_seed(options.seed)
        self.model: Any = text_model(SMOKE_SIZE if options.smoke else TextSize())
        if options.start_from is not None:
            fill_tensors(dict(self.model.named_parameters()), options.start_from)
        self.model.to(device).train()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        trained = dict(self.model.named_parameters())
        self.optimizer = Optimizer(trained, kind=options.optimizer, weight_decay=options.weight_decay)
        self.average = WeightAverage(list(trained.values()), list(self.averaged.parameters()))
        self.forward = TextForward(self.model, compiled=options.compile and device.type == "cuda")
        self.tally = Tally(device)
        lengths = _SMOKE_LENGTHS if options.smoke else LENGTHS
        self.curriculum = Curriculum(tuple(length for length in lengths if length <= options.longest))
        self.lengths: dict[int, tuple[ExerciseBatches, StepRunner]] = {}
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._probes: dict[int, Probe] = {}
        self.done = 0
        self.tokens = 0
        self.elapsed_seconds = 0.0

    def step(self, batches: ExerciseBatches) -> None:
        """One update; device work only."""
        self.optimizer.zero_grad()
        examples = batches.next()
        ids, weight = masked_batch(examples)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            loss, right = self.forward.losses(ids, examples.ids, weight)
        loss.backward()
        self.optimizer.step()
        self.average.update()
        self.tally.add(loss.detach(), right, (ids == MASK) & telling(examples), examples.task)

    def run(self, since: float) -> bool:
        """Train until the budget or the slice ends; saves the checkpoint and the pack."""
        options = self.options
        self.load_checkpoint(since)
        # Another stream of exercises and masks in each slice; the generator is captured with the step.
        torch.manual_seed(options.seed * 1_000_003 + self.done + 1)
        self._set_learning_rate(self.elapsed_seconds / (options.minutes * 60))
        # What an earlier slice had unlocked is prepared before the clock starts.
        for length in self.curriculum.lengths[: self.curriculum.unlocked]:
            self._prepare(length, since)
        clock = Clock(
            options.minutes * 60,
            elapsed_seconds=self.elapsed_seconds,
            slice_ends=since + options.slice_seconds - _SLICE_MARGIN_SECONDS,
        )
        clock.start()
        self._loop(clock, since)
        self.elapsed_seconds = clock.elapsed_seconds
        self.save_checkpoint(since)
        if options.pack is not None:
            write_pack(self.averaged, options.pack, self._facts())
            say(f"averaged weights in {options.pack}", since=since)
        self._probe(since)
        state = "finished" if clock.finished else "call again with the same --state to continue"
        minutes = clock.elapsed_seconds / 60
        say(f"{minutes:.2f} of {options.minutes:g} minutes, step {self.done}: {state}", since=since)
        return clock.finished

    def _prepare(self, length: int, since: float) -> None:
        """The supply of rows of a length, and its step, compiled at the first length and captured at each."""
        rows = max(1, self.options.batch_tokens // length)
        batches = ExerciseBatches(tokens=length, rows=rows, batches=self.options.chunk, device=self.device)
        runner = StepRunner(
            lambda: self.step(batches), self.device, graph=self.options.graph, stream=self._stream
        )
        runner.prepare()
        self.done += runner.WARM_UP
        self.lengths[length] = (batches, runner)
        say(f"rows of {length}: {rows} per step, prepared", since=since)

    def _loop(self, clock: Clock, since: float) -> None:
        options, report = self.options, _Report(clock, self.done)
        self.tally.take()
        probed_at = clock.elapsed_seconds
        over = clock.finished or clock.slice_over
        while not over:
            rate = self._set_learning_rate(clock.fraction)
            length = self.curriculum.choose(clock.fraction)
            if length not in self.lengths:
                with clock.pause():
                    self._prepare(length, since)
                    self.tally.take()
            batches, runner = self.lengths[length]
            began = clock.elapsed_seconds
            batches.refill()
            runner.run(options.chunk)
            loss, guesses = self.tally.take()  # waits for the chunk, so the clock is true
            self.done += options.chunk
            self.tokens += options.chunk * batches.rows * length
            if not loss < float("inf"):
                raise SystemExit(f"the loss is {loss} at step {self.done}; lower --learning-rate")
            right, counted = guesses[TASKS.index("facts")]
            self.curriculum.tell(length, clock.elapsed_seconds - began, right / max(1.0, counted))
            report.add(length, options.chunk, batches.rows * length, loss, guesses)
            over = clock.finished or clock.slice_over
            if over or report.seconds >= options.report_seconds:
                say(report.line(self.done, rate, clock.fraction), since=since)
                report = _Report(clock, self.done)
            if clock.elapsed_seconds - probed_at >= options.probe_minutes * 60 and not over:
                with clock.pause():
                    self._probe(since)
                probed_at = clock.elapsed_seconds

    def _set_learning_rate(self, fraction: float) -> float:
        options = self.options
        rate = learning_rate_at(
            fraction, self.done, peak=options.learning_rate, warmup_steps=options.warmup_steps
        )
        self.optimizer.set_learning_rate(rate)
        return rate

    def _probe(self, since: float) -> None:
        """Exact matches of the averaged weights at every unlocked length, in one line each."""
        if not self.options.probe_rows:
            return
        for length in self.curriculum.lengths[: self.curriculum.unlocked]:
            if length not in self._probes:
                self._probes[length] = self._probe_of(length)
            shares = self._probes[length].shares(self.averaged)
            found = "  ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
            say(f"exact at {length} tokens, step {self.done}: {found}", since=since)

    def _probe_of(self, length: int) -> Probe:
        rows = min(self.options.probe_rows, max(8, 2 * self.options.batch_tokens // length))
        steps = 8 if self.options.smoke else 24
        return Probe.of(length, rows, self.device, every_task=length <= EVERY_TASK, steps=steps)

    def _state_tensors(self) -> dict[str, Tensor]:
        """Everything a later slice needs, by name: the same objects, so a checkpoint is copied into them."""
        tensors: dict[str, Tensor] = {"average.count": self.average.count}
        for prefix, model in (("model", self.model), ("average", self.averaged)):
            tensors |= {f"{prefix}.{name}": value.data for name, value in model.named_parameters()}
        return tensors | {
            f"optimizer.{name}": value for name, value in self.optimizer.state_tensors().items()
        }

    def save_checkpoint(self, since: float) -> None:
        """Write the state folder's checkpoint."""
        facts = self._identity() | {
            "step": self.done,
            "tokens": self.tokens,
            "elapsed_seconds": self.elapsed_seconds,
            "curriculum": self.curriculum.facts(),
        }
        save_checkpoint(self.options.state, self._state_tensors(), facts)
        say(f"checkpoint at step {self.done}", since=since)

    def load_checkpoint(self, since: float) -> None:
        """Continue from the state folder's checkpoint, if there is one."""
        facts = checkpoint_facts(self.options.state)
        if facts is None:
            return
        different = [name for name, value in self._identity().items() if facts.get(name) != value]
        if different:
            raise SystemExit(
                f"{self.options.state} was written with another {', '.join(different)}; use the same options "
                "or another --state"
            )
        load_checkpoint(self.options.state, self._state_tensors())
        self.done, self.tokens = facts["step"], facts["tokens"]
        self.elapsed_seconds = facts["elapsed_seconds"]
        self.curriculum.restore(facts["curriculum"])
        say(f"continuing at step {self.done}, {self.elapsed_seconds / 60:.2f} minutes", since=since)

    def _identity(self) -> dict[str, Any]:
        options = self.options
        return {name: getattr(options, name) for name in ("optimizer", "smoke", "batch_tokens", "longest")}

    def _facts(self) -> dict[str, Any]:
        options, device = self.options, self.device
        return (
            self._identity()
            | started_from(options.start_from)
            | {
                "steps": self.done,
                "tokens": self.tokens,
                "minutes": self.elapsed_seconds / 60,
                "lengths": list(self.curriculum.lengths[: self.curriculum.unlocked]),
                "learning_rate": options.learning_rate,
                "weight_decay": options.weight_decay,
                "seed": options.seed,
                "commit": options.commit,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }
        )


def train_text(options: TextOptions, *, since: float) -> bool:
    """Run one slice of the training; returns whether the whole budget is spent."""
    device = training_device(smoke=options.smoke)
    options.state.mkdir(parents=True, exist_ok=True)
    return TextTraining(options, device).run(since)


def masked_batch(examples: Examples) -> tuple[Tensor, Tensor]:
    """Mask answer tokens at random, and weigh them: (B, S) int64 ids and (B, S) float32.

    LLaDA's loss (arXiv 2502.09992, equation 3): a share t of the answer is masked, and masked tokens count
    1 / t. The shares are stratified over the batch. Two departures: every answer token of a batch has the
    same weight, so that rows with many answers count for more, and the `<eos>` after the first have a tenth
    of it, because a short answer would otherwise be a few words in a row of certainties.
    """
    rows, tokens = examples.ids.shape
    device = examples.ids.device
    level = (torch.arange(rows, device=device) + torch.rand(rows, device=device)) / rows
    level = ((1.0 - _LEAST_MASKED) * level + _LEAST_MASKED)[:, None]
    offset = answer_offsets(examples)
    masked = (offset >= 0) & (torch.rand(rows, tokens, device=device) < level)
    weight = torch.where(offset <= examples.length[:, None], 1.0, _TAIL_WEIGHT) * (offset >= 0)
    return torch.where(masked, MASK, examples.ids), weight * masked / (level * weight.sum())


def telling(examples: Examples) -> Tensor:
    """(B, S) bool: answer tokens that show whether a task is mastered; of looked-up facts only the values.

    The rest of such an answer repeats the question.
    """
    offset = answer_offsets(examples)
    value = (offset % FACT_TOKENS == 2) | (offset % FACT_TOKENS == 3)
    inside = (offset >= 0) & (offset < examples.length[:, None])
    return inside & (value | (examples.task != TASKS.index("facts"))[:, None])


class _Report:
    """What a line of progress sums up."""

    def __init__(self, clock: Clock, step: int) -> None:
        self._clock, self._began, self._step = clock, clock.elapsed_seconds, step
        self._tokens = 0
        self._losses: dict[int, list[float]] = {}
        self._guesses = [[0.0, 0.0] for _ in TASKS]

    @property
    def seconds(self) -> float:
        return self._clock.elapsed_seconds - self._began

    def add(self, length: int, steps: int, step_tokens: int, loss: float, guesses: list[list[float]]) -> None:
        self._tokens += steps * step_tokens
        total = self._losses.setdefault(length, [0.0, 0])
        total[0] += loss
        total[1] += steps
        for mine, new in zip(self._guesses, guesses, strict=True):
            mine[0] += new[0]
            mine[1] += new[1]

    def line(self, step: int, rate: float, fraction: float) -> str:
        losses = "  ".join(
            f"{length}: {total / steps:.3f}" for length, (total, steps) in self._losses.items()
        )
        guesses = "  ".join(
            f"{name} {100 * right / counted:.0f}%"
            for name, (right, counted) in zip(TASKS, self._guesses, strict=True)
            if counted
        )
        seconds = max(1e-9, self.seconds)
        return (
            f"step {step}  loss {losses}  guessed {guesses}  lr {rate:.1e}  {100 * fraction:.1f}%  "
            f"{(step - self._step) / seconds:.1f} steps/s  {self._tokens / seconds / 1e6:.3f} M tokens/s"
        )
