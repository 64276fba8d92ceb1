"""First stage of the image model: the autoencoder."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffctrl.zoo import worlds
from diffctrl.zoo.models import ImageSize, image_vae

from .training_image_data import image_pool, rendered_chunks, sample_scenes, worker_count
from .training_loop import Clock, StepRunner, say, training_device
from .training_optimizer import Optimizer, learning_rate_at

SMOKE_SIZE = ImageSize(
    latent_size=16, vae_channels=(16, 32), layers=2, heads=2, head_dim=32, positions=16, text_width=32
)
_EDGE_WEIGHT = 0.5
_KL_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeOptions:
    """Options of the stage; the command line's names and defaults.

    Args:
        out: folder that gets `vae.safetensors` and `vae.json`.
        minutes: training time, without rendering and compiling.
        batch: pictures per step.
        pool: rendered training pictures, 49 kB each on the device.
        learning_rate: peak.
        seed: of weights, scenes and order.
        compile: use torch.compile.
        graph: capture the step.
        smoke: short CPU run of a small model at 32 px.
    """

    out: Path
    minutes: float = 3.3
    batch: int = 64
    pool: int = 150_000
    learning_rate: float = 1.5e-3
    seed: int = 0
    compile: bool = True
    graph: bool = True
    smoke: bool = False


def train_vae(options: VaeOptions, *, since: float) -> dict[str, Any]:
    """Train, measure and save the autoencoder; returns what `vae.json` holds."""
    device = training_device(smoke=options.smoke)
    size = SMOKE_SIZE if options.smoke else ImageSize()
    pixels = size.latent_size * 2 ** (len(size.vae_channels) - 1)
    options.out.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(
        options.pool, seed=options.seed + 1, workers=0 if options.smoke else worker_count()
    )
    say(f"{len(scenes)} scenes sampled", since=since)
    pool = image_pool(scenes, device=device, size=pixels)
    say(f"{len(scenes)} pictures of {pixels} px rendered", since=since)
    torch.manual_seed(options.seed)
    vae: Any = image_vae(size)  # diffusers' wrapped `to` hides its arguments
    vae = vae.to(device).train()
    if device.type == "cuda":
        vae = vae.to(memory_format=torch.channels_last)
    training = _VaeTraining(vae, pool, options, device)
    steps = training.run(since)
    del pool
    return _finish(vae, training, scenes, options, steps=steps, pixels=pixels, since=since)


class _VaeTraining:
    """The step, its tensors and the loop of this stage."""

    def __init__(self, vae: nn.Module, pool: Tensor, options: VaeOptions, device: torch.device) -> None:
        self.options, self.device, self.pool, self.vae = options, device, pool, vae
        self.optimizer = Optimizer(dict(vae.named_parameters()), kind="adamw")
        self.kl_weight = torch.full((), _KL_WEIGHT, device=device)
        self.totals = torch.zeros(4, device=device)
        self.clock = Clock(options.minutes * 60)
        objective = _objective(vae, channels_last=device.type == "cuda")
        compiled = options.compile and device.type == "cuda"
        self.objective = torch.compile(objective, dynamic=False) if compiled else objective
        side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (options.batch, vae.config.latent_channels, side, side)

    def step(self) -> None:
        """One update from random pictures of the pool."""
        self.optimizer.zero_grad()
        index = torch.randint(len(self.pool), (self.options.batch,), device=self.device)
        noise = torch.randn(self.latent_shape, device=self.device)
        images = self.pool.index_select(0, index)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            parts = self.objective(images, noise)
        loss = parts[0] + parts[1] + _EDGE_WEIGHT * parts[2] + self.kl_weight * parts[3]
        loss.backward()
        self.optimizer.step()
        self.totals.add_(parts.detach())

    def run(self, since: float) -> int:
        """Train to the end of the budget; returns the number of steps."""
        runner = StepRunner(self.step, self.device, graph=self.options.graph)
        self.optimizer.set_learning_rate(self.options.learning_rate / 100)
        runner.prepare()
        say("step compiled" + (" and captured" if self.options.graph else ""), since=since)
        self.totals.zero_()
        done, chunk = runner.WARM_UP, 4 if self.options.smoke else 50
        self.clock.start()
        report = self.clock.elapsed_seconds
        reported = done
        while not self.clock.finished:
            rate = learning_rate_at(
                self.clock.fraction,
                done,
                peak=self.options.learning_rate,
                warmup_steps=4 if self.options.smoke else 200,
            )
            self.optimizer.set_learning_rate(rate)
            self.kl_weight.fill_(_KL_WEIGHT * (1.0 if self.clock.fraction < 0.7 else 0.5))
            runner.run(chunk)
            done += chunk
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if self.clock.elapsed_seconds - report > 10 or self.clock.finished:
                absolute, square, edge, kl = (self.totals / (done - reported)).tolist()
                speed = (done - reported) / (self.clock.elapsed_seconds - report)
                say(
                    f"vae step {done}  L1 {absolute:.4f}  MSE {square:.5f}  edge {edge:.4f}  KL {kl:.2f}  "
                    f"lr {rate:.1e}  {speed:.1f} steps/s  {speed * self.options.batch:.0f} pictures/s",
                    since=since,
                )
                self.totals.zero_()
                report, reported = self.clock.elapsed_seconds, done
        return done


def _objective(vae: nn.Module, *, channels_last: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss terms of bytes (B, 3, H, W) with latent noise (B, C, h, w): (4,) float32."""

    def objective(images: Tensor, noise: Tensor) -> Tensor:
        target = images.float() / 127.5 - 1.0
        if channels_last:
            target = target.contiguous(memory_format=torch.channels_last)
        mean, log_variance = vae.encoder(target).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        latents = mean + (0.5 * log_variance).exp() * noise
        difference = vae.decoder(latents).float() - target
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        return torch.stack([difference.abs().mean(), difference.square().mean(), edges, kl.mean()])

    return objective


