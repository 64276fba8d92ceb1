"""Second stage of the image model: the SD3 transformer, trained jointly with its text encoders."""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffctrl.zoo import worlds
from diffctrl.zoo.models import NOISE_SHIFT, ImageParts, ImageSize, image_parts
from diffctrl.zoo.tokenizers import WordTokens

from .training_checkpoint import checkpoint_facts, load_checkpoint, save_checkpoint
from .training_image_data import CaptionedBatches, LatentPool, latent_pool, sample_scenes, worker_count
from .training_image_forward import TrainingForward
from .training_image_pack import read_pack, write_pack
from .training_image_probe import Probe, sample_images
from .training_image_vae import SMOKE_SIZE, load_vae
from .training_loop import Clock, StepRunner, say, training_device
from .training_optimizer import Optimizer, WeightAverage, learning_rate_at
from .training_pack import component_tensors, file_hash

_TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_SLICE_MARGIN_SECONDS = 25.0


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
        pool: encoded scenes, 16 kB each on the device.
        keep_pool: save the pool, so that the next slice loads it.
        learning_rate: peak.
        warmup_steps: linear warm-up.
        optimizer: "adamw", or "muon" for hidden matrices.
        shift: noise shift in training and checks.
        chunk: steps between two looks at the clock.
        check_minutes: training time between two checks by the judge.
        check_captions: captions in a check.
        seed: of weights, scenes and noise.
        commit: recorded in the pack.
        compile: use torch.compile for the repeated layers.
        graph: capture the whole step.
        smoke: short CPU run of a small model at 32 px.
    """

    state: Path
    vae: Path
    pack: Path | None = None
    start_from: Path | None = None
    minutes: float = 15.0
    slice_seconds: float = 540.0
    batch: int = 512
    pool: int = 400_000
    keep_pool: bool = True
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    optimizer: str = "adamw"
    shift: float = NOISE_SHIFT
    chunk: int = 64
    check_minutes: float = 1.5
    check_captions: int = 64
    seed: int = 0
    commit: str = "unknown"
    compile: bool = True
    graph: bool = True
    smoke: bool = False


def train_flow(options: FlowOptions, *, since: float) -> bool:
    """Run one slice of the training; returns whether the whole budget is spent."""
    device = training_device(smoke=options.smoke)
    options.state.mkdir(parents=True, exist_ok=True)
    tokens = WordTokens.of(worlds.WORDS).to(device)
    eighth = options.check_captions // 8
    counts = {"one": 3 * eighth, "two": 3 * eighth, "characters": options.check_captions - 6 * eighth}
    probe = Probe(counts, tokens=tokens.to("cpu"), workers=0 if options.smoke else 2)
    try:
        pool = _pool(options, device, since)
        training = FlowTraining(options, pool, tokens, device)
        return training.run(probe, since)
    finally:
        probe.close()


class FlowTraining:
    """The step, its tensors, the checkpoint and the loop of this stage."""

    def __init__(
        self, options: FlowOptions, pool: LatentPool, tokens: WordTokens, device: torch.device
    ) -> None:
        self.options, self.pool, self.tokens, self.device = options, pool, tokens, device
        torch.manual_seed(options.seed)
        self.parts = _start_parts(options, device)
        self.averaged = _copied(self.parts)
        trained = _trained_parameters(self.parts)
        averages = _trained_parameters(self.averaged)
        self.optimizer = Optimizer(trained, kind=options.optimizer)
        self.average = WeightAverage(list(trained.values()), [averages[name] for name in trained])
        self.forward = TrainingForward(self.parts, compiled=options.compile and device.type == "cuda")
        self.batches = CaptionedBatches(pool.scenes, tokens, batch=options.batch, batches=options.chunk)
        self.total = torch.zeros((), device=device)
        self.strata = torch.arange(options.batch, device=device, dtype=torch.float32)
        self.done = 0
        self.elapsed_seconds = 0.0

    def step(self) -> None:
        """One update; device work only."""
        self.optimizer.zero_grad()
        index, clip_ids, t5_ids = self.batches.next()
        rows = self.pool.rows.index_select(0, index)
        noise = torch.randn(rows.shape, device=self.device)
        level = self.noise_levels()
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            loss = self.forward.loss(rows, clip_ids, t5_ids, noise, level)
        loss.backward()
        self.optimizer.step()
        self.average.update()
        self.total.add_(loss.detach())

    def noise_levels(self) -> Tensor:
        """(B,) logit-normal noise levels, shifted to high noise; one in each B-th of the distribution."""
        spread = (self.strata + torch.rand(self.options.batch, device=self.device)) / self.options.batch
        level = torch.special.ndtri(spread).sigmoid()
        return self.options.shift * level / (1.0 + (self.options.shift - 1.0) * level)

    def run(self, probe: Probe, since: float) -> bool:
        """Train until the budget or the slice ends; saves the checkpoint and the pack."""
        options = self.options
        self.load_checkpoint(since)
        # Another stream of noise and captions in each slice; the generator is captured with the step.
        torch.manual_seed(options.seed * 1_000_003 + self.done + 1)
        runner = StepRunner(self.step, self.device, graph=options.graph)
        self._set_learning_rate(self.elapsed_seconds / (options.minutes * 60))
        self.batches.refill()
        runner.prepare()
        self.done += runner.WARM_UP
        say("step compiled" + (" and captured" if options.graph else ""), since=since)
        clock = Clock(
            options.minutes * 60,
            elapsed_seconds=self.elapsed_seconds,
            slice_ends=since + options.slice_seconds - _SLICE_MARGIN_SECONDS,
        )
        clock.start()
        self._loop(runner, clock, probe, since)
        self.elapsed_seconds = clock.elapsed_seconds
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.save_checkpoint(since)
        self._write_pack(since)
        self._check(probe, "last check")
        for line in probe.finished(wait=True):
            say(line, since=since)
        state = "finished" if clock.finished else "call again with the same --state to continue"
        say(
            f"{clock.elapsed_seconds / 60:.2f} of {options.minutes:g} minutes, step {self.done}: {state}",
            since=since,
        )
        return clock.finished

    def _loop(self, runner: StepRunner, clock: Clock, probe: Probe, since: float) -> None:
        options = self.options
        self.total.zero_()
        reported_steps, reported_at = self.done, clock.elapsed_seconds
        checked_at = clock.elapsed_seconds
        over = clock.finished or clock.slice_over
        while not over:
            rate = self._set_learning_rate(clock.fraction)
            self.batches.refill()
            runner.run(options.chunk)
            self.done += options.chunk
            total = self.total.item()  # waits for the chunk, so the clock is true
            if not total < float("inf"):
                raise SystemExit(f"the loss is {total} at step {self.done}; lower --learning-rate")
            over = clock.finished or clock.slice_over
            if self.done - reported_steps >= 200 or over:
                steps, seconds = self.done - reported_steps, clock.elapsed_seconds - reported_at
                say(
                    f"step {self.done}  loss {total / steps:.4f}  lr {rate:.1e}  "
                    f"{100 * clock.fraction:.1f}%  {steps / seconds:.1f} steps/s  "
                    f"{steps * options.batch / seconds:.0f} samples/s",
                    since=since,
                )
                self.total.zero_()
                reported_steps, reported_at = self.done, clock.elapsed_seconds
            if clock.elapsed_seconds - checked_at > options.check_minutes * 60 and not over:
                with clock.pause():
                    self._check(probe, f"check at step {self.done}")
                checked_at = clock.elapsed_seconds
            for line in probe.finished():
                say(line, since=since)

    def _set_learning_rate(self, fraction: float) -> float:
        rate = learning_rate_at(
            fraction, self.done, peak=self.options.learning_rate, warmup_steps=self.options.warmup_steps
        )
        self.optimizer.set_learning_rate(rate)
        return rate

    def _check(self, probe: Probe, label: str) -> None:
        """Draw the probe's captions with the averaged weights and hand them to the judge."""
        if not probe.captions:
            return
        images = sample_images(
            self.averaged,
            probe.clip_ids.to(self.device),
            probe.t5_ids.to(self.device),
            tokens=self.tokens,
            shift=self.options.shift,
            steps=8 if self.options.smoke else 28,
        )
        probe.submit(label, images)

    def _state_tensors(self) -> dict[str, Tensor]:
        """Everything a later slice needs, by name: the same objects, so a checkpoint is copied into them."""
        tensors: dict[str, Tensor] = {"average.count": self.average.count}
        for prefix, parts in (("model", self.parts), ("average", self.averaged)):
            for name in _TRAINED:
                own = component_tensors(name, getattr(parts, name))
                tensors |= {f"{prefix}.{key}": value for key, value in own.items()}
        return tensors | {f"optimizer.{key}": value for key, value in self.optimizer.state_tensors().items()}

    def save_checkpoint(self, since: float) -> None:
        """Write the state folder's checkpoint."""
        facts = {
            "step": self.done,
            "elapsed_seconds": self.elapsed_seconds,
            "optimizer": self.options.optimizer,
            "smoke": self.options.smoke,
        }
        save_checkpoint(self.options.state, self._state_tensors(), facts)
        say(f"checkpoint at step {self.done}", since=since)

    def load_checkpoint(self, since: float) -> None:
        """Continue from the state folder's checkpoint, if there is one."""
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
        if self.options.pack is None:
            return
        autoencoder = json.loads(self.options.vae.with_suffix(".json").read_text())
        facts = {
            "smoke": self.options.smoke,
            "shift": self.options.shift,
            "scaling_factor": autoencoder["scaling_factor"],
            "shift_factor": autoencoder["shift_factor"],
            "psnr_mean_db": autoencoder["psnr_mean_db"],
            "psnr_5th_percentile_db": autoencoder["psnr_5th_percentile_db"],
            "vae_steps": autoencoder["steps"],
            "vae_minutes": autoencoder["minutes"],
            "steps": self.done,
            "batch": self.options.batch,
            "minutes": self.elapsed_seconds / 60,
            "optimizer": self.options.optimizer,
            "learning_rate": self.options.learning_rate,
            "pool": self.options.pool,
            "seed": self.options.seed,
            "commit": self.options.commit,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        if self.options.start_from is not None:
            _, before = read_pack(self.options.start_from)
            facts["started_from"] = {
                key: before.get(key) for key in ("steps", "minutes", "commit", "started_from")
            }
        write_pack(self.averaged, self.options.pack, facts)
        say(f"averaged weights in {self.options.pack}", since=since)


def _pool(options: FlowOptions, device: torch.device, since: float) -> LatentPool:
    """The encoded pool, from the state folder when an earlier slice left it there."""
    path = options.state / "pool.safetensors"
    source = f"{file_hash(options.vae)} {options.pool} {options.seed}"
    pool = LatentPool.load(path, device, source=source)
    if pool is not None:
        say(f"{len(pool.rows)} encoded scenes loaded", since=since)
        return pool
    scenes = sample_scenes(
        options.pool, seed=options.seed + 2, workers=0 if options.smoke else worker_count()
    )
    say(f"{len(scenes)} scenes sampled", since=since)
    vae = load_vae(options.vae)
    pool = latent_pool(vae, scenes, device=device, size=vae.config.sample_size, source=source)
    rows = pool.rows[:: max(1, len(pool.rows) // 4096)].float()
    say(
        f"{len(pool.rows)} scenes encoded, mean {rows.mean().item():.3f}, deviation {rows.std().item():.3f}",
        since=since,
    )
    if options.keep_pool:
        pool.save(path)
        say("pool saved", since=since)
    return pool


def _start_parts(options: FlowOptions, device: torch.device) -> ImageParts:
    parts = image_parts(SMOKE_SIZE if options.smoke else ImageSize())
    if options.start_from is not None:
        parts, _ = read_pack(options.start_from)
    parts.vae = load_vae(options.vae)
    for name, module in parts.items():
        module.to(device).train(name in _TRAINED).requires_grad_(name in _TRAINED)
    return parts


def _copied(parts: ImageParts) -> ImageParts:
    """A second set of the trained components, for the average; the autoencoder is shared."""
    copies = {name: copy.deepcopy(getattr(parts, name)).eval().requires_grad_(False) for name in _TRAINED}
    return ImageParts(vae=parts.vae, **copies)


def _trained_parameters(parts: ImageParts) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": value for name in _TRAINED for key, value in getattr(parts, name).named_parameters()
    }
