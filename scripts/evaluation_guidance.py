"""What `evaluate_guidance.py` draws and reads: conditions, pictures in large batches, the judge beside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffctrl.drawing.hunt import PipelineSampler
from diffctrl.processors.universe import universe_of
from diffctrl.scripts.evaluation_image import named_facts, suites, to_bytes
from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import HuntConfig, Pair, Universe
from diffctrl.softpag.headhunt.objectives import SharpnessObjective
from diffctrl.softpag.headset import HeadSet
from diffctrl.zoo import worlds

Set = tuple[Head, ...]
_CHUNK = 8
_STYLE_SEED = 55_000
_RANDOM_SEED = 2506


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to draw every prompt.

    Attributes:
        name: in tables.
        heads: the perturbed heads: one set for all prompts, or one for each; empty for none.
        u, w, s: strength, guidance scale, classifier-free scale (1 is off).
    """

    name: str
    heads: Set | Sequence[Set] = ()
    u: float = 0.5
    w: float = 3.0
    s: float = 1.0

    def sets(self, count: int) -> list[Set]:
        """The set of each prompt."""
        if self.heads and not isinstance(self.heads[0], Head):
            return list(self.heads[:count])  # type: ignore[arg-type]
        return [tuple(self.heads)] * count  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """Rows through the denoiser for each picture and step."""
        return 1 + (self.s > 1) + bool(self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the judge and a filter say of one picture.

    Attributes:
        exact: all that the prompt names is right.
        share: of the named facts that are right.
        facts: (attribute, right) of each.
        style: as the judge calls it, or None.
        sharpness: log10 of the variance of the Laplacian.
    """

    exact: bool
    share: float
    facts: list[tuple[str, bool]]
    style: str | None
    sharpness: float


@dataclass(slots=True)
class Drawn:
    """The pictures of a condition: a few of them, and what was read in all."""

    condition: Condition
    samples: Tensor
    seconds: float
    _futures: list[Future[list[Any]]] = field(default_factory=list)
    _sharpness: list[float] = field(default_factory=list)
    _reads: list[Read] | None = None

    @property
    def reads(self) -> list[Read]:
        if self._reads is None:
            judged = [one for future in self._futures for one in future.result()]
            self._reads = [
                Read(exact=exact, share=share, facts=facts, style=style, sharpness=sharpness)
                for (exact, share, facts, style), sharpness in zip(judged, self._sharpness, strict=True)
            ]
        return self._reads


class Studio:
    """Draws conditions with one pipeline and has them judged in processes beside it. Use as a context.

    Args:
        pipe: a stock pipeline on its device.
        call: arguments of its call: size, steps, text length.
        batch: pictures at a time.
        workers: judging processes; 0 judges here.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], batch: int, workers: int) -> None:
        self._pipe, self._batch = pipe, batch
        self._call = {name: value for name, value in call.items() if name != "guidance_scale"}
        self._encoded: dict[str, dict[str, Tensor]] = {}
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None
        self.universe = universe_of(pipe)
        self.forwards = 0
        self.pictures = 0

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, prompts: Sequence[str]) -> None:
        """Embed prompts in batches, with the empty negative prompt beside them."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        length = {name: self._call[name] for name in ("max_sequence_length",) if name in self._call}
        for first in range(0, len(missing), self._batch):
            part = missing[first : first + self._batch]
            with torch.no_grad():
                made = self._pipe.encode_prompt(part, None, None, do_classifier_free_guidance=True, **length)
            names = (
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            )
            for index, prompt in enumerate(part):
                rows = zip(names, made, strict=True)
                self._encoded[prompt] = {name: value[index : index + 1] for name, value in rows}

    def draw(self, condition: Condition, pairs: Sequence[Pair], samples: int = 0) -> Drawn:
        """Draw and begin to judge; `samples` of the pictures are kept."""
        self.encode([pair.prompt for pair in pairs])
        began, cfg = time.monotonic(), condition.s > 1
        config = HuntConfig(
            u=condition.u, w=condition.w, guidance_scale=condition.s, mode="prefix", steady=False
        )

        def encode(prompt: str) -> dict[str, Tensor]:
            found = self._encoded[prompt]
            return {name: each for name, each in found.items() if cfg or not name.startswith("negative")}

        sampler = PipelineSampler(self._pipe, config, self._call, universe=self.universe, encode=encode)
        drawn, kept = Drawn(condition, torch.empty(0), 0.0), []
        sets = condition.sets(len(pairs))
        try:
            for first in range(0, len(pairs), self._batch):
                part = slice(first, first + self._batch)
                pictures = to_bytes(sampler.sample(pairs[part], sets[part]))
                self._judge(drawn, pictures, [pair.prompt for pair in pairs[part]])
                if first < samples:
                    kept.append(pictures[: samples - first])
        finally:
            sampler.close()
        self.forwards += len(pairs) * condition.rows * self._call["num_inference_steps"]
        self.pictures += len(pairs)
        drawn.samples = torch.cat(kept) if kept else drawn.samples
        drawn.seconds = time.monotonic() - began
        print(f"  {condition.name}: {len(pairs)} pictures in {drawn.seconds:.1f} s", flush=True)
        return drawn

    def _judge(self, drawn: Drawn, pictures: Tensor, prompts: list[str]) -> None:
        drawn._sharpness += SharpnessObjective().score(pictures.float() / 255.0, prompts)
        for first in range(0, len(prompts), _CHUNK):
            job = pictures[first : first + _CHUNK].numpy(), prompts[first : first + _CHUNK]
            if self._pool is not None:
                drawn._futures.append(self._pool.submit(_judged, *job))
                continue
            done: Future[list[Any]] = Future()
            done.set_result(_judged(*job))
            drawn._futures.append(done)


def _judged(pictures: np.ndarray, prompts: list[str]) -> list[Any]:
    from diffctrl.zoo import judge

    torch.set_num_threads(1)
    found = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        verdict = judge.check(torch.from_numpy(picture).float() / 255.0, judge.parse(prompt))
        share = sum(verdict.facts.values()) / len(verdict.facts)
        found.append((bool(verdict.exact), share, named_facts(verdict), verdict.reading.style))
    return found


def unseen_pairs(count: int) -> list[Pair]:
    """Prompts of the test split, one and two objects in turn, each with a seed of its own."""
    one, two = suites(count + count % 2, 0, 0)
    pairs = [
        Pair(text, seed)
        for suite in (one, two)
        for text, seed in zip(suite.captions, suite.seeds, strict=True)
    ]
    half = len(pairs) // 2
    return [pair for couple in zip(pairs[:half], pairs[half:], strict=True) for pair in couple][:count]


def styleless_pairs(count: int) -> list[Pair]:
    """Prompts of the test split that name no style."""
    scenes = worlds.sample(4 * count, seed=_STYLE_SEED, world="shapes", split="test", objects=(1, 2))
    generator = torch.Generator().manual_seed(_STYLE_SEED)
    uniforms = torch.rand(len(scenes), worlds.CAPTION_UNIFORMS, generator=generator)
    texts = worlds.to_text(worlds.caption_words(scenes, uniforms))
    said = worlds.said(scenes, uniforms)
    kept = [text for text, facts in zip(texts, said, strict=True) if facts.style is None]
    return [Pair(text, _STYLE_SEED + index) for index, text in enumerate(kept[:count])]


def unknown_to(pairs: Sequence[Pair], headsets: Iterable[HeadSet]) -> list[Pair]:
    """The pairs whose prompts no search or choice has used: short captions come up in both streams."""
    used = set()
    for headset in headsets:
        used |= {prompt for prompt, _ in headset.pairs}
        used |= {each["prompt"] for each in headset.use.get("pairs", ())}
    return [pair for pair in pairs if pair.prompt not in used]


def random_sets(universe: Universe, size: int, count: int) -> list[Set]:
    """A random set of heads for each prompt: their mean is what a set of this size does on average."""
    draw = random.Random(_RANDOM_SEED)
    return [tuple(draw.sample(universe.heads, size)) for _ in range(count)]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by the normal approximation."""
    array = np.asarray(values, dtype=np.float64)
    half = 1.96 * array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else 0.0
    return float(array.mean()), float(array.mean() - half), float(array.mean() + half)


def paired(first: Drawn, second: Drawn, value: Callable[[Read], float]) -> tuple[float, float, float]:
    """Mean difference over the same prompts and seeds, with its 95 % interval."""
    return mean_interval(
        [value(one) - value(other) for one, other in zip(first.reads, second.reads, strict=True)]
    )
