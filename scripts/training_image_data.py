"""Scenes, pictures and captions for the image training, as tensors that stay on the device."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffctrl.zoo import worlds
from diffctrl.zoo.tokenizers import MAX_TOKENS, WordTokens
from diffctrl.zoo.worlds.vocabulary import IN_FRONT_OF

from .training_image_forward import to_rows

SHAPES_SHARE = 0.45
"""Share of shape scenes; the rest are characters, which have more to learn: six fields, small ones too, each
named in a part of the captions."""

OVERLAP_SHARE = 0.25
"""Share of the shape scenes that are pairs, one in front of the other, beyond those that the world has. At
their natural 8 % the model drew one of five such pairs wrong, and nearly every other relation right."""

_SCENES_A_CHUNK = 4096


def sample_scenes(count: int, *, seed: int, split: str = "train", workers: int = 0) -> worlds.Scenes:
    """Draw scenes of both worlds on the CPU; the result does not depend on the number of workers.

    Args:
        count: number of scenes; the first `SHAPES_SHARE` are shapes, the rest characters.
        seed: seed of the whole draw.
        split: "train", where `OVERLAP_SHARE` of the shapes are overlapping pairs; "test" or "heldout" (shapes
            only), as the world has them.
        workers: processes; 0 draws in this process.
    """
    shapes = count if split == "heldout" else round(count * SHAPES_SHARE)
    pairs = round(shapes * OVERLAP_SHARE) if split == "train" else 0
    jobs = [
        *_jobs("shapes", shapes - pairs, seed, split),
        *_jobs("shapes", pairs, seed + 1, split, objects=(2,)),
        *_jobs("characters", count - shapes, seed, split),
    ]
    if workers < 2 or len(jobs) < 2:
        return worlds.concatenate([_sample(job) for job in jobs])
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_sample_arrays, jobs, chunksize=2))
    scenes = [
        worlds.Scenes(world=world, **{name: torch.from_numpy(value) for name, value in arrays.items()})
        for world, arrays in parts
    ]
    return worlds.concatenate(scenes)


def rendered_chunks(
    scenes: worlds.Scenes, *, device: torch.device, size: int, chunk: int
) -> Iterator[Tensor]:
    """Pictures of scenes in order, (b, 3, size, size) float32 in [0, 1] on the device, b at most `chunk`."""
    characters = scenes.character.cpu()
    # Neighbouring runs of one world are drawn by that world's code alone, which halves the work.
    edges = [0, *(torch.nonzero(characters[1:] != characters[:-1]).flatten() + 1).tolist(), len(scenes)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        world = "characters" if bool(characters[start]) else "shapes"
        for first in range(start, stop, chunk):
            part = scenes.select(slice(first, min(first + chunk, stop))).to(device)
            only = worlds.Scenes(world=world, **part.tensors())
            yield worlds.render(only, size=size)[0]


def image_pool(scenes: worlds.Scenes, *, device: torch.device, size: int) -> Tensor:
    """All pictures at once as bytes: (N, 3, size, size) uint8 on the device."""
    pool = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8, device=device)
    start = 0
    for images in rendered_chunks(
        scenes, device=device, size=size, chunk=1024 if device.type == "cuda" else 64
    ):
        pool[start : start + len(images)] = (images * 255.0).round_().clamp_(0, 255).to(torch.uint8)
        start += len(images)
    return pool


@dataclass(frozen=True, slots=True)
class LatentPool:
    """Encoded scenes.

    Args:
        rows: (N, P, 4 C) float16, scaled latents as patches (`to_rows`).
        scenes: the N scenes, on the same device.
        source: what it was made of; a saved pool of another source is not reused.
    """

    rows: Tensor
    scenes: worlds.Scenes
    source: str = ""

    def save(self, path: Path) -> None:
        """Write the pool to a safetensors file for a later slice of the same run."""
        tensors = {
            f"scenes.{name}": value.contiguous().cpu() for name, value in self.scenes.tensors().items()
        }
        save_file(
            {"rows": self.rows.cpu(), **tensors},
            path,
            metadata={"world": self.scenes.world, "source": self.source},
        )

    @classmethod
    def load(cls, path: Path, device: torch.device, *, source: str) -> "LatentPool | None":
        """Read a pool back onto a device; None where there is none of this source."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt", device=str(device)) as file:
            facts = file.metadata() or {}
            if facts.get("source") != source:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rows = tensors.pop("rows")
        fields = {name.removeprefix("scenes."): value for name, value in tensors.items()}
        return cls(rows, worlds.Scenes(world=facts["world"], **fields), source)


