"""First stage of the video model: the causal autoencoder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffctrl.zoo import clips, judge
from diffctrl.zoo.video import VideoSize, latent_frames, video_vae

from .training_loop import say, training_device
from .training_vae import float16_weights, run_vae_training, vae_objective
from .training_video_forward import decode, encode
from .training_widening import widened

LONG_FRAMES = 129
SMOKE_SIZE = VideoSize(pixels=32, vae_width=8, layers=2, heads=2, mlp=96, text_width=32)
_CLIP_CHUNK = 4096
_IMPRECISION = 0.15
"""Of the transformer's latents, in standard deviations: the noise in which a decoder alone is trained.
A guess: how far generated latents are off was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoVaeOptions:
    """Options of the stage; the command line's names and defaults.

    Args:
        out: folder that gets `vae.safetensors` and `vae.json`.
        start_from: `vae.safetensors` of an earlier run, `vae.json` beside it, in place of random weights.
        decoder: train the decoder alone. The latents stay as they are, and so do the transformer and the
            LoRAs that were trained on them.
        decoder_width: of the decoder alone, its outermost level; a multiple of the present one.
        minutes: training time, without rendering and compiling.
        batch: clips per step.
        frames: of a training excerpt, odd. A frame depends on the 58 before it: trained on 9, the autoencoder
            reached 35 dB on 9 frames and 19 on 33.
        pool: rendered excerpts, 1.1 MB each on the device.
        learning_rate: peak.
        emphasis: how much more than others a pixel near an object counts.
        kl: weight of the KL term, halved for the last part. At 1e-3 three of eight channels held nothing, and
            shapes lost their notches.
        seed: of weights, clips and order.
        compile: use torch.compile.
        graph: capture the step.
        cpu: stay on the CPU, in full size.
        smoke: short CPU run of a small model at 32 px.
    """

    out: Path
    start_from: Path | None = None
    decoder: bool = False
    decoder_width: int | None = None
    minutes: float = 5.0
    batch: int = 5
    frames: int = 65
    pool: int = 12_000
    learning_rate: float = 1.5e-3
    emphasis: float = 10.0
    kl: float = 2e-4
    seed: int = 0
    compile: bool = True
    graph: bool = True
    cpu: bool = False
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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips in order, (b, T, 3, size, size) float32 in [0, 1] on the device, and what of them objects cover.

    The cover is (b, T, 1, size, size) float32 in [0, 1].

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
        images, masks = clips.render(scenes.select(slice(first, first + chunk)).to(device), size, times)
        yield images, masks.sum(2, keepdim=True).clamp_max(1.0)


def near(cover: Tensor) -> Tensor:
    """(b, T, 1, H, W) in [0, 1], the cover and two pixels around it: where the edges of a shape are."""
    return F.max_pool2d(cover.flatten(0, 1), 5, stride=1, padding=2).unflatten(0, cover.shape[:2])


def train_video_vae(options: VideoVaeOptions, *, since: float) -> dict[str, Any]:
    """Train, measure and save the autoencoder; returns what `vae.json` holds.

    Raises:
        SystemExit: a decoder is to be trained alone, of no earlier run; or widened, and not alone; or to
            another width than a multiple of its own.
    """
    if options.decoder and options.start_from is None:
        raise SystemExit("--decoder trains that of an earlier run; name its weights: --start-from FILE")
    if options.decoder_width is not None and not options.decoder:
        raise SystemExit("--decoder-width widens a trained decoder; give --decoder as well")
    device = training_device(smoke=options.smoke or options.cpu)
    size = SMOKE_SIZE if options.smoke else VideoSize()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    vae: Any = video_vae(size) if options.start_from is None else load_video_vae(options.start_from)
    if options.decoder_width is not None:
        try:
            vae = widened(vae, options.decoder_width)
        except ValueError as error:
            raise SystemExit(f"--decoder-width: {error}") from error
    scenes = sample_clips(options.pool, seed=options.seed + 1, frames=max(LONG_FRAMES, options.frames))
    say(f"{len(scenes)} clips sampled", since=since)
    # The fourth channel says which pixels count more: objects are a thirtieth of a clip.
    shape = (len(scenes), options.frames, 4, size.pixels, size.pixels)
    pool = torch.empty(shape, dtype=torch.uint8, device=device)
    generator = torch.Generator().manual_seed(options.seed)
    starts = torch.randint(scenes.frames - options.frames + 1, (len(scenes),), generator=generator)
    at = 0
    parts = rendered(scenes, device=device, size=size.pixels, starts=starts, length=options.frames)
    for images, cover in parts:
        pool[at : at + len(images)] = (torch.cat([images, near(cover)], 2) * 255).round_().to(torch.uint8)
        at += len(images)
    say(f"{len(pool)} excerpts of {options.frames} frames rendered", since=since)
    vae = vae.to(device).train().requires_grad_(True)
    deviation = None
    if options.decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        deviation = _IMPRECISION * torch.tensor(vae.config.latents_std, device=device)[:, None, None]
    objective = vae_objective(
        lambda x: encode(vae, x),
        lambda z: decode(vae, z),
        deviation=deviation,
        emphasis=options.emphasis,
    )
    side = size.pixels // 4
    latent_shape = (latent_frames(options.frames), vae.config.z_dim, side, side)
    steps, minutes = run_vae_training(vae, pool, objective, latent_shape, options, since)
    del pool
    return _finish(vae, options, device, steps=steps, minutes=minutes, since=since)


