"""What evaluations of a video model share: unseen captions, the judge's readings, how one is run."""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffctrl.errors import BadRequestError
from diffctrl.scripts.bench.harness import Figure
from diffctrl.zoo import clips, judge
from diffctrl.zoo.clips.vocabulary import BACK_PHRASE, MOTIONS, WALL_PHRASE

_SHOWN = 8  # frames of a clip in a picture
STRAIGHT = MOTIONS[:4]
"""Left, right, up and down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSuite:
    """Fixed clips with captions that name everything.

    Args:
        scenes: the clips that the captions describe; their renders give the judge's ceiling.
        facts: what each caption names.
        captions: one per clip.
    """

    scenes: clips.Clips
    facts: list[clips.ClipFacts]
    captions: list[str]


def video_suite(
    count: int, *, seed: int, frames: int = 33, forms: tuple[str, ...] | None = None
) -> VideoSuite:
    """`count` unseen clips of the given forms, all of them named in full."""
    scenes = clips.sample(count, seed=seed, split="test", frames=frames, forms=forms)
    draw = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, clips.CAPTION_UNIFORMS, generator=draw)
    uniforms = clips.detailed(uniforms, torch.ones(count, dtype=torch.bool))
    captions = clips.to_text(clips.caption_words(scenes, uniforms))
    return VideoSuite(scenes=scenes, facts=clips.said(scenes, uniforms), captions=captions)


def straight_suite(count: int, *, seed: int, frames: int = 33) -> VideoSuite:
    """`count` unseen clips in which an object goes left, right, up or down and no more, named in full."""
    drawn = video_suite(max(64, 8 * count), seed=seed, frames=frames)  # a quarter of them are such
    chosen = [i for i, said in enumerate(drawn.facts) if any(one.motion in STRAIGHT for one in said.objects)]
    chosen = chosen[:count]
    return VideoSuite(
        scenes=drawn.scenes.select(chosen),
        facts=[drawn.facts[i] for i in chosen],
        captions=[drawn.captions[i] for i in chosen],
    )


def telling(suite: VideoSuite, batch: int) -> int:
    """The first clip of a batch in which something passes behind the wall, which a mask loses first; else the
    first of all."""
    return next((i for i, said in enumerate(suite.captions[:batch]) if WALL_PHRASE in said), 0)


def write_frames(path: Path, lines: Mapping[str, np.ndarray]) -> None:
    """A PNG with a line for each clip (T, 3, H, W) uint8, all equally long: some frames and a text."""
    from PIL import Image

    from diffctrl.softpag.headhunt.report import sample_grid

    length = len(next(iter(lines.values())))
    frames = torch.linspace(0, length - 1, _SHOWN).round().int().tolist()
    rows = [
        (told, [Image.fromarray(clip[frame].transpose(1, 2, 0)) for frame in frames])
        for told, clip in lines.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_grid([f"frame {frame}" for frame in frames], rows).save(path)


def judged(videos: Tensor, suite: VideoSuite) -> dict[str, list[bool]]:
    """Named facts of clips (N, T, 3, H, H) in [0, 1], by kind, each right or wrong; "exact" once per clip.

    "direction" is the motion of the objects that go left, right, up or down and no more.
    """
    found: dict[str, list[bool]] = {}
    for video, wanted in zip(videos, suite.facts, strict=True):
        for name, right in named_facts(judge.check_clip(video, wanted), wanted):
            found.setdefault(name, []).append(right)
    return found


def named_facts(verdict: judge.ClipVerdict, wanted: clips.ClipFacts) -> list[tuple[str, bool]]:
    """(kind, right) of one clip, as `judged` counts; kinds and their order follow from `wanted` alone."""
    found = [("exact", verdict.exact)]
    found += [(name, flag) for name, flags in judge.clip_rates([verdict]).items() for flag in flags]
    for one, seen in zip(wanted.objects, verdict.objects, strict=True):
        found += [(name, seen["motion"]) for name, belongs in _kinds(one.motion or "").items() if belongs]
    return found


def _kinds(motion: str) -> dict[str, bool]:
    return {
        "direction": motion in STRAIGHT,
        "behind the wall": motion.endswith(WALL_PHRASE),
        "there and back": motion.endswith(BACK_PHRASE),
    }


def judged_line(videos: Tensor, suite: VideoSuite) -> str:
    """Shares of right facts in one line."""
    return rates_line(judged(videos, suite))


def rates_line(rates: Mapping[str, list[bool]]) -> str:
    """Shares of right facts of each kind in one line.

    >>> rates_line({"shape": [True, False]})
    'shape 50.0% (2)'
    """
    return "  ".join(f"{name} {100 * sum(f) / len(f):.1f}% ({len(f)})" for name, f in sorted(rates.items()))


def measured(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    make_quick: Callable[[argparse.Namespace, Path], None],
    measure: Callable[[argparse.Namespace], list[Figure]],
) -> list[Figure]:
    """Run an evaluation from its command line; a bad request is an error of usage.

    Args:
        parser: has `--quick`.
        arguments: as on the command line; None for the program's own.
        make_quick: changes the options of a quick run; the folder is gone after it.
        measure: the evaluation.
    """
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.quick:
                make_quick(options, Path(folder))
            return measure(options)
    except BadRequestError as error:
        parser.error(str(error))
