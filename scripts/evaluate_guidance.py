"""Measure SoftPAG and HeadHunter on an embedded image model: does the picture obey its prompt?

    python -m diffctrl.scripts.evaluate_guidance --out docs/results/guidance.json --pictures docs/pictures

Unseen prompts, the same noise in every condition, 95 % intervals. The head sets are those that the package
ships, found on other prompts (`find_headsets.py`), at the u and w that they carry. On such prompts the peers
get their best scale too: the default layer, and plain PAG its best layer with it. Random sets have the size,
u and w of HeadHunter's, one for each prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffctrl.scripts.bench.harness import Figure, print_figures, write_report
from diffctrl.scripts.evaluation_guidance import (
    Condition,
    Drawn,
    Set,
    Studio,
    mean_interval,
    paired,
    random_sets,
    styleless_pairs,
    unknown_to,
    unseen_pairs,
)
from diffctrl.scripts.evaluation_image import share
from diffctrl.scripts.find_headsets import SCALES, pairs_of, scoring_workers
from diffctrl.softpag import SoftPAGConfig, library
from diffctrl.softpag.config import DEFAULT_U
from diffctrl.softpag.headhunt import Pair
from diffctrl.softpag.headset import HeadSet
from diffctrl.zoo import registry
from diffctrl.zoo.worlds import vocabulary

TOPIC = "guidance"
NONE, CFG, SOFT, LAYER = "no guidance", "CFG 3", "SoftPAG, default layer", "PAG, best layer"
RANDOM, HUNTED, BOTH = "random heads", "HeadHunter's heads", "CFG 3 + HeadHunter's heads"
SOFT_BOTH = "CFG 3 + SoftPAG, default layer"
CURVE = (0.0, 1.0, 1.5, 2.0, 3.0, 4.5, 6.0)
_SHOWN = 6


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.n, options.curve, options.styles, options.search, options.batch = 4, 2, 2, 2, 8
    if options.headsets is not None:
        library.FOLDER = options.headsets
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = registry.load(options.model, dtype=getattr(torch, options.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = registry.recommended(options.model)
    if options.steps or options.quick:
        call["num_inference_steps"] = options.steps or 2
    workers = scoring_workers(options.workers, device)
    began, figures = time.monotonic(), []
    with Studio(pipe, call, options.batch, workers) as studio:
        signature = studio.universe.signature
        hunted = (
            library.find(library.DEFAULT, signature) if options.heads is None else HeadSet.load(options.heads)
        )
        hunted.check(signature)
        _announce(options, call, len(hunted), studio.universe.layers)
        drawn = _quality(studio, hunted, options, figures)
        curves = _curves(studio, hunted, drawn, options, figures)
        _styles(studio, options, figures)
        extra = {"call": call, "dtype": options.dtype, "heads": str(hunted)}
        seeds = [drawn[NONE][0][0].seed]
        write_report(options.out, TOPIC, figures, seeds=seeds, **extra)
        print(f"\n{studio.pictures:,} pictures, {studio.forwards:,} rows through the denoiser")
    if options.pictures is not None:
        _write_pictures(options.pictures, drawn, curves)
    print_figures(figures)
    print(f"{time.monotonic() - began:.0f} s on {device}")
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-sd3", help="name of an embedded image model")
    parser.add_argument("--heads", type=Path, help="head set for quality; default: the one that is shipped")
    parser.add_argument("--headsets", type=Path, help="folder of head sets instead of the package's")
    parser.add_argument("--n", type=int, default=1024, help="prompts of each condition")
    parser.add_argument("--curve", type=int, default=256, help="prompts of each point of the scale curve")
    parser.add_argument("--styles", type=int, default=512, help="prompts for each style; they name none")
    parser.add_argument("--search", type=int, default=96, help="other prompts, to choose the single layer")
    parser.add_argument("--u", type=float, help="of the head sets; default: what each was found with")
    parser.add_argument("--w", type=float, help="of the head sets; default: what each carries")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--workers", type=int, help="judging processes; default: beside a GPU one per core")
    parser.add_argument("--quick", action="store_true", help="a few prompts and two steps: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--pictures", type=Path, help="folder for the comparison grid and the curve")
    return parser


def _announce(options: argparse.Namespace, call: dict[str, Any], size: int, layers: int) -> None:
    steps = call["num_inference_steps"]
    rows = options.n * 17 + options.search * 2 * (layers + 1) * len(SCALES) + options.curve * len(CURVE) * 6
    rows += options.styles * (1 + 4 * len(vocabulary.STYLES))
    print(
        f"{size} heads, {steps} steps, about {rows * steps:,} rows through the denoiser at most", flush=True
    )


# Condition -> (its pairs, its pictures).
Conditions = dict[str, tuple[Sequence[Pair], Drawn]]


def _quality(
    studio: Studio, hunted: HeadSet, options: argparse.Namespace, figures: list[Figure]
) -> Conditions:
    """Every condition on the same prompts and noise."""
    pairs = unknown_to(unseen_pairs(options.n), [hunted])
    heads, layers = tuple(hunted), _layers(studio)
    print("scales of the peers, on search prompts")
    middle = len(layers) * 3 // 8
    soft = _best(studio, layers[middle : middle + 1], DEFAULT_U, options)
    layer = _best(studio, layers, 1.0, options)
    common = _carried(hunted, options)
    conditions = (
        Condition(name=NONE),
        Condition(name=CFG, s=3.0),
        Condition(name=SOFT, heads=soft.heads, u=DEFAULT_U, w=soft.w),
        Condition(name=SOFT_BOTH, heads=soft.heads, u=DEFAULT_U, w=soft.w, s=3.0),
        Condition(name=LAYER, heads=layer.heads, u=1.0, w=layer.w),
        Condition(name=RANDOM, heads=random_sets(studio.universe, len(heads), len(pairs)), **common),
        Condition(name=HUNTED, heads=heads, **common),
        Condition(name=BOTH, heads=heads, s=3.0, **common),
    )
    print("conditions")
    drawn = {each.name: studio.draw(each, pairs, samples=_SHOWN) for each in conditions}
    notes = {
        SOFT: soft.told,
        LAYER: layer.told,
        RANDOM: f"sets of {len(heads)}, one for each prompt, at the same u and w",
        HUNTED: f"{hunted}, u = {common['u']:g}, w = {common['w']:g}",
    }
    for name, pictures in drawn.items():
        figures.append(_share(f"exact: {name}", [read.exact for read in pictures.reads], notes.get(name, "")))
    for name, pictures in drawn.items():
        value, low, high = mean_interval([read.sharpness for read in pictures.reads])
        figures.append(
            Figure(f"sharpness: {name}", value, low, high, "log10", note="variance of the Laplacian")
        )
    for attribute in sorted({name for read in drawn[NONE].reads for name, _ in read.facts}):
        for name, pictures in drawn.items():
            facts = [right for read in pictures.reads for field, right in read.facts if field == attribute]
            figures.append(_share(f"{attribute}: {name}", facts))
    _compare(drawn, figures)
    return {name: (pairs, pictures) for name, pictures in drawn.items()}


def _layers(studio: Studio) -> list[Set]:
    """The heads of each layer of the flat index."""
    heads = [head for head in studio.universe.heads if head.stack is None]
    return [tuple(head for head in heads if head.layer == layer) for layer in range(studio.universe.layers)]


@dataclass(frozen=True, slots=True)
class Best:
    """The heads and scale of a peer that obey the search prompts best, and what was tried."""

    heads: Set
    w: float
    told: str


def _best(studio: Studio, sets: list[Set], u: float, options: argparse.Namespace) -> Best:
    """The set and scale with the largest mean share of right facts; of equal ones the first, at the least."""
    pairs = pairs_of(library.DEFAULT, options.search)
    tried = {}
    for heads in sets:
        for scale in SCALES:
            name = f"layer {heads[0].layer}, u = {u:g}, w = {scale:g}"
            drawn = studio.draw(Condition(name=name, heads=heads, u=u, w=scale), pairs)
            tried[heads, scale] = mean_interval([read.share for read in drawn.reads])[0]
    heads, scale = max(tried, key=lambda each: tried[each])
    shares = ", ".join(f"{tried[heads, each]:.3f} at {each:g}" for each in SCALES)
    where = f"layer {heads[0].layer}, u = {u:g}, w = {scale:g}"
    return Best(heads, scale, f"{where}, the best on {options.search} search prompts ({shares})")


def _carried(found: HeadSet, options: argparse.Namespace) -> dict[str, float]:
    """u and w of a head set: what it carries, or what the command line says."""
    config = SoftPAGConfig(u=options.u, w=options.w).with_set(found)
    return {"u": config.strength, "w": config.scale}


def _compare(drawn: dict[str, Drawn], figures: list[Figure]) -> None:
    """Paired differences, and whether the intervals of the two lie apart."""
    pairs = ((HUNTED, NONE), (HUNTED, RANDOM), (HUNTED, LAYER), (HUNTED, SOFT), (HUNTED, CFG), (BOTH, CFG))
    for one, other in pairs:
        value, low, high = (100 * x for x in paired(drawn[one], drawn[other], lambda read: float(read.exact)))
        note = "paired: the same prompts and noise"
        figures.append(Figure(f"exact: {one} minus {other}", value, low, high, "points", note=note))
        if other in (NONE, RANDOM):
            ends = [share([read.exact for read in drawn[name].reads]) for name in (one, other)]
            gap = ends[0][1] - ends[1][2]
            note = "lower end of the first's 95 % interval minus the upper end of the second's"
            name = f"exact: room between the intervals of {one} and {other}"
            figures.append(Figure(name, gap, unit="points", bar=0.1, note=note))


def _curves(
    studio: Studio, hunted: HeadSet, drawn: Conditions, options: argparse.Namespace, figures: list[Figure]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Exact share against w, for three ways to choose heads: (w, value, low, high) each."""
    pairs = drawn[NONE][0][: options.curve]
    print("scales")
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for name in (HUNTED, RANDOM, SOFT):
        base = drawn[name][1].condition
        points = {0.0: drawn[NONE][1].reads[: len(pairs)], base.w: drawn[name][1].reads[: len(pairs)]}
        for scale in CURVE:
            if scale not in points:
                condition = Condition(name=f"{name}, w = {scale:g}", heads=base.heads, u=base.u, w=scale)
                points[scale] = studio.draw(condition, pairs).reads
        curves[name] = []
        for scale, reads in sorted(points.items()):
            value, low, high, _ = share([read.exact for read in reads])
            curves[name].append((scale, value, low, high))
            figures.append(
                Figure(f"exact at w = {scale:g}: {name}", value, low, high, "%", note=f"{len(pairs)} prompts")
            )
    return curves


