"""Measure Radial Attention on an embedded video model: do its clips stay closer to those of dense attention
than clips of other patterns of its density?

    python -m diffctrl.scripts.evaluate_radial --out docs/results/radial_quality.json

Unseen captions, the same noise for all. Radial Attention has the published settings of Wan 2.1: the first 12
of 50 steps and the first block dense, decay 0.2, sink. Its rivals are a sliding window (the nearest blocks in
the order of tokens) and random blocks: each query block attends as many blocks as there, its own among them,
and all else is the same. PSNR is of each clip to the dense one. Direction is the share of moves to the left,
right, up or down that the judge reads back; reappearance the share of objects that come out from behind the
wall unchanged. `--quick` measures a tiny random model on a CPU, to see that it runs.

A latent frame of `shapes-wan` is 8 x 8 tokens. The share of all pairs that sparse calls attend there, at a
decay of 0.2 (and of 1, where that differs):

    frames (latent)   blocks of 64   of 32   of 16           of 8
    33 (17)           0.471          0.668   0.630 (0.679)   0.489 (0.637)
    65 (33)           0.302          0.458   0.458 (0.485)   0.378 (0.467)
    129 (65)          0.184          0.293   0.305 (0.320)   0.266 (0.315)

Blocks of 64 are whole frames: some are left out, and no band is thinner than a frame. Blocks of 8 are a row
of a frame, as 128 tokens are one or two rows at real sizes: far frames are attended in bands around the same
place. Both are measured. The sizes between leave out so little of 33 frames that patterns hardly differ.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.scripts.bench.harness import Figure, print_figures, write_report
from diffctrl.scripts.evaluate_zoo_video import packed_pipeline
from diffctrl.scripts.evaluation_image import share
from diffctrl.scripts.evaluation_length import bootstrapped, paired
from diffctrl.scripts.evaluation_radial import (
    DENSE,
    RADIAL,
    RIVALS,
    Compared,
    Contender,
    PairedStudio,
    contenders,
    named,
)
from diffctrl.scripts.evaluation_video import VideoSuite, measured, telling, video_suite, write_frames

TOPIC = "radial_quality"
BLOCKS = (64, 8)
KINDS = ("direction", "reappears")
BARRED = "all forms"  # the suite that the bars are about
_SEEDS = {BARRED: 65_000, "behind the wall": 66_000}
_APART = 0.01  # dB between two intervals that lie apart


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    return measured(_parser(), arguments, _make_quick, _measure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-wan", help="embedded video model, or a folder like it")
    parser.add_argument("--pack", type=Path, help="weights of scripts/train_zoo_video.py instead of --model")
    parser.add_argument("--n", type=int, default=200, help="clips of all forms; the bars are about these")
    parser.add_argument("--walls", type=int, default=200, help="clips behind the wall, on top")
    parser.add_argument("--frames", type=int, help="length; default as recommended")
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--block", type=int, nargs="+", default=list(BLOCKS), help="sides of a block, tokens")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--workers", type=int, help="processes that read; default: with a GPU one per core")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, two clips: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--picture", type=Path, help="PNG of frames of one caption, a line for each way")
    return parser


def _make_quick(options: argparse.Namespace, folder: Path) -> None:
    """A tiny model with random weights; a latent frame of it is 4 x 4 tokens."""
    from diffctrl.scripts.training_video_vae import SMOKE_SIZE
    from diffctrl.zoo.video import VIDEO_TOKENS, video_parts, video_pipeline

    torch.manual_seed(0)
    parts = video_parts(replace(SMOKE_SIZE, layers=2))
    # The start weights have closed gates and no output: whatever is attended, they draw the same.
    for parameter in parts.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    video_pipeline(parts).save_pretrained(folder)
    call = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 4, "guidance_scale": 2.0}
    (folder / "diffctrl.json").write_text(json.dumps({"call": {**call, "max_sequence_length": VIDEO_TOKENS}}))
    options.model, options.pack, options.block, options.device = str(folder), None, [16, 4], "cpu"
    options.n, options.walls, options.batch, options.workers = 2, 2, 2, 0


def _measure(options: argparse.Namespace) -> list[Figure]:
    began = time.monotonic()
    pipe, call = _pipeline(options)
    topic = TOPIC
    if options.frames not in (None, call["num_frames"]):
        call["num_frames"], topic = options.frames, f"{TOPIC}_{options.frames}"
    if options.steps is not None:
        call["num_inference_steps"] = options.steps
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = options.workers
    if workers is None:
        workers = 0 if device == "cpu" else os.cpu_count() or 1
    pipe.to(device).set_progress_bar_config(disable=True)
    ways = contenders(pipe, call, options.block)
    figures = [_density(way) for way in ways if way.lists is not None]
    studio = PairedStudio(pipe, call, options.batch, workers)
    with studio:
        for (name, seed), forms in zip(_SEEDS.items(), (None, ("wall",)), strict=True):
            count = options.n if forms is None else options.walls
            if not count:
                continue
            suite = video_suite(count, seed=seed, frames=call["num_frames"], forms=forms)
            drawn: dict[str, Compared] = {}
            found: list[Figure] = []
            for way in ways:
                drawn[way.name] = studio.compare(way, suite, seed, drawn.get(DENSE))
                found = _figures(name, drawn, options.block)
                write_report(options.out, topic, [*figures, *found], seeds=list(_SEEDS.values()), call=call)
                print(f"{name}, {way.name}: done after {time.monotonic() - began:.0f} s", flush=True)
            figures += found
            if options.picture is not None and forms is None:
                _write_picture(options.picture, suite, drawn, options.batch)
    print_figures(figures)
    return figures


def _pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The stock pipeline in float32 on the CPU, and the arguments of its call."""
    if options.pack is not None:
        return packed_pipeline(options)
    source = ModelSource.find(options.model)
    call = source.recommended()
    if not call:
        raise BadRequestError(
            f"{options.model} is none of the package's video models: it has no diffctrl.json"
        )
    return source.load(torch.float32), call


