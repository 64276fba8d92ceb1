"""Looking at the model while it trains: a small sampler, and the judge in processes of its own."""

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffctrl.zoo import worlds
from diffctrl.zoo.models import ImageParts, image_scheduler
from diffctrl.zoo.tokenizers import WordTokens

from .evaluation_image import named_facts
from .training_image_forward import TRAIN_TIMESTEPS, TrainingForward


@torch.no_grad()
def sample_images(
    parts: ImageParts,
    clip_ids: Tensor,
    t5_ids: Tensor,
    *,
    tokens: WordTokens,
    shift: float,
    steps: int = 28,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Draw one picture per caption with the Euler method, as the pipeline does but in one bfloat16 batch.

    Args:
        parts: components in evaluation mode on one device.
        clip_ids: (B, T) long.
        t5_ids: (B, T) long.
        tokens: word tables on the same device, for the empty caption.
        shift: noise shift of the schedule.
        steps: Euler steps.
        guidance: classifier-free guidance scale.
        seed: of the starting noise.

    Returns:
        (B, 3, H, W) uint8 on the CPU.
    """
    device = clip_ids.device
    config: Any = parts.transformer.config
    generator = torch.Generator().manual_seed(seed)
    shape = (len(clip_ids), config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator).to(device)
    scheduler: Any = image_scheduler(shift)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.tolist()
    no_words = clip_ids.new_full((len(clip_ids), 1), -1)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        context, pooled = TrainingForward(parts, compiled=False).encode_text(
            torch.cat([tokens.clip_ids(no_words), clip_ids]), torch.cat([tokens.t5_ids(no_words), t5_ids])
        )
        for level, following in zip(levels[:-1], levels[1:], strict=True):
            time = torch.full((2 * len(latents),), level * TRAIN_TIMESTEPS, device=device)
            both = parts.transformer(latents.repeat(2, 1, 1, 1), context, pooled, time, return_dict=False)[0]
            empty, named = both.float().chunk(2)
            latents = latents + (following - level) * (empty + guidance * (named - empty))
    vae: Any = parts.vae
    images = [
        vae.decode(part / vae.config.scaling_factor + vae.config.shift_factor).sample
        for part in latents.split(32)
    ]
    return ((torch.cat(images) * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


class Probe:
    """Fixed unseen captions to draw now and then; the judge reads them beside the training.

    Args:
        counts: number of captions by kind: "one", "two" (shapes), "characters".
        seed: of scenes and captions.
        workers: judging processes; 0 judges in this process.
    """

    def __init__(
        self, counts: dict[str, int], *, tokens: WordTokens, seed: int = 991, workers: int = 2
    ) -> None:
        self._pending: list[tuple[str, Future[str]]] = []
        self._pool: ProcessPoolExecutor | None = None
        self.captions: list[str] = []
        self.kinds = [kind for kind, count in counts.items() for _ in range(count)]
        if not self.kinds:
            return
        parts = []
        for kind, count in counts.items():
            world = "characters" if kind == "characters" else "shapes"
            objects = {"one": (1,), "two": (2,), "characters": (1, 2)}[kind]
            if count:
                parts.append(worlds.sample(count, seed=seed, world=world, split="test", objects=objects))
        scenes = worlds.concatenate(parts)
        draw = torch.Generator().manual_seed(seed)
        words = worlds.caption_words(scenes, torch.rand(len(scenes), worlds.CAPTION_UNIFORMS, generator=draw))
        self.captions = worlds.to_text(words)
        self.clip_ids, self.t5_ids = tokens.clip_ids(words), tokens.t5_ids(words)
        if workers:
            self._pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_one_thread
            )

    def submit(self, label: str, images: Tensor) -> None:
        """Hand pictures (B, 3, H, W) uint8 in the order of the captions to the judge."""
        job = (images.numpy(), self.captions, self.kinds)
        if self._pool is None:
            future: Future[str] = Future()
            future.set_result(judged_line(*job))
        else:
            future = self._pool.submit(judged_line, *job)
        self._pending.append((label, future))

    def finished(self, *, wait: bool = False) -> list[str]:
        """Lines of the readings that are ready, or of all of them."""
        ready = [(label, future) for label, future in self._pending if wait or future.done()]
        self._pending = [pair for pair in self._pending if pair not in ready]
        lines = []
        for label, future in ready:
            try:
                lines.append(f"{label}: {future.result()}")
            except Exception as error:  # a reading is advice; it must not end hours of training
                lines.append(f"{label}: the judge failed: {error!r}")
        return lines

    def close(self) -> None:
        """End the judging processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def judged_line(images: np.ndarray, captions: list[str], kinds: list[str]) -> str:
    """Shares of exact pictures by kind, and of right facts, in one line. `images`: (B, 3, H, W) uint8."""
    from diffctrl.zoo import judge

    exact: dict[str, list[bool]] = {}
    facts: dict[str, list[bool]] = {}
    for image, caption, kind in zip(images, captions, kinds, strict=True):
        verdict = judge.check(torch.from_numpy(image).float() / 255.0, judge.parse(caption))
        exact.setdefault(kind, []).append(bool(verdict.exact))
        for name, right in named_facts(verdict):
            facts.setdefault(name, []).append(right)
    parts = [f"{kind} exact {_share(values)}" for kind, values in exact.items()]
    return "  ".join(parts + [f"{name} {_share(values)}" for name, values in sorted(facts.items())])


def _share(values: list[bool]) -> str:
    return f"{100 * sum(values) / len(values):.0f}% ({len(values)})"


def _one_thread() -> None:
    torch.set_num_threads(1)