def _styles(studio: Studio, options: argparse.Namespace, figures: list[Figure]) -> None:
    """How often the judge calls a picture a style that its prompt does not name."""
    known = [style for style in vocabulary.STYLES if f"style:{style}" in library.names()]
    if not known:
        print("styles: no head sets are shipped")
        return
    signature = studio.universe.signature
    found = {style: library.stored(f"style:{style}", signature) for style in known}
    pairs = unknown_to(styleless_pairs(options.styles), found.values())
    print("styles")
    stock = studio.draw(Condition(name="no guidance"), pairs)
    for style, headset in found.items():
        figures.append(_share(f"style {style}: no guidance", [read.style == style for read in stock.reads]))
        if not len(headset):
            note = "the search found no head that does better than no guidance; the set is refused where used"
            figures.append(Figure(f"style {style}: heads in its set", 0, note=note))
            continue
        heads, common = tuple(headset), _carried(headset, options)
        others = random_sets(studio.universe, len(heads), len(pairs))
        at = f"u = {common['u']:g}, w = {common['w']:g}"
        conditions = {
            f"{len(heads)} random heads": Condition(name=f"random heads, {at}", heads=others, **common),
            "its heads": Condition(name=f"heads of {style}, {at}", heads=heads, **common),
        }
        drawn = {name: studio.draw(condition, pairs) for name, condition in conditions.items()}
        guided = drawn["its heads"]
        for name, pictures in drawn.items():
            flags = [read.style == style for read in pictures.reads]
            figures.append(_share(f"style {style}: {name}", flags, at))
        value, low, high = paired(guided, stock, lambda read, style=style: 100.0 * (read.style == style))
        name = f"style {style}: its heads minus no guidance"
        figures.append(Figure(name, value, low, high, "points", note=f"{headset}, {at}"))
        note = "lower end of the interval of the paired difference"
        figures.append(Figure(f"{name}, at least", low, unit="points", bar=0.1, note=note))
        value, low, high, _ = share([read.exact for read in guided.reads])
        figures.append(Figure(f"style {style}: exact under its heads", value, low, high, "%"))


