"""The training of a length LoRA: the base model's own objective, under the radial mask, forward and backward.

Source: section 4.3 of arXiv 2506.19852; its code was not published. Everything that is drawn (`batches.py`)
follows from the seed and the step alone, so that a killed training goes on to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffctrl
from diffctrl import processes
from diffctrl.drawing import environment
from diffctrl.errors import BadRequestError
from diffctrl.length import LengthLoRA, Loaded, mark, unmark, write
from diffctrl.lengthening.batches import MARKS, Batches
from diffctrl.lengthening.checkpoints import Checkpoints
from diffctrl.lengthening.encoded import EncodedClips
from diffctrl.lengthening.log import Log
from diffctrl.lengthening.plan import TrainPlan
from diffctrl.lengthening.sharing import share_clips
from diffctrl.pipelines.length import adapted, base_of
from diffctrl.processors import RadialAttnProcessor

ADAPTER = "length"
_CLIP_NORM = 1.0
_DECAY = 0.01


@dataclass(frozen=True, slots=True)
class Progress:
    """What a training does now: `done` of `total` of "loading", "encoding" or "training"."""

    stage: str
    done: int
    total: int
    loss: float | None = None


OnProgress = Callable[[Progress], None]


@dataclass(slots=True)
class _Run:
    """What processors take for the scheduler: a batch's noise levels are a step of a long run."""

    step_index: int = MARKS - 1
    timesteps: range = range(MARKS)