def _density(way: Contender) -> Figure:
    assert way.lists is not None
    kept, side = int(way.lists.counts.sum()), way.lists.n_q_blocks
    note = f"{kept} of {side * side} blocks attended, in sparse calls"
    return Figure(f"density: {way.name}", way.lists.density(), note=note)


def _figures(suite: str, drawn: dict[str, Compared], blocks: Sequence[int]) -> list[Figure]:
    """Closeness to dense and what the judge reads, then Radial Attention against dense and its rivals."""
    figures = []
    for name, one in drawn.items():
        if one.psnr:
            value, low, high = bootstrapped(one.psnr)
            note = f"{len(one.psnr)} clips, {one.density:.3f} of all pairs attended in all calls"
            figures.append(Figure(f"{suite}: PSNR to dense: {name}", value, low, high, "dB", note=note))
    for kind in KINDS:
        for name, one in drawn.items():
            if flags := one.flags(kind):
                value, low, high, count = share(flags)
                note = f"{count} facts"
                figures.append(Figure(f"{suite}: {kind}: {name}", value, low, high, "%", note=note))
    for block in blocks:
        names = {DENSE: DENSE} | {rival: named(rival, block) for rival in RIVALS}
        for other, name in names.items():
            if named(RADIAL, block) in drawn and name in drawn:
                figures += _comparison(suite, block, other, drawn[named(RADIAL, block)], drawn[name])
    return figures


def _comparison(suite: str, block: int, other: str, radial: Compared, rival: Compared) -> list[Figure]:
    """Paired differences, and whether the intervals of PSNR lie apart."""
    minus, note = named(f"{RADIAL} minus {other}", block), "paired: the same captions and noise"
    figures = []
    if rival.psnr:
        value, low, high = paired(radial.psnr, rival.psnr)
        figures.append(Figure(f"{suite}: PSNR to dense: {minus}", value, low, high, "dB", note=note))
        room = bootstrapped(radial.psnr)[1] - bootstrapped(rival.psnr)[2]
        between = named(f"room between the intervals of {RADIAL} and {other}", block)
        bar = _APART if suite == BARRED else None
        told = "lower end of the first's 95 % interval minus the upper end of the second's"
        figures.append(Figure(f"{suite}: PSNR to dense: {between}", room, unit="dB", bar=bar, note=told))
    for kind in KINDS:
        if flags := radial.flags(kind):
            value, low, high = (100 * x for x in paired(flags, rival.flags(kind)))
            figures.append(Figure(f"{suite}: {kind}: {minus}", value, low, high, "points", note=note))
    return figures


def _write_picture(path: Path, suite: VideoSuite, drawn: dict[str, Compared], batch: int) -> None:
    which = telling(suite, batch)
    lines = {}
    for name, one in drawn.items():
        told = f"{one.psnr[which]:.1f} dB" if one.psnr else suite.captions[which]
        lines[f"{name}: {told}"] = one.clips[which]
    write_frames(path, lines)


if __name__ == "__main__":
    main()