def _share(name: str, flags: list[bool], note: str = "") -> Figure:
    value, low, high, count = share(flags)
    return Figure(name, value, low, high, "%", note=f"{count} read" + (f"; {note}" if note else ""))


def _write_pictures(
    folder: Path, drawn: Conditions, curves: dict[str, list[tuple[float, float, float, float]]]
) -> None:
    from PIL import Image

    from diffctrl.softpag.headhunt.report import sample_grid

    folder.mkdir(parents=True, exist_ok=True)
    pairs = drawn[NONE][0][:_SHOWN]
    names = (NONE, CFG, LAYER, RANDOM, HUNTED, BOTH)
    lines = [
        (
            pair.prompt,
            [Image.fromarray(drawn[name][1].samples[index].permute(1, 2, 0).numpy()) for name in names],
        )
        for index, pair in enumerate(pairs)
    ]
    sample_grid(names, lines).save(folder / "softpag-guidance.png")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for name, points in curves.items():
        scales, values, lows, highs = (list(column) for column in zip(*points, strict=True))
        axes.plot(scales, values, marker="o", label=name)
        axes.fill_between(scales, lows, highs, alpha=0.15)
    axes.set_xlabel("w")
    axes.set_ylabel("pictures that obey their prompt, %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "softpag-scale.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