def _finish(
    vae: nn.Module,
    training: _VaeTraining,
    scenes: worlds.Scenes,
    options: VaeOptions,
    *,
    steps: int,
    pixels: int,
    since: float,
) -> dict[str, Any]:
    weights = {name: value.detach().half().cpu().contiguous() for name, value in vae.state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise SystemExit("the trained autoencoder has weights that float16 cannot hold")
    save_file(weights, options.out / "vae.safetensors")
    size = SMOKE_SIZE if options.smoke else ImageSize()
    rounded: Any = image_vae(size)
    rounded.load_state_dict({name: value.float() for name, value in weights.items()})
    rounded.to(training.device).eval()
    count = 64 if options.smoke else 4096
    picked = torch.arange(count) * (len(scenes) // count)  # every stretch of the pool, so both worlds
    shift, scale = latent_statistics(rounded, scenes.select(picked), training.device, pixels)
    psnr = round_trip_psnr(rounded, training.device, pixels, count=32 if options.smoke else 1000)
    facts: dict[str, Any] = {
        "scaling_factor": scale,
        "shift_factor": shift,
        "psnr_mean_db": psnr.mean().item(),
        "psnr_5th_percentile_db": psnr.quantile(0.05).item(),
        "psnr_scenes": len(psnr),
        "steps": steps,
        "batch": options.batch,
        "minutes": training.clock.elapsed_seconds / 60,
        "seed": options.seed,
        "smoke": options.smoke,
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu",
    }
    (options.out / "vae.json").write_text(json.dumps(facts, indent=2) + "\n")
    say(
        f"autoencoder: PSNR {facts['psnr_mean_db']:.2f} dB mean, {facts['psnr_5th_percentile_db']:.2f} dB "
        f"5th percentile on {len(psnr)} unseen scenes (bar 40 dB); scaling {scale:.4f}, shift {shift:.4f}",
        since=since,
    )
    return facts


def load_vae(weights: Path) -> Any:
    """An autoencoder saved by this stage, float32 in evaluation mode, with its measured scaling and shift."""
    facts = json.loads(weights.with_suffix(".json").read_text())
    vae = image_vae(SMOKE_SIZE if facts["smoke"] else ImageSize())
    vae.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    vae.register_to_config(scaling_factor=facts["scaling_factor"], shift_factor=facts["shift_factor"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def latent_statistics(
    vae: nn.Module, scenes: worlds.Scenes, device: torch.device, pixels: int
) -> tuple[float, float]:
    """Mean of the posterior means, and one over their standard deviation: the shift and scaling factors."""
    total, square, count = 0.0, 0.0, 0
    for images in rendered_chunks(scenes, device=device, size=pixels, chunk=128):
        mean = vae.encode(images * 2.0 - 1.0).latent_dist.mean.double()
        total += mean.sum().item()
        square += mean.square().sum().item()
        count += mean.numel()
    shift = total / count
    return shift, (square / count - shift * shift) ** -0.5


@torch.no_grad()
def round_trip_psnr(
    vae: nn.Module, device: torch.device, pixels: int, *, count: int, seed: int = 77
) -> Tensor:
    """PSNR in dB of each of `count` unseen scenes through the autoencoder's mean: (count,) float32 on the
    CPU.
    """
    scenes = sample_scenes(count, seed=seed, split="test")
    values = []
    for images in rendered_chunks(
        scenes, device=device, size=pixels, chunk=128 if device.type == "cuda" else 16
    ):
        decoded = vae.decode(vae.encode(images * 2.0 - 1.0).latent_dist.mean).sample
        error = F.mse_loss((decoded * 0.5 + 0.5).clamp(0, 1), images, reduction="none").mean(dim=(1, 2, 3))
        values.append(-10.0 * error.clamp_min(1e-10).log10())
    return torch.cat(values).float().cpu()


def started() -> float:
    """The moment that `since` counts from."""
    return time.monotonic()
