"""Measure SoftPAG and HeadHunter on an embedded image model: does the picture obey its prompt?

    python -m diffctrl.scripts.evaluate_guidance --out docs/results/guidance.json --pictures docs/pictures

Unseen prompts, the same noise in every condition, 95 % intervals. The head sets are those that the package
ships, found on other prompts (`find_headsets.py`); the single layer that plain PAG perturbs is the best one
on such prompts too. Random sets have the size of HeadHunter's, one for each prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffctrl.scripts.bench.harness import Figure, print_table, write_report
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
from diffctrl.scripts.find_headsets import pairs_of, scoring_workers
from diffctrl.softpag import library
from diffctrl.softpag.headhunt import Pair
from diffctrl.softpag.headset import HeadSet
from diffctrl.zoo import registry
from diffctrl.zoo.worlds import vocabulary

TOPIC = "guidance"
NONE, CFG, SOFT, LAYER = "no guidance", "CFG 3", "SoftPAG, default layer", "PAG, best layer"
RANDOM, HUNTED, BOTH = "random heads", "HeadHunter's heads", "CFG 3 + HeadHunter's heads"
SOFT_BOTH = "CFG 3 + SoftPAG, default layer"
SCALES = (1.0, 2.0, 4.5, 6.0)  # besides 0 and 3, which the conditions have
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
        _announce(options, call, len(hunted))
        drawn = _quality(studio, hunted, options, figures)
        curves = _curves(studio, hunted, drawn, options, figures)
        _styles(studio, options, figures)
        extra = {"call": call, "dtype": options.dtype, "heads": str(hunted)}
        seeds = [drawn[NONE][0][0].seed]
        write_report(options.out, TOPIC, figures, seeds=seeds, **extra)
        print(f"\n{studio.pictures:,} pictures, {studio.forwards:,} rows through the denoiser")
    if options.pictures is not None:
        _write_pictures(options.pictures, drawn, curves)
    print_table(["figure", "value", "95 % interval", "bar", "holds"], [_row(figure) for figure in figures])
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
    parser.add_argument("--u", type=float, default=0.5)
    parser.add_argument("--w", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--workers", type=int, help="judging processes; default: beside a GPU one per core")
    parser.add_argument("--quick", action="store_true", help="a few prompts and two steps: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--pictures", type=Path, help="folder for the comparison grid and the curve")
    return parser


def _announce(options: argparse.Namespace, call: dict[str, Any], size: int) -> None:
    steps = call["num_inference_steps"]
    rows = options.n * 17 + options.search * 16 + options.curve * len(SCALES) * 6
    rows += options.styles * (3 + 2 * len(vocabulary.STYLES))
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
    middle = layers[len(layers) * 3 // 8]
    best, shares = _best_layer(studio, layers, options)
    common = {"u": options.u, "w": options.w}
    conditions = (
        Condition(name=NONE),
        Condition(name=CFG, s=3.0),
        Condition(name=SOFT, heads=middle, **common),
        Condition(name=SOFT_BOTH, heads=middle, s=3.0, **common),
        Condition(name=LAYER, heads=layers[best], u=1.0, w=options.w),
        Condition(name=RANDOM, heads=random_sets(studio.universe, len(heads), len(pairs)), **common),
        Condition(name=HUNTED, heads=heads, **common),
        Condition(name=BOTH, heads=heads, s=3.0, **common),
    )
    print("conditions")
    drawn = {each.name: studio.draw(each, pairs, samples=_SHOWN) for each in conditions}
    notes = {
        LAYER: f"layer {best}, u = 1; on {options.search} search prompts the layers have "
        + ", ".join(f"{value:.2f}" for value in shares),
        RANDOM: f"sets of {len(heads)}, one for each prompt",
        HUNTED: f"{hunted}, u = {options.u:g}, w = {options.w:g}",
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


def _best_layer(studio: Studio, layers: list[Set], options: argparse.Namespace) -> tuple[int, list[float]]:
    """The layer whose full perturbation obeys the search prompts best, and the mean share of each."""
    pairs = pairs_of(library.DEFAULT, options.search)
    print("layers, on search prompts")
    drawn = [
        studio.draw(Condition(name=f"layer {index}", heads=heads, u=1.0, w=options.w), pairs)
        for index, heads in enumerate(layers)
    ]
    shares = [mean_interval([read.share for read in each.reads])[0] for each in drawn]
    return max(range(len(layers)), key=lambda index: shares[index]), shares


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
        points = {0.0: drawn[NONE][1].reads[: len(pairs)], options.w: drawn[name][1].reads[: len(pairs)]}
        for scale in SCALES:
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
    found = {style: library.find(f"style:{style}", signature) for style in known}
    pairs = unknown_to(styleless_pairs(options.styles), found.values())
    print("styles")
    stock = studio.draw(Condition(name="no guidance"), pairs)
    sets = {style: tuple(headset) for style, headset in found.items()}
    common = {"u": options.u, "w": options.w}
    sizes = max(len(heads) for heads in sets.values())
    others = random_sets(studio.universe, sizes, len(pairs))
    chance = studio.draw(Condition(name="random heads", heads=others, **common), pairs)
    for style, heads in sets.items():
        guided = studio.draw(Condition(name=f"heads of {style}", heads=heads, **common), pairs)
        for name, pictures in (
            ("no guidance", stock),
            (f"{sizes} random heads", chance),
            ("its heads", guided),
        ):
            flags = [read.style == style for read in pictures.reads]
            figures.append(_share(f"style {style}: {name}", flags))
        value, low, high = paired(guided, stock, lambda read, style=style: 100.0 * (read.style == style))
        name = f"style {style}: its heads minus no guidance"
        figures.append(Figure(name, value, low, high, "points", note=",".join(map(str, heads))))
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


def _row(figure: Figure) -> list[str]:
    interval = "" if figure.low is None else f"[{figure.low:.2f}, {figure.high:.2f}]"
    bar = "" if figure.bar is None else f"{figure.compare} {figure.bar:g}"
    holds = figure.as_dict()["holds"]
    return [
        figure.name,
        f"{figure.value:.2f} {figure.unit}",
        interval,
        bar,
        "" if holds is None else str(holds),
    ]


if __name__ == "__main__":
    main()
