"""First stage of the image model: the autoencoder."""

import json
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
from .training_loop import say, training_device
from .training_vae import float16_weights, run_vae_training, vae_objective

SMOKE_SIZE = ImageSize(
    latent_size=16, vae_channels=(16, 32), layers=2, heads=2, head_dim=32, positions=16, text_width=32
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeOptions:
    """Options of the stage; the command line's names and defaults.

    Args:
        out: folder that gets `vae.safetensors` and `vae.json`.
        minutes: training time, without rendering and compiling.
        batch: pictures per step.
        pool: rendered training pictures, 49 kB each on the device.
        learning_rate: peak.
        kl: weight of the KL term, halved for the last part.
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
    kl: float = 1e-3
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
    objective = vae_objective(
        lambda x: vae.encoder(x).chunk(2, dim=1), vae.decoder, channels_last=device.type == "cuda"
    )
    latent_shape = (vae.config.latent_channels, size.latent_size, size.latent_size)
    steps, minutes = run_vae_training(vae, pool, objective, latent_shape, options, since)
    del pool
    weights = float16_weights(vae)
    save_file(weights, options.out / "vae.safetensors")
    rounded: Any = image_vae(size)
    rounded.load_state_dict({name: value.float() for name, value in weights.items()})
    rounded.to(device).eval()
    count = 64 if options.smoke else 4096
    picked = torch.arange(count) * (len(scenes) // count)  # every stretch of the pool, so both worlds
    shift, scale = latent_statistics(rounded, scenes.select(picked), device, pixels)
    psnr = round_trip_psnr(rounded, device, pixels, count=32 if options.smoke else 1000)
    facts: dict[str, Any] = {
        "scaling_factor": scale,
        "shift_factor": shift,
        "psnr_mean_db": psnr.mean().item(),
        "psnr_5th_percentile_db": psnr.quantile(0.05).item(),
        "psnr_scenes": len(psnr),
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
