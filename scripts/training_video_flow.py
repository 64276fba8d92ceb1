"""Second stage of the video model: the Wan transformer, trained jointly with its text encoder.

Training goes from single frames over short clips to whole ones. Colours, shapes and grounds are learnt from
frames of 64 tokens, of which a second of training sees twenty times as many as whole clips of 1088; what is
left for the whole clips is how things move.
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffctrl.zoo import clips
from diffctrl.zoo.models import NOISE_SHIFT
from diffctrl.zoo.video import VideoParts, VideoSize, caption_ids, video_parts, video_pipeline

from .training_checkpoint import checkpoint_facts, load_checkpoint, save_checkpoint
from .training_loop import Clock, StepRunner, say, training_device
from .training_optimizer import Optimizer, WeightAverage, learning_rate_at
from .training_pack import component_tensors, file_hash
from .training_video_forward import VideoForward, encode, to_rows
from .training_video_pack import RECOMMENDED, read_video_pack, write_video_pack
from .training_video_vae import SMOKE_SIZE, load_video_vae, rendered, sample_clips

_TRAINED = ("transformer", "text_encoder")
_SLICE_MARGIN_SECONDS = 30.0
_STAGES = ((0.0, 1, 16), (0.12, 5, 4), (0.27, 17, 1))
"""From which share of the budget on, how many latent frames, and how many times the batch of whole clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFlowOptions:
    """Options of the stage; the command line's names and defaults.

    Args:
        state: folder of the checkpoint and the encoded pool; a second call with it continues.
        vae: weights of the first stage, with the `.json` beside them.
        pack: file that gets all averaged weights at the end of each slice.
        start_from: pack whose weights a new run starts from.
        minutes: training time of the whole run, without pool, compilation and checks.
        slice_seconds: this process ends within so many seconds of its start, checkpoint included.
        batch: whole clips per step; shorter stages take more.
        pool: encoded clips, 70 kB each on the device.
        keep_pool: save the pool, so that the next slice loads it.
        whole: only whole clips from the start, as when going on from trained weights.
        learning_rate: peak.
        warmup_steps: linear warm-up.
        optimizer: "adamw", or "muon" for hidden matrices.
        shift: noise shift in training and checks.
        chunk: steps between two looks at the clock.
        check_minutes: training time between two checks by the judge.
        check_captions: captions in a check.
        seed: of weights, clips and noise.
        commit: recorded in the pack.
        compile: use torch.compile for the repeated layers.
        graph: capture the whole step.
        smoke: short CPU run of a small model at 32 px.
    """

    state: Path
    vae: Path
    pack: Path | None = None
    start_from: Path | None = None
    minutes: float = 12.0
    slice_seconds: float = 560.0
    batch: int = 64
    pool: int = 60_000
    keep_pool: bool = True
    whole: bool = False
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    optimizer: str = "muon"
    shift: float = NOISE_SHIFT
    chunk: int = 32
    check_minutes: float = 2.5
    check_captions: int = 32
    seed: int = 0
    commit: str = "unknown"
    compile: bool = True
    graph: bool = True
    smoke: bool = False


class CaptionedClips:
    """Indices and fresh captions of the next batches, in tensors that a captured step reads.

    Args:
        scenes: clips on the device.
        batch: batch size.
        batches: steps per refill.
        empty_share: share of captions replaced by the empty one.
        detailed_share: share of captions that name everything.
    """

    def __init__(
        self,
        scenes: clips.Clips,
        *,
        batch: int,
        batches: int,
        empty_share: float = 0.1,
        detailed_share: float = 0.5,
    ) -> None:
        self.scenes, self.batches = scenes, batches
        self.empty_share, self.detailed_share = empty_share, detailed_share
        self.index = torch.zeros(batches, batch, dtype=torch.int64, device=scenes.device)
        self.ids = torch.zeros(batches, batch, 32, dtype=torch.int64, device=scenes.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=scenes.device)

    def refill(self) -> None:
        """Draw the next `batches` batches and start again at the first of them."""
        device, total = self.index.device, self.index.numel()
        index = torch.randint(len(self.scenes), (total,), device=device)
        uniforms = torch.rand(total, clips.CAPTION_UNIFORMS, device=device)
        uniforms = clips.detailed(uniforms, torch.rand(total, device=device) < self.detailed_share)
        words = clips.caption_words(self.scenes.select(index), uniforms)
        words = words.masked_fill(torch.rand(total, 1, device=device) < self.empty_share, -1)
        self.index.copy_(index.view_as(self.index))
        self.ids.copy_(caption_ids(words).view_as(self.ids))
        self.position.zero_()

    def next(self) -> tuple[Tensor, Tensor]:
        """(B,) clip indices and (B, 32) token ids at the position, which moves on by one."""
        index, ids = (source.index_select(0, self.position).squeeze(0) for source in (self.index, self.ids))
        self.position.add_(1).remainder_(self.batches)
        return index, ids


def train_video_flow(options: VideoFlowOptions, *, since: float) -> bool:
    """Run one slice of the training; returns whether the whole budget is spent."""
    device = training_device(smoke=options.smoke)
    options.state.mkdir(parents=True, exist_ok=True)
    rows, scenes = _pool(options, device, since)
    return VideoTraining(options, rows, scenes, device).run(since)


