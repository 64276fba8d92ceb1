"""First stage of the video model: the causal autoencoder."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffctrl.zoo import clips
from diffctrl.zoo.video import VideoSize, latent_frames, video_vae

from .training_loop import Clock, StepRunner, say, training_device
from .training_optimizer import Optimizer, learning_rate_at
from .training_video_forward import decode, encode

SMOKE_SIZE = VideoSize(pixels=32, vae_width=8, layers=2, heads=2, mlp=96, text_width=32)
_EDGE_WEIGHT = 0.5
_KL_WEIGHT = 1e-3
_CLIP_CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoVaeOptions:
    """Options of the stage; the command line's names and defaults.

    Args:
        out: folder that gets `vae.safetensors` and `vae.json`.
        minutes: training time, without rendering and compiling.
        batch: clips per step.
        frames: of a training clip, odd; the model is causal, so whole clips need not be seen.
        pool: rendered training clips, 110 kB each on the device.
        learning_rate: peak.
        seed: of weights, clips and order.
        compile: use torch.compile.
        graph: capture the step.
        smoke: short CPU run of a small model at 32 px.
    """

    out: Path
    minutes: float = 3.0
    batch: int = 32
    frames: int = 9
    pool: int = 48_000
    learning_rate: float = 1.5e-3
    seed: int = 0
    compile: bool = True
    graph: bool = True
    smoke: bool = False


def sample_clips(count: int, *, seed: int, split: str = "train", frames: int = 33) -> clips.Clips:
    """Draw clips on the CPU, in chunks of fixed size, so that a prefix of a larger draw is the same."""
    parts = [
        clips.sample(min(_CLIP_CHUNK, count - first), seed=seed, index=index, split=split, frames=frames)
        for index, first in enumerate(range(0, count, _CLIP_CHUNK))
    ]
    return clips.concatenate(parts)


def rendered(
    scenes: clips.Clips, *, device: torch.device, size: int, starts: Tensor | None = None, length: int = 33
) -> Iterator[Tensor]:
    """Clips in order, (b, T, 3, size, size) float32 in [0, 1] on the device.

    Args:
        scenes: on the CPU.
        device: where they are drawn.
        size: side in pixels.
        starts: (chunk number,) long, first frame of each chunk's excerpt; whole clips when None.
        length: frames of an excerpt.
    """
    chunk = 128 if device.type == "cuda" else 16
    for number, first in enumerate(range(0, len(scenes), chunk)):
        times = None
        if starts is not None:
            times = torch.arange(length, device=device, dtype=torch.float32) + float(starts[number])
        yield clips.render(scenes.select(slice(first, first + chunk)).to(device), size, times)[0]


def train_video_vae(options: VideoVaeOptions, *, since: float) -> dict[str, Any]:
    """Train, measure and save the autoencoder; returns what `vae.json` holds."""
    device = training_device(smoke=options.smoke)
    size = SMOKE_SIZE if options.smoke else VideoSize()
    options.out.mkdir(parents=True, exist_ok=True)
    scenes = sample_clips(options.pool, seed=options.seed + 1)
    say(f"{len(scenes)} clips sampled", since=since)
    shape = (len(scenes), options.frames, 3, size.pixels, size.pixels)
    pool = torch.empty(shape, dtype=torch.uint8, device=device)
    generator = torch.Generator().manual_seed(options.seed)
    starts = torch.randint(scenes.frames - options.frames + 1, (len(scenes),), generator=generator)
    at = 0
    for part in rendered(scenes, device=device, size=size.pixels, starts=starts, length=options.frames):
        pool[at : at + len(part)] = (part * 255).round_().to(torch.uint8)
        at += len(part)
    say(f"{len(pool)} excerpts of {options.frames} frames rendered", since=since)
    torch.manual_seed(options.seed)
    vae: Any = video_vae(size)
    vae = vae.to(device).train()
    clock = Clock(options.minutes * 60)
    steps = _train(vae, pool, options, device, clock, since)
    del pool
    return _finish(vae, options, device, steps=steps, minutes=clock.elapsed_seconds / 60, since=since)


def _objective(vae: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss terms of bytes (B, T, 3, H, W) with latent noise (B, F, C, h, w): (4,) float32."""

    def objective(videos: Tensor, noise: Tensor) -> Tensor:
        target = videos.float() / 127.5 - 1.0
        mean, log_variance = encode(vae, target)
        mean, log_variance = mean.float(), log_variance.float().clamp(-30.0, 20.0)
        difference = decode(vae, mean + (0.5 * log_variance).exp() * noise).float() - target
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        edges = difference.diff(dim=3).abs().mean() + difference.diff(dim=4).abs().mean()
        return torch.stack([difference.abs().mean(), difference.square().mean(), edges, kl.mean()])

    return objective