def train(plan: TrainPlan, on_progress: OnProgress = lambda progress: None) -> Path:
    """Train, or go on where an earlier run of the same plan was stopped; returns the LoRA's file.

    Raises:
        BadRequestError: the folder is of another plan or has a LoRA without checkpoints, the model does not
            load, or the loss is not finite.
    """
    device = torch.device(plan.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # where kernels are launched
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # of the adapter; its weights stay in float32
    accelerator = processes.accelerator(plan.device)
    on_progress(Progress("loading", 0, 1))
    identity = {**plan.identity(), "processes": accelerator.num_processes // plan.ulysses_degree}
    checkpoints = Checkpoints(plan.out / "checkpoints", identity, plan.keep)
    step, _ = checkpoints.last()  # refuses to go on with other options, before anything is loaded
    if not step and plan.lora_path.exists():
        raise BadRequestError(
            f"{plan.lora_path} is there without checkpoints, and a new training would write over it; give "
            "another --out, or move it away"
        )
    clips = EncodedClips(plan)
    encoded = clips.complete
    accelerator.wait_for_everyone()  # all have looked before one of them encodes
    kind = plan.kind.velocity_model()
    dtype = getattr(torch, plan.dtype)
    # Autoencoders lose what 16 bits round off; they are small.
    dtypes = {"default": dtype, "vae": torch.float32}
    pipe = plan.source.load(dtypes, without=kind.encoders if encoded else ())
    model = kind(pipe, plan.max_sequence_length)
    if not encoded:
        _encode(plan, clips, model, accelerator, on_progress)
    return Training(plan, clips, model, accelerator, checkpoints).run(on_progress)


def _encode(
    plan: TrainPlan, clips: EncodedClips, model: Any, accelerator: Any, on_progress: OnProgress
) -> None:
    for name in model.encoders:
        getattr(model.pipe, name).to(accelerator.device)
    blocks = clips.missing(accelerator.process_index, accelerator.num_processes)
    done = 0

    def on_block() -> None:
        nonlocal done
        done += 1
        on_progress(Progress("encoding", done, len(blocks)))

    clips.encode(model, blocks, accelerator.device, on_block)
    accelerator.wait_for_everyone()
    model.pipe.register_modules(**dict.fromkeys(model.encoders))  # their memory is the transformer's now
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


class Training:
    """The steps of a plan, and what they change.

    Args:
        plan: of the training.
        clips: encoded.
        model: the pipeline in training; its transformer gets an adapter.
        accelerator: of `diffctrl.processes`, one process or several.
        checkpoints: that the training goes on from.
    """

    def __init__(
        self, plan: TrainPlan, clips: EncodedClips, model: Any, accelerator: Any, checkpoints: Checkpoints
    ) -> None:
        self.plan, self.clips, self.model, self.accelerator = plan, clips, model, accelerator
        self.checkpoints = checkpoints
        source = plan.source  # a folder's name alone: the file is for others
        given = source.folder is None or source.embedded
        self.base = base_of(model.transformer, source.name if given else source.slug)
        self.adapter = add_adapter(
            model.transformer, plan.targets, rank=plan.rank, lora_alpha=plan.lora_alpha, seed=plan.seed
        )
        if plan.start is not None:
            plan.start.load(model.transformer, self.weights())
        model.transformer.to(accelerator.device)
        if plan.checkpointing:
            model.transformer.enable_gradient_checkpointing()
        if plan.compile:
            model.transformer.compile_repeated_blocks()
        degree = plan.ulysses_degree
        groups = accelerator.num_processes // degree
        if degree > 1:
            share_clips(model.transformer, degree, groups, accelerator.device)
        model.transformer.train()
        self.optimizer = torch.optim.AdamW(
            self.adapter.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=_DECAY,
            fused=accelerator.device.type == "cuda",
        )  # fmt: skip
        self._run = _Run()
        self._moments = {name: _moments(self.optimizer, value) for name, value in self.adapter.items()}
        self.batches = Batches(
            plan, clips, shift=model.shift, rank=accelerator.process_index // degree, world=groups
        )

    def run(self, on_progress: OnProgress) -> Path:
        """All steps that are left, then the LoRA's file."""
        plan = self.plan
        start = self.checkpoints.load_last(self._state())
        for moments in self._moments.values():
            moments["step"].fill_(float(start))
        main = self.accelerator.is_main_process
        wrapped = self.model.transformer
        if self.accelerator.num_processes > 1:
            wrapped = self.accelerator.prepare_model(wrapped)
        on_progress(Progress("training", start, plan.steps))
        with self.masked(), Log(plan.out / "log.csv", start) if main else nullcontext() as log:
            for step in range(start, plan.steps):
                began = time.perf_counter()
                loss, norm = self.step(step, wrapped)
                if not math.isfinite(loss + norm):  # the norm is the same in all processes
                    raise BadRequestError(
                        f"the loss is {loss} and its gradient {norm} at step {step}; give a lower "
                        "--learning-rate and another --out"
                    )
                done = step + 1
                if log is not None:
                    log.add(done, loss, self.rate(step), norm, time.perf_counter() - began)
                if main and (done % plan.checkpoint_every == 0 or done == plan.steps):
                    self.checkpoints.save(done, self._state())
                on_progress(Progress("training", done, plan.steps, loss))
        if main:
            write(plan.lora_path, self.weights(), self.described())
        self.accelerator.wait_for_everyone()
        return plan.lora_path

    @contextmanager
    def masked(self) -> Iterator[None]:
        """The transformer under the plan's mask, or dense by the best kernel of the device."""
        modules = [site.module for site in adapted(self.model.transformer)]
        mark(modules, Loaded(lora=self.described(), adapter=ADAPTER))  # no mask without its LoRA
        try:
            attention = processor(self.plan.mask)
            with diffctrl.apply(self.model.transformer, attention, scheduler=self._run):
                yield
        finally:
            unmark(modules)

    def step(self, step: int, wrapped: Any) -> tuple[float, float]:
        """One update; returns (mean loss of this process, norm of the gradients before they are clipped)."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(self.plan.accumulate):
            last = part + 1 == self.plan.accumulate
            with nullcontext() if last else self.accelerator.no_sync(wrapped):
                loss = self.loss(step, part, wrapped) / self.plan.accumulate
                # Processes that share a clip have parts of its gradient, and processes are averaged.
                (loss * self.plan.ulysses_degree).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(list(self.adapter.values()), _CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        return total.item(), norm.item()

    def loss(self, step: int, part: int, wrapped: Any) -> Tensor:
        """The base model's objective on one batch: mean square of the error of the velocity e - x_0."""
        batch = self.batches.take(step, part)
        self._run.step_index = batch.mark
        device = self.accelerator.device
        clean, noise, level = (x.to(device).float() for x in (batch.clean, batch.noise, batch.level))
        text = {name: value.to(device) for name, value in self.model.trimmed(batch.text).items()}
        noisy = torch.lerp(clean, noise, level[:, None, None, None, None])
        found = self.model.call(wrapped, noisy, level, text)
        return (found.float() - (noise - clean)).square().mean()

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up, then half a cosine down to zero."""
        plan = self.plan
        part = max(0.0, (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
        warm = min(1.0, (step + 1) / max(1, plan.warmup_steps))
        return plan.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * part))

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Path of each adapted layer -> (A, B)."""
        layers = {path: self.model.transformer.get_submodule(path) for path in self.plan.targets}
        return {path: (x.lora_A[ADAPTER].weight, x.lora_B[ADAPTER].weight) for path, x in layers.items()}

    def described(self) -> LengthLoRA:
        """What the file says of this training."""
        plan = self.plan
        names = ("steps", "learning_rate", "warmup_steps", "batch", "accumulate", "empty_share", "sampling",
                 "seed", "dtype", "ulysses_degree")  # fmt: skip
        training = {name: getattr(plan, name) for name in names} | {
            "processes": self.accelerator.num_processes,
            "data": plan.clips.identity(),
            "size": [plan.clips.height, plan.clips.width],
            "versions": environment.versions(),
        }
        if plan.start is not None:
            training |= plan.start.described()
        return LengthLoRA(
            method=plan.method,
            rank=plan.rank,
            lora_alpha=plan.lora_alpha,
            frames=(plan.frames, plan.frames),
            latent_frames=(plan.latent_frames, plan.latent_frames),
            radial=plan.mask,
            base=self.base,
            training=training,
        )

    def _state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"lora.{name}": value for name, value in self.adapter.items()}
        for name, moments in self._moments.items():
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors


def processor(mask: Mapping[str, Any] | None) -> RadialAttnProcessor:
    """What attention in training runs: as in a run, dense at its first noise levels, or with None at all."""
    if mask is None:
        return RadialAttnProcessor(dense_fraction=1.0)
    return RadialAttnProcessor(**mask, dense_last_steps=0)


def add_adapter(
    transformer: Any, targets: Sequence[str], *, rank: int, lora_alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    """Put a new adapter on a frozen transformer; returns its parameters, float32, by name.

    The update starts at zero: A is random by the seed alone, B is zero.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    # peft annotates alpha as a whole number and divides it by the rank.
    config: Any = LoraConfig(r=rank, target_modules=list(targets))
    config.lora_alpha = lora_alpha
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    found = {name: value for name, value in transformer.named_parameters() if value.requires_grad}
    for value in found.values():
        value.data = value.data.float()
    return found


def _moments(optimizer: torch.optim.AdamW, value: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter, made before the first step so that a checkpoint can fill it."""
    fused = value.device.type == "cuda"
    optimizer.state[value] = {
        "step": torch.zeros((), device=value.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(value),
        "exp_avg_sq": torch.zeros_like(value),
    }
    return optimizer.state[value]
