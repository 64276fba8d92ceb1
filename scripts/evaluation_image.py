"""What `evaluate_zoo.py` asks of an image model: fixed unseen captions, pictures, the judge's readings."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffctrl.zoo import worlds

ONE, TWO, HELD_OUT, CHARACTERS = "one object", "two objects", "held-out triples", "characters"
SCENE_FACTS = ("kind", "count", "background", "texture", "style", "relation")
_SEEDS = {ONE: 51_000, TWO: 52_000, HELD_OUT: 53_000, CHARACTERS: 54_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One set of captions.

    Args:
        name: of the set.
        scenes: the scenes that the captions describe; their renders give the judge's ceiling.
        captions: one per scene.
        seeds: one per caption, of the starting noise.
    """

    name: str
    scenes: worlds.Scenes
    captions: list[str]
    seeds: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Readings of one set of pictures.

    Args:
        exact: per picture, whether all that its caption names is right.
        facts: (attribute, right) of every named fact of every picture.
    """

    exact: list[bool]
    facts: list[tuple[str, bool]]


def suites(count: int, held_out: int, characters: int) -> list[Suite]:
    """The fixed sets: `count` shape scenes, half with one object and half with two, and two more."""
    chosen = [
        (ONE, count - count // 2, {"world": "shapes", "split": "test", "objects": (1,)}),
        (TWO, count // 2, {"world": "shapes", "split": "test", "objects": (2,)}),
        (HELD_OUT, held_out, {"world": "shapes", "split": "heldout", "objects": (1,)}),
        (CHARACTERS, characters, {"world": "characters", "split": "test", "objects": (1, 2)}),
    ]
    return [_suite(name, number, options) for name, number, options in chosen if number]


def _suite(name: str, count: int, options: dict[str, Any]) -> Suite:
    seed = _SEEDS[name]
    scenes = worlds.sample(8 * count if name == HELD_OUT else count, seed=seed, **options)
    draw = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(scenes), worlds.CAPTION_UNIFORMS, generator=draw)
    if name == HELD_OUT:  # the triple is only asked for where the caption names all three of it
        named = [
            all(None not in (thing.colour, thing.shape, thing.pattern) for thing in facts.objects)
            for facts in worlds.said(scenes, uniforms)
        ]
        keep = torch.tensor(named).nonzero().flatten()[:count]
        scenes, uniforms = scenes.select(keep), uniforms[keep]
    captions = worlds.to_text(worlds.caption_words(scenes, uniforms))
    seeds = [seed + index for index in range(len(captions))]
    return Suite(name=name, scenes=scenes, captions=captions, seeds=seeds)


def drawn(pipeline: Any, suite: Suite, *, batch: int, call: dict[str, Any]) -> Tensor:
    """Pictures of a suite's captions by the real pipeline.

    Args:
        pipeline: a text-to-image pipeline.
        suite: captions and seeds; each picture has its own generator, so the batch size does not matter.
        batch: captions per call.
        call: arguments of the call.

    Returns:
        (N, 3, H, W) uint8 on the CPU.
    """
    pictures = []
    for first in range(0, len(suite.captions), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in suite.seeds[first : first + batch]]
        images = pipeline(
            suite.captions[first : first + batch], generator=generators, output_type="pt", **call
        ).images
        pictures.append(to_bytes(images))
    return torch.cat(pictures)


def rendered(suite: Suite, size: int, *, chunk: int = 32) -> Tensor:
    """The suite's scenes as the renderer draws them: (N, 3, size, size) float32 on the CPU."""
    parts = [
        worlds.render(suite.scenes.select(slice(first, first + chunk)), size=size)[0]
        for first in range(0, len(suite.scenes), chunk)
    ]
    return torch.cat(parts)


@torch.no_grad()
def round_trips(vae: Any, images: Tensor, *, batch: int) -> Tensor:
    """Pictures through the autoencoder's mean: (N, 3, H, W) float32 in [0, 1], on the CPU."""
    parts = []
    for part in images.split(batch):
        latents = vae.encode(part.to(vae.device, vae.dtype) * 2.0 - 1.0).latent_dist.mean
        parts.append((vae.decode(latents).sample.float() * 0.5 + 0.5).clamp(0, 1).cpu())
    return torch.cat(parts)


def psnr(images: Tensor, decoded: Tensor) -> Tensor:
    """(N,) PSNR in dB of pictures in [0, 1]."""
    return -10.0 * (images - decoded).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] floats to uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


class Judges:
    """The judge in several processes; use as a context.

    Args:
        workers: processes; below 2 the judge runs in this one.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def read(self, images: Tensor, captions: list[str]) -> Judged:
        """Check pictures (N, 3, H, W) uint8 against their captions."""
        jobs = [
            (images[first : first + 8].numpy(), captions[first : first + 8])
            for first in range(0, len(captions), 8)
        ]
        parts = self._pool.map(_judge, jobs) if self._pool is not None else map(_judge, jobs)
        verdicts = [verdict for part in parts for verdict in part]
        return Judged(
            exact=[exact for exact, _ in verdicts],
            facts=[fact for _, facts in verdicts for fact in facts],
        )


def _judge(job: tuple[np.ndarray, list[str]]) -> list[tuple[bool, list[tuple[str, bool]]]]:
    from diffctrl.zoo import judge

    torch.set_num_threads(1)
    pictures, captions = job
    verdicts = []
    for picture, caption in zip(pictures, captions, strict=True):
        verdict = judge.check(torch.from_numpy(picture).float() / 255.0, judge.parse(caption))
        verdicts.append((bool(verdict.exact), named_facts(verdict)))
    return verdicts


def named_facts(verdict: Any) -> list[tuple[str, bool]]:
    """(attribute, right): a fact of the scene once, one of an object once per object named."""
    scene = [(name, right) for name, right in verdict.facts.items() if name in SCENE_FACTS]
    return scene + [(name, right) for thing in verdict.objects for name, right in thing.items()]


def share(flags: list[bool]) -> tuple[float, float, float, int]:
    """Share of true values in per cent, its 95 % Wilson interval, and their number."""
    from diffctrl.zoo.judge import wilson

    low, high = wilson(sum(flags), len(flags))
    return 100 * sum(flags) / max(1, len(flags)), 100 * low, 100 * high, len(flags)
