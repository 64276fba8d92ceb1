"""Measure length LoRAs on an embedded video model: what is left of a caption in clips four times as long?

    python -m diffctrl.scripts.evaluate_length --radial runs/radial --dense runs/dense \\
        --out docs/results/length.json

Five ways, on unseen captions of all forms, of straight moves and of objects behind a wall, with the same
noise: the base model with dense attention; the base model under the radial mask, without a LoRA; a LoRA
trained under that mask; a LoRA of equal steps trained with dense attention; short clips of the model's own
length, joined. `--unmasked` adds the first LoRA with dense attention: what of a difference the mask makes in
use, and what in training. Direction is the share of moves to the left, right, up or down that the judge reads
back; reappearance the share of objects that come out from behind the wall unchanged; drift the change of
colour and size from the first to the last third. `--quick` trains and measures a tiny random model on a CPU,
to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffctrl import settings
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.length import LengthLoRA, read, tuned
from diffctrl.pipelines.length import find
from diffctrl.radial import RadialConfig
from diffctrl.scripts.bench.harness import Figure, print_figures, write_report
from diffctrl.scripts.evaluation_image import share
from diffctrl.scripts.evaluation_length import Condition, Drawn, Studio, bootstrapped, paired
from diffctrl.scripts.evaluation_video import (
    VideoSuite,
    measured,
    straight_suite,
    telling,
    video_suite,
    write_frames,
)

TOPIC = "length"
BASE, MASKED, RADIAL, DENSE = "base, dense", "base, radial", "radial LoRA", "dense LoRA"
UNMASKED = "radial LoRA, dense attention"
ALL, MOVES, WALLS = "all forms", "straight moves", "behind the wall"
_SEEDS = {ALL: 63_000, MOVES: 67_000, WALLS: 64_000}
_VALIDATION = 500_000  # added to the seeds: other captions, other noise
_BARRED = {MOVES: "direction", WALLS: "reappears"}
"""What the bars are about: a quarter of all forms are straight moves, too few to tell two points."""
_APART = 0.1  # points between two intervals that lie apart
_CLOSE = 2.0  # points that the radial LoRA may be behind the dense one


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    return measured(_parser(), arguments, make_quick, _measure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-wan", help="embedded video model, or a folder like it")
    parser.add_argument("--radial", default="length-4x", help="LoRA trained under the mask: name or file")
    parser.add_argument("--dense", help="LoRA of equal steps trained with dense attention; left out without")
    parser.add_argument(
        "--no-base", action="store_true", help="the two LoRAs alone, without base model and short clips"
    )
    parser.add_argument("--unmasked", action="store_true", help="also the radial LoRA with dense attention")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the mask in use, such as dense_last_steps=4; repeatable",
    )
    parser.add_argument(
        "--validation", action="store_true", help="other captions and noise, to choose options on"
    )
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--n", type=int, default=200, help="clips of all forms")
    parser.add_argument("--moves", type=int, default=200, help="clips of straight moves, on top")
    parser.add_argument("--walls", type=int, default=200, help="clips behind the wall, on top")
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--guidance", type=float, help="guidance scale; default as recommended")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--workers", type=int, help="processes that read; default: beside a GPU one per core")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model and a clip or two: does it run?"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--picture", type=Path, help="PNG of frames of one caption, a line for each way")
    return parser


def make_quick(options: argparse.Namespace, folder: Path) -> None:
    """A tiny model with random weights, and LoRAs of two steps for it."""
    from diffctrl.lengthening.plan import TrainRequest, make
    from diffctrl.lengthening.train import train
    from diffctrl.scripts.training_video_vae import SMOKE_SIZE
    from diffctrl.zoo.video import VIDEO_TOKENS, video_parts, video_pipeline

    model = folder / "tiny-wan"
    video_pipeline(video_parts(replace(SMOKE_SIZE, layers=3))).save_pretrained(model)
    call = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 3, "guidance_scale": 2.0}
    (model / "diffctrl.json").write_text(json.dumps({"call": {**call, "max_sequence_length": VIDEO_TOKENS}}))
    for method in ("radial", "dense"):
        request = TrainRequest(
            out=folder / method,
            model=str(model),
            frames=33,
            clips=2,
            steps=2,
            rank=4,
            method=method,
            settings=(("block", "16"),) if method == "radial" else (),
            device="cpu",
        )
        setattr(options, method, str(train(make(request))))
    options.model, options.frames, options.device = str(model), 33, "cpu"
    options.n, options.moves, options.walls, options.batch, options.workers = 1, 1, 1, 2, 0


def _measure(options: argparse.Namespace) -> list[Figure]:
    began = time.monotonic()
    source = ModelSource.find(options.model)
    call = source.recommended()
    if not call:
        raise BadRequestError(
            f"{options.model} is none of the package's video models: it has no diffctrl.json"
        )
    conditions, loras = _conditions(options, int(call["num_frames"]))
    call |= {"num_frames": options.frames}
    if options.steps is not None:
        call["num_inference_steps"] = options.steps
    if options.guidance is not None:
        call["guidance_scale"] = options.guidance
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = (
        options.workers if options.workers is not None else (0 if device == "cpu" else os.cpu_count() or 1)
    )
    pipe = source.load({"default": getattr(torch, options.dtype), "vae": torch.float32}).to(device)
    pipe.set_progress_bar_config(disable=True)
    seeds = {name: seed + _VALIDATION * options.validation for name, seed in _SEEDS.items()}
    figures: list[Figure] = []
    with Studio(pipe, call, options.batch, workers) as studio:
        for name, seed in seeds.items():
            suite = _suite(options, name, seed)
            if suite is None:
                continue
            drawn = []
            for condition in conditions:
                drawn.append(studio.draw(condition, suite, seed))
                print(f"{name}: {drawn[-1].line()}", flush=True)
            figures += _figures(name, drawn)
            if options.picture is not None and name == ALL:
                which = telling(suite, options.batch)
                lines = {one.condition.name: one.clips[which] for one in drawn}
                top = next(iter(lines))
                lines = {f"{top}: {suite.captions[which]}": lines.pop(top), **lines}
                write_frames(options.picture, lines)
            extra = {"call": call, "dtype": options.dtype, "set": options.set, "loras": loras}
            write_report(options.out, TOPIC, figures, seeds=list(seeds.values()), **extra)
            print(f"{name}: done after {time.monotonic() - began:.0f} s", flush=True)
    print_figures(figures)
    return figures


def _suite(options: argparse.Namespace, name: str, seed: int) -> VideoSuite | None:
    """The captions of this name; None where none are wanted."""
    count = {ALL: options.n, MOVES: options.moves, WALLS: options.walls}[name]
    if not count:
        return None
    if name == MOVES:
        return straight_suite(count, seed=seed, frames=options.frames)
    return video_suite(count, seed=seed, frames=options.frames, forms=("wall",) if name == WALLS else None)


def _conditions(options: argparse.Namespace, own: int) -> tuple[list[Condition], dict[str, Any]]:
    """The ways to make a long clip, and what the LoRAs say of themselves.

    Args:
        own: frames of the clips that the model was made for.

    Raises:
        BadRequestError: a LoRA is not there or not of its kind, or the two are not of equal steps.
    """
    paths = {"radial": find(options.radial)} | ({"dense": find(options.dense)} if options.dense else {})
    loras: dict[str, LengthLoRA] = {method: read(path) for method, path in paths.items()}
    for method, lora in loras.items():
        if lora.method != method:
            raise BadRequestError(f"--{method} {paths[method]} was trained with {lora.method} attention")
    if len({_effort(lora) for lora in loras.values()}) > 1:
        raise BadRequestError("the two LoRAs are not of equal steps, batch and rank")
    if options.no_base and not options.dense:
        raise BadRequestError("--no-base compares two LoRAs; give --dense as well")
    mask = _mask(options.set, loras["radial"])
    conditions = [Condition(name=RADIAL, lora=paths["radial"], mask=mask)]
    if options.unmasked:
        conditions.append(Condition(name=UNMASKED, lora=paths["radial"]))
    if options.dense:
        conditions.append(Condition(name=DENSE, lora=paths["dense"]))
    if not options.no_base:
        base = [Condition(name=BASE), Condition(name=MASKED, mask=mask)]
        pieces = math.ceil(options.frames / own)
        conditions = [*base, *conditions, Condition(name=f"{pieces} short clips", short=own)]
    said = {name: {"summary": lora.summary(), **lora.training} for name, lora in loras.items()}
    return conditions, said


def _mask(given: Sequence[str], lora: LengthLoRA) -> RadialConfig:
    """The mask that a LoRA was trained with, and which steps are dense in use.

    Raises:
        BadRequestError: an option is not known, or makes another mask.
    """
    named = {name: value for name, _, value in (pair.partition("=") for pair in given)}
    config = settings.parse(RadialConfig, named, of="radial")
    mask, against = tuned(config, lora.radial or {}, named)
    if against:
        raise BadRequestError(f"--set makes another mask than the LoRA's: {', '.join(against)}")
    return mask


def _effort(lora: LengthLoRA) -> tuple[Any, ...]:
    """Steps, those of the LoRA that it began with included, batch and rank."""
    said = lora.training
    return said.get("steps", 0) + said.get("earlier_steps", 0), said.get("batch"), lora.rank


def _figures(suite: str, drawn: Sequence[Drawn]) -> list[Figure]:
    """Shares and drifts of every condition, then what the claims are about."""
    figures = []
    for kind in sorted({name for one in drawn for clip in one.reads for name, _ in clip.facts}):
        for one in drawn:
            value, low, high, count = share(one.flags(kind))
            note = f"{count} facts" + ("" if one.density is None else f", density {one.density:.3f}")
            figures.append(Figure(f"{suite}: {kind}: {one.condition.name}", value, low, high, "%", note=note))
    for drift in ("colour_drift", "size_drift"):
        for one in drawn:
            known = [v for clip in one.reads if not math.isnan(v := getattr(clip, drift))]
            if known:
                value, low, high = bootstrapped(known)
                note = f"{len(known)} of {len(one.reads)} clips can be told"
                name = f"{suite}: {drift.replace('_', ' ')}: {one.condition.name}"
                figures.append(Figure(name, value, low, high, note=note))
    return figures + _claims(suite, {one.condition.name: one for one in drawn})


def _claims(suite: str, drawn: dict[str, Drawn]) -> list[Figure]:
    """Paired differences, and the two bars: apart from the base model, close to the dense LoRA."""
    figures, barred = [], suite in _BARRED
    kind = _BARRED.get(suite, "direction")
    radial = drawn[RADIAL]
    for name, other in drawn.items():
        if name == RADIAL or not radial.flags(kind):
            continue
        value, low, high = (100 * x for x in paired(radial.flags(kind), other.flags(kind)))
        bar = -_CLOSE if barred and name == DENSE else None
        figures.append(
            Figure(f"{suite}: {kind}: {RADIAL} minus {name}", value, low, high, "points", bar,
                   note="paired: the same captions and noise")
        )  # fmt: skip
        if name == BASE:
            gap = share(radial.flags(kind))[1] - share(other.flags(kind))[2]
            note = "lower end of the first's 95 % interval minus the upper end of the second's"
            room = f"{suite}: {kind}: room between the intervals of {RADIAL} and {name}"
            figures.append(Figure(room, gap, unit="points", bar=_APART if barred else None, note=note))
    for drift in ("colour_drift", "size_drift") if BASE in drawn else ():
        value, low, high = paired(*([getattr(r, drift) for r in drawn[n].reads] for n in (RADIAL, BASE)))
        if not math.isnan(value):
            name = f"{suite}: {drift.replace('_', ' ')}: {RADIAL} minus {BASE}"
            figures.append(Figure(name, value, low, high, note="paired"))
    return figures


if __name__ == "__main__":
    main()
