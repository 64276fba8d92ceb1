"""Second stage of the image model: the SD3 transformer, trained jointly with its text encoders."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.zoo import worlds
from diffctrl.zoo.models import ImageSize, image_parts
from diffctrl.zoo.tokenizers import WordTokens

from .training_flow import FlowOptions, FlowTraining, Stage, placed
from .training_image_data import CaptionedBatches, LatentPool, latent_pool, sample_scenes, worker_count
from .training_image_forward import TrainingForward
from .training_image_pack import read_pack, write_pack
from .training_image_probe import Probe, sample_images
from .training_image_vae import SMOKE_SIZE, load_vae
from .training_loop import say, training_device
from .training_pack import file_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFlowOptions(FlowOptions):
    """Options of the stage; a scene of the pool takes 16 kB on the device."""

    minutes: float = 15.0
    slice_seconds: float = 540.0
    batch: int = 512
    pool: int = 400_000
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    optimizer: str = "adamw"
    chunk: int = 64
    check_minutes: float = 1.5
    check_captions: int = 64


def train_flow(options: ImageFlowOptions, *, since: float) -> bool:
    """Run one slice of the training; returns whether the whole budget is spent."""
    device = training_device(smoke=options.smoke)
    options.state.mkdir(parents=True, exist_ok=True)
    tokens = WordTokens.of(worlds.WORDS).to(device)
    eighth = options.check_captions // 8
    counts = {"one": 3 * eighth, "two": 3 * eighth, "characters": options.check_captions - 6 * eighth}
    probe = Probe(counts, tokens=tokens.to("cpu"), workers=0 if options.smoke else 2)
    try:
        pool = _pool(options, device, since)
        return ImageTraining(options, pool, tokens, probe, device).run(since)
    finally:
        probe.close()


class ImageTraining(FlowTraining):
    """The training of the image model."""

    trained = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    vae_facts = ("scaling_factor", "shift_factor", "psnr_mean_db", "psnr_5th_percentile_db")

    def __init__(
        self,
        options: ImageFlowOptions,
        pool: LatentPool,
        tokens: WordTokens,
        probe: Probe,
        device: torch.device,
    ) -> None:
        torch.manual_seed(options.seed)
        parts = image_parts(SMOKE_SIZE if options.smoke else ImageSize())
        if options.start_from is not None:
            parts, _ = read_pack(options.start_from)
        parts.vae = load_vae(options.vae)
        super().__init__(options, placed(parts, self.trained, device), device)
        self.pool, self.tokens, self.probe = pool, tokens, probe
        self.forward = TrainingForward(self.parts, compiled=options.compile and device.type == "cuda")

    def stage(self, number: int) -> Stage:
        options = self.options
        batches = CaptionedBatches(self.pool.scenes, self.tokens, batch=options.batch, batches=options.chunk)

        def loss() -> Tensor:
            index, clip_ids, t5_ids = batches.next()
            rows = self.pool.rows.index_select(0, index)
            noise = torch.randn(rows.shape, device=self.device)
            return self.forward.loss(rows, clip_ids, t5_ids, noise, self.noise_levels(options.batch))

        return Stage(batches, loss, options.batch)

    def check(self, label: str) -> None:
        """Draw the probe's captions with the averaged weights and hand them to the judge."""
        if not self.probe.captions:
            return
        images = sample_images(
            self.averaged,
            self.probe.clip_ids.to(self.device),
            self.probe.t5_ids.to(self.device),
            tokens=self.tokens,
            shift=self.options.shift,
            steps=8 if self.options.smoke else 28,
        )
        self.probe.submit(label, images)

    def news(self, *, wait: bool = False) -> Iterable[str]:
        return self.probe.finished(wait=wait)

    def write_pack(self, path: Path, facts: dict[str, Any]) -> None:
        write_pack(self.averaged, path, facts)


def _pool(options: ImageFlowOptions, device: torch.device, since: float) -> LatentPool:
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