@torch.no_grad()
def latent_pool(
    vae: torch.nn.Module, scenes: worlds.Scenes, *, device: torch.device, size: int, source: str
) -> LatentPool:
    """Encode scenes with a trained autoencoder.

    The posterior mean is kept, not a sample: the decoder has seen samples around it, so it is the safest
    place to aim at, and its distribution is the sharper one to learn.
    """
    vae.to(device)
    chunk = 1024 if device.type == "cuda" else 32
    rows: Tensor | None = None
    start = 0
    for images in rendered_chunks(scenes, device=device, size=size, chunk=chunk):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = vae.encode(images * 2.0 - 1.0).latent_dist.mean.float()
        part = to_rows((mean - vae.config.shift_factor) * vae.config.scaling_factor).half()
        if rows is None:
            rows = torch.empty(len(scenes), *part.shape[1:], dtype=torch.float16, device=device)
        rows[start : start + len(part)] = part
        start += len(part)
    if rows is None or not bool(torch.isfinite(rows).all()):
        raise ValueError("the encoded pool holds no finite latents; check the autoencoder's weights")
    return LatentPool(rows, scenes.to(device), source)


class CaptionedBatches:
    """Scene indices and fresh captions of the next batches, in tensors that a captured step reads.

    Captions are made for `batches` steps at once: as a few hundred small launches they would cost more than
    a step each time, spread over the steps they cost nothing.

    Args:
        scenes: scenes on the device.
        tokens: word tables on the device.
        batch: batch size.
        batches: steps per refill.
        empty_share: share of captions replaced by the empty one, in all encoders.
        detailed_share: share of captions that name all they have room for (`worlds.detailed`).
    """

    def __init__(
        self,
        scenes: worlds.Scenes,
        tokens: WordTokens,
        *,
        batch: int,
        batches: int,
        empty_share: float = 0.1,
        detailed_share: float = 0.5,
    ) -> None:
        self.scenes = scenes
        self.tokens = tokens
        self.batches = batches
        self.empty_share = empty_share
        self.detailed_share = detailed_share
        device = scenes.device
        self.index = torch.zeros(batches, batch, dtype=torch.int64, device=device)
        self.clip_ids = torch.zeros(batches, batch, MAX_TOKENS, dtype=torch.int64, device=device)
        self.t5_ids = torch.zeros(batches, batch, MAX_TOKENS, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def refill(self) -> None:
        """Draw the next `batches` batches and start again at the first of them."""
        device = self.index.device
        total = self.index.numel()
        index = torch.randint(len(self.scenes), (total,), device=device)
        uniforms = torch.rand(total, worlds.CAPTION_UNIFORMS, device=device)
        uniforms = worlds.detailed(uniforms, torch.rand(total, device=device) < self.detailed_share)
        words = worlds.caption_words(self.scenes.select(index), uniforms)
        empty = torch.rand(total, 1, device=device) < self.empty_share
        words = words.masked_fill(empty, -1)
        self.index.copy_(index.view_as(self.index))
        self.clip_ids.copy_(self.tokens.clip_ids(words).view_as(self.clip_ids))
        self.t5_ids.copy_(self.tokens.t5_ids(words).view_as(self.t5_ids))
        self.position.zero_()

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) scene indices, (B, T) CLIP ids and (B, T) T5 ids at the position, which moves on by one.

        Device work only; the caller refills after `batches` calls.
        """
        index, clip_ids, t5_ids = (
            source.index_select(0, self.position).squeeze(0)
            for source in (self.index, self.clip_ids, self.t5_ids)
        )
        self.position.add_(1).remainder_(self.batches)
        return index, clip_ids, t5_ids


def worker_count() -> int:
    """Processes worth starting here; leaves two cores to the training loop."""
    return max(1, (os.cpu_count() or 1) - 2)


def _jobs(world: str, count: int, seed: int, split: str, **options: Any) -> list[tuple[int, dict[str, Any]]]:
    return [
        (
            min(_SCENES_A_CHUNK, count - first),
            {"seed": seed, "index": first // _SCENES_A_CHUNK, "world": world, "split": split, **options},
        )
        for first in range(0, count, _SCENES_A_CHUNK)
    ]


def _sample(job: tuple[int, dict[str, Any]]) -> worlds.Scenes:
    """One chunk; of pairs only those that overlap, which are one in five."""
    number, options = job
    if "objects" not in options:
        return worlds.sample(number, **options)
    drawn = worlds.sample(8 * number + 64, **options)
    overlapping = torch.nonzero(drawn.relation == IN_FRONT_OF).flatten()[:number]
    return drawn.select(overlapping)


def _sample_arrays(job: tuple[int, dict[str, Any]]) -> tuple[str, dict[str, np.ndarray]]:
    """One chunk as numpy arrays: tensors would travel between processes as open files, thousands of them."""
    torch.set_num_threads(1)
    scenes = _sample(job)
    return scenes.world, {name: value.numpy() for name, value in scenes.tensors().items()}