@torch.no_grad()
def _finish(
    vae: Any, options: VideoVaeOptions, device: torch.device, *, steps: int, minutes: float, since: float
) -> dict[str, Any]:
    """Round to float16, measure on unseen whole clips with that, and write both files."""
    from .evaluation_video import named_facts, video_suite

    weights = float16_weights(vae)
    save_file(weights, options.out / "vae.safetensors")
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    vae.eval()
    size = SMOKE_SIZE if options.smoke else VideoSize()
    suite = video_suite(16 if options.smoke else 512, seed=77)
    trip = round_trips(vae, rendered(suite.scenes, device=device, size=size.pixels))
    longer = sample_clips(2 if options.smoke else 64, seed=77, split="test", frames=LONG_FRAMES)
    long_trip = round_trips(vae, rendered(longer, device=device, size=size.pixels))
    shapes = [
        right
        for video, wanted in zip(trip.decoded, suite.facts, strict=False)
        for name, right in named_facts(judge.check_clip(video, wanted), wanted)
        if name == "shape"
    ]
    facts: dict[str, Any] = {
        "latents_mean": trip.latents.mean((0, 2)).tolist(),
        "latents_std": trip.latents.transpose(0, 1).flatten(1).std(1).tolist(),
        "psnr_mean_db": trip.decibels.mean().item(),
        "psnr_5th_percentile_db": trip.decibels.quantile(0.05).item(),
        "psnr_clips": len(trip.decibels),
        "psnr_mean_db_at_objects": trip.at_objects.mean().item(),
        f"psnr_mean_db_of_{LONG_FRAMES}_frames": long_trip.decibels.mean().item(),
        "shapes_read_back_percent": 100 * sum(shapes) / len(shapes),
        "shapes_read": len(shapes),
        "steps": steps,
        "frames": options.frames,
        "batch": options.batch,
        "decoder": options.decoder,
        "decoder_width": vae.config.decoder_base_dim,
        "minutes": minutes,
        "emphasis": options.emphasis,
        "kl": options.kl,
        "seed": options.seed,
        "smoke": options.smoke,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    if options.start_from is not None:
        before = json.loads(options.start_from.with_suffix(".json").read_text())
        kept = ("steps", "frames", "batch", "decoder", "decoder_width", "minutes", "emphasis", "kl", "device")
        facts["started_from"] = {name: before[name] for name in (*kept, "started_from") if name in before}
    (options.out / "vae.json").write_text(json.dumps(facts, indent=2) + "\n")
    say(
        f"autoencoder: PSNR {facts['psnr_mean_db']:.2f} dB mean, {facts['psnr_5th_percentile_db']:.2f} dB "
        f"5th percentile on {facts['psnr_clips']} unseen clips (bar 30 dB), "
        f"{facts['psnr_mean_db_at_objects']:.2f} dB at objects; "
        f"{facts[f'psnr_mean_db_of_{LONG_FRAMES}_frames']:.2f} dB on clips of {LONG_FRAMES} frames; the "
        f"judge reads back {facts['shapes_read_back_percent']:.1f} % of {len(shapes)} shapes",
        since=since,
    )
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrips:
    """What an autoencoder makes of N clips, on the CPU.

    Attributes:
        latents: (N, z, T h w) float64, means.
        decibels: (N,) PSNR of whole clips.
        at_objects: (N,) PSNR of the pixels of objects and two around them.
        decoded: the first clips that come back, (n, T, 3, H, W) float32 in [0, 1].
    """

    latents: Tensor
    decibels: Tensor
    at_objects: Tensor
    decoded: Tensor


def round_trips(vae: Any, videos: Iterator[tuple[Tensor, Tensor]]) -> RoundTrips:
    """Encode and decode clips with their covers, as `rendered` gives them."""
    latents, decibels, at_objects, decoded = [], [], [], []
    for clip, cover in videos:
        mean, _ = encode(vae, clip * 2 - 1)
        back = (decode(vae, mean) * 0.5 + 0.5).clamp(0, 1)
        error = (back - clip).square().mean(2, keepdim=True)
        weight = near(cover)
        local = (error * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))
        for into, one in ((decibels, error.mean((1, 2, 3, 4))), (at_objects, local)):
            into.append(-10 * one.clamp_min(1e-10).log10().cpu())
        latents.append(mean.transpose(1, 2).flatten(2).double().cpu())
        if not decoded:
            decoded.append(back.cpu())
    return RoundTrips(
        latents=torch.cat(latents),
        decibels=torch.cat(decibels),
        at_objects=torch.cat(at_objects),
        decoded=torch.cat(decoded),
    )


def load_video_vae(weights: Path) -> Any:
    """An autoencoder saved by this stage, float32 in evaluation mode, with its measured latents."""
    facts = json.loads(weights.with_suffix(".json").read_text())
    size = SMOKE_SIZE if facts["smoke"] else VideoSize()
    vae = video_vae(replace(size, decoder_width=facts.get("decoder_width")))
    vae.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    return vae.eval().requires_grad_(False)
