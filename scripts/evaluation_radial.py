"""What `evaluate_radial.py` draws: clips under Radial Attention and under other patterns of its density."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import diffctrl
from diffctrl.attention import BlockLists
from diffctrl.control import Context, Published
from diffctrl.errors import BadRequestError
from diffctrl.processors import RadialAttnProcessor, RadialConfig
from diffctrl.processors.radial_estimate import subject_of
from diffctrl.radial import block_lists
from diffctrl.scripts.evaluation_image import psnr
from diffctrl.scripts.evaluation_length import Condition, Drawn, Studio
from diffctrl.scripts.evaluation_video import VideoSuite

DENSE, RADIAL, WINDOW, RANDOM = "dense", "radial", "window", "random"
Rival = Literal["window", "random"]
RIVALS: tuple[Rival, ...] = (WINDOW, RANDOM)
_RANDOM_SEED = 2506

# What is published for Wan 2.1, written out: the preset changes with the length of the clip.
PUBLISHED = RadialConfig(decay_factor=0.2, sink=True, dense_fraction=0.24, dense_blocks=1)


def rival_blocks(rival: Rival, kept: Tensor) -> Tensor:
    """Other key blocks for each query block, as many as `kept` has, its own one among them.

    Args:
        rival: "window", the nearest in the order of tokens; "random", drawn uniformly, always the same.
        kept: bool (n, n), rows are queries; its diagonal is set.

    >>> rival_blocks("window", torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()).int().tolist()
    [[1, 1, 0], [0, 1, 0], [1, 1, 1]]
    """
    place = torch.arange(len(kept))
    rank = (place[:, None] - place).abs().float()
    if rival == RANDOM:
        rank = torch.rand(rank.shape, generator=torch.Generator().manual_seed(_RANDOM_SEED))
        rank.fill_diagonal_(-1)
    order = rank.argsort(dim=1, stable=True)
    return order.argsort(dim=1) < kept.sum(dim=1, keepdim=True)


# Kept, as radial attention keeps its own: a run asks for the mask at its first sparse step, for every site.
@lru_cache(maxsize=8)
def rival_lists(rival: Rival, lists: BlockLists) -> BlockLists:
    """`rival_blocks` of a mask that all heads share, as lists."""
    blocks = rival_blocks(rival, lists.to_dense_blocks()[0, 0])
    return BlockLists.from_dense_blocks(blocks[None, None], lists.block, lists.lengths)


class RivalAttnProcessor(RadialAttnProcessor):
    """Radial Attention with another mask of its density: the same dense steps and blocks, the same kernels.

    Args:
        rival: see `rival_blocks`.
        config: of the radial attention to compare with.
    """

    def __init__(self, rival: Rival, config: RadialConfig) -> None:
        super().__init__(config)
        self.rival: Rival = rival

    def describe(self) -> str:
        return f"{self.rival}({super().describe()})"

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        published = super().prepare(context, previous)
        if published is None or published is previous:
            return published
        masks = {name: rival_lists(self.rival, lists) for name, lists in published.masks.items()}
        return Published(published.key, masks=masks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender(Condition):
    """One way to draw every clip.

    Attributes:
        processor: None for the stock pipeline.
        lists: what its sparse calls attend.
    """

    processor: RadialAttnProcessor | None = None
    lists: BlockLists | None = None


def contenders(pipe: Any, call: dict[str, Any], blocks: Sequence[int]) -> list[Contender]:
    """Dense attention, then for each side of a block Radial Attention and its rivals.

    Args:
        pipe: a video pipeline.
        call: arguments of its call; the size of the clips is read.
        blocks: sides of a block, in tokens.

    Raises:
        BadRequestError: blocks of this size leave nothing out.
    """
    subject = subject_of(pipe, call["height"], call["width"], call["num_frames"])
    made = [Contender(name=DENSE)]
    for block in blocks:
        processor = RadialAttnProcessor(PUBLISHED, block=block)
        pattern, _ = processor.resolved(subject.family.name, subject.layout.frames)
        lists = block_lists(pattern, subject.layout)
        if lists.is_full:
            raise BadRequestError(
                f"blocks of {block} tokens leave nothing out of {subject.layout.frames} frames of "
                f"{subject.layout.tokens} tokens; choose smaller ones or longer clips"
            )
        made.append(Contender(name=named(RADIAL, block), processor=processor, lists=lists))
        for rival in RIVALS:
            other, others = RivalAttnProcessor(rival, processor.config), rival_lists(rival, lists)
            made.append(Contender(name=named(rival, block), processor=other, lists=others))
            _check_density(made[-1], lists)
    return made


def named(shape: str, block: int) -> str:
    """A contender in tables: "radial" or a rival, and the side of a block."""
    return f"{shape}, blocks of {block}"


def _check_density(contender: Contender, radial: BlockLists) -> None:
    """Equal up to one block of each row, which is what a last block that is cut can make of equal numbers."""
    assert contender.lists is not None
    apart = contender.lists.density() - radial.density()
    if abs(apart) > 1 / radial.n_k_blocks:
        raise RuntimeError(f"{contender.name} attends {apart:+.4f} of all pairs more than Radial Attention")


@dataclass(slots=True)
class Compared(Drawn):
    """All clips of a contender, in the order of the suite.

    Attributes:
        psnr: of each clip to the dense one of the same caption and noise, in dB; empty for dense attention.
        clips: (T, 3, H, W) uint8 each; all of the dense ones, of the others the first batch.
    """

    psnr: list[float] = field(default_factory=list)


class PairedStudio(Studio):
    """A studio that compares what it draws with what dense attention drew from the same noise."""

    def compare(self, contender: Contender, suite: VideoSuite, seed: int, dense: Compared | None) -> Compared:
        """Every caption of the suite; noise by the caption's place, the same for every contender.

        Args:
            dense: the stock pipeline's clips; None draws them.

        Raises:
            RuntimeError: another mask ran than the contender's.
        """
        drawn, jobs = Compared(contender), []
        with ExitStack() as on:
            control = None
            if contender.processor is not None:
                control = on.enter_context(diffctrl.apply(self.pipe, contender.processor))
            for first in range(0, len(suite.captions), self.batch):
                part = slice(first, first + self.batch)
                videos = list(self._videos(contender, suite.captions[part], seed + first))
                jobs += [self._submit(v, f) for v, f in zip(videos, suite.facts[part], strict=True)]
                drawn.clips += videos
                if dense is not None:
                    drawn.psnr += decibels(videos, dense.clips[part])
                    del drawn.clips[self.batch :]
                print(f"  {contender.name}: {len(jobs)} of {len(suite.captions)}", flush=True)
            if control is not None:
                (stats,) = control.stats().values()
                drawn.density = stats["density"]
                _check_ran(contender, stats)
        drawn.reads = [job.result() if isinstance(job, Future) else job for job in jobs]
        return drawn


def _check_ran(contender: Contender, stats: dict[str, Any]) -> None:
    assert contender.lists is not None
    ran, planned = stats["sparse_density"], contender.lists.density()
    if ran is None or abs(ran - planned) > 1e-6:
        raise RuntimeError(f"{contender.name}: density {ran} ran, not {planned}; {stats['fallbacks']}")


def decibels(clips: Sequence[np.ndarray], dense: Sequence[np.ndarray]) -> list[float]:
    """PSNR of each clip (T, 3, H, W) uint8 to its dense one, over all of its frames; 100 dB where equal."""
    one, other = (torch.from_numpy(np.stack(each)).flatten(1, 2).float() / 255 for each in (clips, dense))
    return psnr(one, other).tolist()