def _train(
    vae: Any, pool: Tensor, options: VideoVaeOptions, device: torch.device, clock: Clock, since: float
) -> int:
    on_gpu = device.type == "cuda"
    optimizer = Optimizer(dict(vae.named_parameters()), kind="adamw")
    weights = torch.tensor([1.0, 1.0, _EDGE_WEIGHT, _KL_WEIGHT], device=device)
    totals = torch.zeros(4, device=device)
    objective = _objective(vae)
    if options.compile and on_gpu:
        objective = torch.compile(objective, dynamic=False)
    side = pool.shape[-1] // 4
    latent = (options.batch, latent_frames(options.frames), vae.config.z_dim, side, side)

    def step() -> None:
        optimizer.zero_grad()
        index = torch.randint(len(pool), (options.batch,), device=device)
        noise = torch.randn(latent, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            parts = objective(pool.index_select(0, index), noise)
        (parts * weights).sum().backward()
        optimizer.step()
        totals.add_(parts.detach())

    runner = StepRunner(step, device, graph=options.graph)
    optimizer.set_learning_rate(options.learning_rate / 100)
    runner.prepare()
    say("step compiled" + (" and captured" if options.graph else ""), since=since)
    totals.zero_()
    done, chunk = runner.WARM_UP, 2 if options.smoke else 50
    reported, report = done, 0.0
    clock.start()
    while not clock.finished:
        rate = learning_rate_at(
            clock.fraction, done, peak=options.learning_rate, warmup_steps=4 if options.smoke else 200
        )
        optimizer.set_learning_rate(rate)
        weights[3] = _KL_WEIGHT * (1.0 if clock.fraction < 0.7 else 0.5)
        runner.run(chunk)
        done += chunk
        values = totals.tolist()  # waits for the chunk, so the clock is true
        if clock.elapsed_seconds - report > 10 or clock.finished:
            absolute, square, edge, kl = (value / (done - reported) for value in values)
            speed = (done - reported) / (clock.elapsed_seconds - report)
            say(
                f"vae step {done}  L1 {absolute:.4f}  MSE {square:.5f}  edge {edge:.4f}  KL {kl:.2f}  "
                f"lr {rate:.1e}  {speed:.1f} steps/s  {speed * options.batch:.0f} clips/s",
                since=since,
            )
            if not sum(values) < float("inf"):
                raise SystemExit("the loss is not finite; lower --learning-rate")
            totals.zero_()
            report, reported = clock.elapsed_seconds, done
    return done


@torch.no_grad()
def _finish(
    vae: Any, options: VideoVaeOptions, device: torch.device, *, steps: int, minutes: float, since: float
) -> dict[str, Any]:
    """Round to float16, measure on unseen whole clips with that, and write both files."""
    weights = {name: value.detach().half().cpu().contiguous() for name, value in vae.state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise SystemExit("the trained autoencoder has weights that float16 cannot hold")
    save_file(weights, options.out / "vae.safetensors")
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    vae.eval()
    size = SMOKE_SIZE if options.smoke else VideoSize()
    unseen = sample_clips(16 if options.smoke else 512, seed=77, split="test")
    means, psnr = [], []
    for videos in rendered(unseen, device=device, size=size.pixels):
        mean, _ = encode(vae, videos * 2 - 1)
        error = ((decode(vae, mean) * 0.5 + 0.5).clamp(0, 1) - videos).square().mean((1, 2, 3, 4))
        psnr.append(-10 * error.clamp_min(1e-10).log10().cpu())
        means.append(mean.transpose(1, 2).flatten(2).double().cpu())
    latents, decibels = torch.cat(means), torch.cat(psnr)
    facts: dict[str, Any] = {
        "latents_mean": latents.mean((0, 2)).tolist(),
        "latents_std": latents.transpose(0, 1).flatten(1).std(1).tolist(),
        "psnr_mean_db": decibels.mean().item(),
        "psnr_5th_percentile_db": decibels.quantile(0.05).item(),
        "psnr_clips": len(decibels),
        "steps": steps,
        "batch": options.batch,
        "minutes": minutes,
        "seed": options.seed,
        "smoke": options.smoke,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    (options.out / "vae.json").write_text(json.dumps(facts, indent=2) + "\n")
    say(
        f"autoencoder: PSNR {facts['psnr_mean_db']:.2f} dB mean, {facts['psnr_5th_percentile_db']:.2f} dB "
        f"5th percentile on {len(decibels)} unseen clips (bar 30 dB)",
        since=since,
    )
    return facts


def load_video_vae(weights: Path) -> Any:
    """An autoencoder saved by this stage, float32 in evaluation mode, with its measured latents."""
    facts = json.loads(weights.with_suffix(".json").read_text())
    vae = video_vae(SMOKE_SIZE if facts["smoke"] else VideoSize())
    vae.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    return vae.eval().requires_grad_(False)