class VideoTraining:
    """The steps, their tensors, the checkpoint and the loop of this stage."""

    def __init__(
        self, options: VideoFlowOptions, rows: Tensor, scenes: clips.Clips, device: torch.device
    ) -> None:
        self.options, self.rows, self.scenes, self.device = options, rows, scenes, device
        torch.manual_seed(options.seed)
        self.parts = _start_parts(options, device)
        copies = {
            name: copy.deepcopy(getattr(self.parts, name)).eval().requires_grad_(False) for name in _TRAINED
        }
        self.averaged = VideoParts(vae=self.parts.vae, **copies)
        trained, averages = _parameters(self.parts), _parameters(self.averaged)
        self.optimizer = Optimizer(trained, kind=options.optimizer)
        self.average = WeightAverage(list(trained.values()), [averages[name] for name in trained])
        self.forward = VideoForward(self.parts, compiled=options.compile and device.type == "cuda")
        self.total = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.done, self.elapsed_seconds = 0, 0.0

    def step(self, batches: CaptionedClips, frames: int) -> None:
        """One update on the first latent frames of some clips; device work only."""
        self.optimizer.zero_grad()
        index, ids = batches.next()
        rows = self.rows[:, :frames].index_select(0, index)
        noise = torch.randn(rows.shape, device=self.device)
        level = self._noise_levels(len(index))
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            loss = self.forward.loss(rows, ids, noise, level)
        loss.backward()
        self.optimizer.step()
        self.average.update()
        self.total.add_(loss.detach())

    def _noise_levels(self, batch: int) -> Tensor:
        """(B,) logit-normal noise levels, shifted to high noise; one in each B-th of the distribution."""
        strata = torch.arange(batch, device=self.device, dtype=torch.float32)
        level = torch.special.ndtri((strata + torch.rand(batch, device=self.device)) / batch).sigmoid()
        return self.options.shift * level / (1.0 + (self.options.shift - 1.0) * level)

    def run(self, since: float) -> bool:
        """Train until the budget or the slice ends; saves the checkpoint and the pack."""
        options = self.options
        self._load_checkpoint(since)
        torch.manual_seed(options.seed * 1_000_003 + self.done + 1)
        clock = Clock(
            options.minutes * 60,
            elapsed_seconds=self.elapsed_seconds,
            slice_ends=since + options.slice_seconds - _SLICE_MARGIN_SECONDS,
        )
        clock.start()
        stage, runner, batches, batch = -1, None, None, options.batch
        self.total.zero_()
        reported, reported_at, checked_at = self.done, clock.elapsed_seconds, clock.elapsed_seconds
        over = clock.finished
        while not over:
            if (now := self._stage(clock.fraction)) != stage or runner is None or batches is None:
                stage = now
                with clock.pause():
                    runner, batches, batch = self._start_stage(stage, since)
                    self.total.zero_()
                reported, reported_at = self.done, clock.elapsed_seconds
            rate = self._set_learning_rate(clock.fraction)
            batches.refill()
            runner.run(options.chunk)
            self.done += options.chunk
            total = self.total.item()  # waits for the chunk, so the clock is true
            if not total < float("inf"):
                raise SystemExit(f"the loss is {total} at step {self.done}; lower --learning-rate")
            over = clock.finished or clock.slice_over
            if self.done - reported >= 200 or over:
                steps, seconds = self.done - reported, clock.elapsed_seconds - reported_at
                say(
                    f"step {self.done}  {_STAGES[stage][1]} latent frames  loss {total / steps:.4f}  "
                    f"lr {rate:.1e}  {100 * clock.fraction:.1f}%  {steps / seconds:.1f} steps/s  "
                    f"{steps * batch / seconds:.0f} samples/s",
                    since=since,
                )
                self.total.zero_()
                reported, reported_at = self.done, clock.elapsed_seconds
            if clock.elapsed_seconds - checked_at > options.check_minutes * 60 and not over:
                with clock.pause():
                    self._check(f"check at step {self.done}", since)
                checked_at = clock.elapsed_seconds
        self.elapsed_seconds = clock.elapsed_seconds
        self._save_checkpoint(since)
        self._write_pack(since)
        if clock.finished:
            self._check("last check", since)
        state = "finished" if clock.finished else "call again with the same --state to continue"
        say(
            f"{self.elapsed_seconds / 60:.2f} of {options.minutes:g} minutes, step {self.done}: {state}",
            since=since,
        )
        return clock.finished

    def _stage(self, fraction: float) -> int:
        if self.options.whole:
            return len(_STAGES) - 1
        return max(index for index, (start, *_) in enumerate(_STAGES) if fraction >= start)

    def _start_stage(self, stage: int, since: float) -> tuple[StepRunner, CaptionedClips, int]:
        """Compile and capture the step of a stage; its warm-up steps are real ones."""
        _, frames, times = _STAGES[stage]
        batch = self.options.batch * times
        batches = CaptionedClips(self.scenes, batch=batch, batches=self.options.chunk)
        batches.refill()
        runner = StepRunner(
            lambda: self.step(batches, frames), self.device, graph=self.options.graph, stream=self.stream
        )
        self._set_learning_rate(_STAGES[stage][0])
        runner.prepare()
        self.done += runner.WARM_UP
        say(f"{frames} latent frames, {batch} clips a step: step ready", since=since)
        return runner, batches, batch

    def _set_learning_rate(self, fraction: float) -> float:
        rate = learning_rate_at(
            fraction, self.done, peak=self.options.learning_rate, warmup_steps=self.options.warmup_steps
        )
        self.optimizer.set_learning_rate(rate)
        return rate

    def _check(self, label: str, since: float) -> None:
        """Draw unseen captions with the averaged weights and let the judge read the clips."""
        from .evaluation_video import judged_line, video_suite

        if not self.options.check_captions:
            return
        suite = video_suite(self.options.check_captions, seed=991)
        size = SMOKE_SIZE if self.options.smoke else VideoSize()
        pipeline: Any = video_pipeline(self.averaged, shift=self.options.shift)
        pipeline.set_progress_bar_config(disable=True)
        call = RECOMMENDED | {"num_inference_steps": 2} if self.options.smoke else RECOMMENDED
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            videos = pipeline(
                suite.captions,
                height=size.pixels,
                width=size.pixels,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
                **call,
            ).frames
        say(f"{label}: {judged_line(videos.float().cpu(), suite)}", since=since)

    def _state_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"average.count": self.average.count}
        for prefix, parts in (("model", self.parts), ("average", self.averaged)):
            for name in _TRAINED:
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
        kept = ("latents_mean", "latents_std", "psnr_mean_db", "psnr_5th_percentile_db")
        facts = {name: autoencoder[name] for name in kept} | {
            "vae_steps": autoencoder["steps"],
            "vae_minutes": autoencoder["minutes"],
            "steps": self.done,
            "minutes": self.elapsed_seconds / 60,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        recorded = (
            "smoke",
            "shift",
            "batch",
            "optimizer",
            "learning_rate",
            "pool",
            "seed",
            "commit",
            "whole",
        )
        facts |= {name: getattr(options, name) for name in recorded}
        if options.start_from is not None:
            _, before = read_video_pack(options.start_from)
            facts["started_from"] = {key: before.get(key) for key in ("steps", "minutes", "commit")}
        write_video_pack(self.averaged, options.pack, facts)
        say(f"averaged weights in {options.pack}", since=since)


@torch.no_grad()
def encoded_rows(vae: Any, scenes: clips.Clips, *, device: torch.device, size: int) -> Tensor:
    """(N, F, P, 4 C) float16 on the device: posterior means of whole clips, scaled, as patches."""
    vae.to(device)
    shift, scale = (
        torch.tensor(values, device=device)[:, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    rows: Tensor | None = None
    start = 0
    for videos in rendered(scenes, device=device, size=size):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = encode(vae, videos * 2 - 1)[0].float().transpose(1, 2)
        part = to_rows((mean - shift) / scale).half()
        if rows is None:
            rows = torch.empty(len(scenes), *part.shape[1:], dtype=torch.float16, device=device)
        rows[start : start + len(part)] = part
        start += len(part)
    if rows is None or not bool(torch.isfinite(rows).all()):
        raise ValueError("the encoded pool holds no finite latents; check the autoencoder's weights")
    return rows


def _pool(options: VideoFlowOptions, device: torch.device, since: float) -> tuple[Tensor, clips.Clips]:
    """Encoded clips and the clips; the latents come from the state folder when an earlier slice left them."""
    path = options.state / "pool.safetensors"
    source = f"{file_hash(options.vae)} {options.pool} {options.seed}"
    scenes = sample_clips(options.pool, seed=options.seed + 2)
    if path.is_file():
        with safe_open(path, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("source") == source:
                say(f"{options.pool} encoded clips loaded", since=since)
                return file.get_tensor("rows"), scenes.to(device)
    size = (SMOKE_SIZE if options.smoke else VideoSize()).pixels
    rows = encoded_rows(load_video_vae(options.vae), scenes, device=device, size=size)
    part = rows[:: max(1, len(rows) // 512)].float()
    say(
        f"{len(rows)} clips encoded, mean {part.mean().item():.3f}, deviation {part.std().item():.3f}",
        since=since,
    )
    if options.keep_pool:
        save_file({"rows": rows.cpu()}, path, metadata={"source": source})
        say("pool saved", since=since)
    return rows, scenes.to(device)


def _start_parts(options: VideoFlowOptions, device: torch.device) -> VideoParts:
    parts = video_parts(SMOKE_SIZE if options.smoke else VideoSize())
    if options.start_from is not None:
        parts, _ = read_video_pack(options.start_from)
    parts.vae = load_video_vae(options.vae)
    for name, module in parts.items():
        module.to(device).train(name in _TRAINED).requires_grad_(name in _TRAINED)
    return parts


def _parameters(parts: VideoParts) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": value for name in _TRAINED for key, value in getattr(parts, name).named_parameters()
    }
