"""Measure grounding: RefAM part by part, against plain attention maps and priors that need no model.

    python -m diffctrl.scripts.evaluate_grounding --out docs/results/grounding.json
    python -m diffctrl.scripts.evaluate_grounding --calibrate
    python -m diffctrl.scripts.evaluate_grounding --model FOLDER --data refcoco:FOLDER --split val

On the referring set of the shapes world (500 unseen expressions) with the embedded model by default. With
--calibrate, blocks, direction, noise level, text encoder and magnets are chosen on another set of scenes, and
written as the model's preset with what was measured. Intervals are 95 %, bootstrapped over scenes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffctrl.refam import RefAMConfig, metrics
from diffctrl.refam.presets import FOLDER, preset, write_preset
from diffctrl.scripts import grounding_ladder as ladder
from diffctrl.scripts.bench.harness import Figure, print_table, write_report
from diffctrl.scripts.grounding_data import Sample, davis_samples, refcoco_samples, world_samples

TEST_SEED, VALIDATION_SEED = 61_000, 62_000
EMBEDDED = "shapes-sd3"


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns what is written to `--out`."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.n, options.validation = 12, 12
    torch.set_grad_enabled(False)
    pipe, base = _pipeline(options)
    if options.calibrate:
        base = _calibrate(pipe, options)
    began = time.perf_counter()
    kind, _, place = options.data.partition(":")
    if kind == "davis":
        figures = _video(pipe, base, davis_samples(Path(place), options.n), options)
    else:
        samples = _samples(kind, place, options)
        figures = _pictures(pipe, base, samples, kind == "world", options)
    print(f"\n{time.perf_counter() - began:.0f} s, {_device(pipe)}, {pipe.transformer.dtype}")
    write_report(
        options.out,
        "grounding" if kind == "world" else f"grounding_{kind}",
        figures,
        seeds=[TEST_SEED, VALIDATION_SEED, base.seed],
        settings=base.as_dict(),
    )
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED, help="embedded model, or a folder of a pipeline")
    parser.add_argument(
        "--data",
        default="world",
        help="world, refcoco:FOLDER, refcoco+:FOLDER, refcocog:FOLDER, davis:FOLDER",
    )
    parser.add_argument("--split", default="val", help="of RefCOCO")
    parser.add_argument("--n", type=int, default=500, help="expressions; of a dataset, at most")
    parser.add_argument("--calibrate", action="store_true", help="choose the settings first, on other scenes")
    parser.add_argument("--validation", type=int, default=240, help="expressions to choose on")
    parser.add_argument("--preset", type=Path, help="where --calibrate writes; default: the package's own")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="RefAM's option")
    parser.add_argument("--batch", type=int, default=32, help="expressions in a forward")
    parser.add_argument(
        "--level", choices=("expression", "video"), default="expression", help="of J&F's mean"
    )
    parser.add_argument("--skip-ends", action="store_true", help="J&F without first and last frame")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default=None, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--quick", action="store_true", help="a few expressions, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    return parser


def _pipeline(options: argparse.Namespace) -> tuple[Any, RefAMConfig]:
    from diffctrl import settings
    from diffctrl.drawing.source import ModelSource
    from diffctrl.grounding.plan import grounder_of
    from diffctrl.grounding.run import ready_pipeline

    source = ModelSource.find(options.model)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("float32" if source.embedded or device == "cpu" else "bfloat16")
    pipe = ready_pipeline(source, grounder_of(source), getattr(torch, dtype)).to(device)
    found = preset(options.model) if source.embedded else None
    base = {} if found is None else found.config.as_dict()
    given = dict(pair.split("=", 1) for pair in options.set)
    return pipe, settings.parse(RefAMConfig, {**base, **given}, of="refam")


def _device(pipe: Any) -> str:
    return torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu"


def _samples(kind: str, place: str, options: argparse.Namespace) -> list[Sample]:
    if kind == "world":
        return world_samples(options.n, seed=TEST_SEED)
    if kind not in ("refcoco", "refcoco+", "refcocog"):
        raise SystemExit(f"--data {options.data} is none of world, refcoco, refcoco+, refcocog, davis")
    return refcoco_samples(Path(place), kind, options.split, options.n)


def _pictures(
    pipe: Any, base: RefAMConfig, samples: list[Sample], world: bool, options: argparse.Namespace
) -> list[Figure]:
    rungs = ladder.rungs_of(base)
    ladder.climb(pipe, samples, rungs, batch=options.batch, size=None)
    area = ladder.mean_area(world_samples(60, seed=VALIDATION_SEED) if world else samples)
    rungs += ladder.priors(samples, area, seed=TEST_SEED)
    figures = _ladder_figures(samples, rungs)
    if world:
        figures += _split_figures(samples, rungs)
        figures += _stop_words(pipe, base, options)
        figures += _nothing_meant(pipe, base, options)
        figures += _shares(pipe, base, options)
    return figures


def _ladder_figures(samples: list[Sample], rungs: list[ladder.Rung]) -> list[Figure]:
    by_name = {rung.name: rung for rung in rungs}
    rows, figures = [], []
    intervals: dict[tuple[str, str], metrics.Interval] = {}
    for rung in rungs:
        cells = [rung.name]
        for name, measure in ladder.MEASURES.items():
            found = intervals[rung.name, name] = ladder.interval(samples, rung.answers, measure)
            cells.append(f"{found.value:5.1f} [{found.low:.1f}, {found.high:.1f}]")
            figures.append(
                Figure(f"{rung.name}: {name}", found.value, found.low, found.high, "%", note=_note(rung))
            )
        rows.append(cells)
    print_table(["", *ladder.MEASURES], rows)
    for rung in (by_name[ladder.FULL], by_name[ladder.CHOSEN]):
        for other in (ladder.PLAIN, ladder.CENTRE, ladder.BOX):
            gain = ladder.difference(samples, rung, by_name[other])
            apart = intervals[rung.name, "pointing accuracy"].apart(intervals[other, "pointing accuracy"])
            figures.append(
                Figure(
                    f"{rung.name} over {other}: pointing accuracy",
                    gain.value,
                    gain.low,
                    gain.high,
                    "points",
                    bar=0.0,
                    note=f"same scenes; the two intervals are {'apart' if apart else 'NOT apart'}",
                )
            )
    return figures


def _note(rung: ladder.Rung) -> str:
    default = RefAMConfig().as_dict()
    changed = {name: value for name, value in rung.config.as_dict().items() if value != default[name]}
    if rung.name in (ladder.CENTRE, ladder.BOX):
        return "needs no model"
    return ", ".join(f"{name}={value}" for name, value in changed.items() if name != "mask")


def _split_figures(samples: list[Sample], rungs: list[ladder.Rung]) -> list[Figure]:
    """Pointing accuracy of each split, for the plain maps and the chosen settings."""
    figures = []
    measure = ladder.MEASURES["pointing accuracy"]
    for split in dict.fromkeys(sample.split for sample in samples):
        places = [i for i, sample in enumerate(samples) if sample.split == split]
        part = [samples[i] for i in places]
        for rung in rungs:
            if rung.name in (ladder.PLAIN, ladder.CHOSEN, ladder.CENTRE):
                found = ladder.interval(part, [rung.answers[i] for i in places], measure)
                figures.append(
                    Figure(
                        f"split {split}, {rung.name}: pointing accuracy",
                        found.value,
                        found.low,
                        found.high,
                        "%",
                        note=f"{len(part)} expressions",
                    )
                )
    rows = {}
    for figure in figures:
        split, rest = figure.name.removeprefix("split ").split(", ", 1)
        rows.setdefault(split, []).append(f"{rest.split(':')[0]} {figure.value:.0f}")
    print_table(["split", "pointing accuracy", "", ""], [[name, *cells] for name, cells in rows.items()])
    return figures


def _stop_words(pipe: Any, base: RefAMConfig, options: argparse.Namespace) -> list[Figure]:
    """How much a map changes with 0, 3 and 8 words around the same phrase."""
    samples = world_samples(max(4, options.n // 8), seed=TEST_SEED, splits=("stop words",))
    chosen = ladder.rungs_of(base)
    figures = []
    for rung in (chosen[0], chosen[-1]):
        correlations, overlaps, scenes = [], [], []
        weighed = pipe.weigh(
            [(s.picture(), s.expression) for s in samples], rung.config, batch_size=options.batch
        )
        found = [pipe.conclude(each, rung.config) for each in weighed]
        if rung.plain:
            found = [
                ladder.plain_grounding(w, f, rung.config, pipe) for w, f in zip(weighed, found, strict=True)
            ]
        for start in range(0, len(samples), 3):
            three = found[start : start + 3]
            for one, other in ((0, 1), (0, 2), (1, 2)):
                pair = torch.stack([three[one].heat.flatten(), three[other].heat.flatten()])
                correlations.append(float(torch.corrcoef(pair)[0, 1]))
                overlaps.append(metrics.iou(*metrics.overlap(three[one].mask, three[other].mask)))
                scenes.append(start)
        for name, values in (("map correlation", correlations), ("mask IoU", overlaps)):
            kept = metrics.bootstrap(scenes, lambda i, v=values: float(sum(v[k] for k in i) / len(i)))
            figures.append(
                Figure(
                    f"paraphrases with 0, 3, 8 stop words, {rung.name}: {name}",
                    kept.value,
                    kept.low,
                    kept.high,
                    note="mean over pairs",
                )
            )
            print(f"{figures[-1].name}: {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]")
    return figures


def _nothing_meant(pipe: Any, base: RefAMConfig, options: argparse.Namespace) -> list[Figure]:
    """Whether the largest value of the map tells an object that is there from one that is not.

    RefAM always points somewhere. As a test of rejection, a threshold keeps 95 % of the present objects.
    """
    number = max(4, options.n // 8)
    peaks = {}
    for split in ("conjunction", "none"):
        samples = world_samples(number, seed=TEST_SEED + 100, splits=(split,))
        pairs = [(s.picture(), s.expression) for s in samples]
        found = pipe.ground(pairs, config=base, batch_size=options.batch)
        peaks[split] = torch.tensor([float(each.heat.max()) for each in found])
    threshold = peaks["conjunction"].quantile(0.05)
    rejected = (peaks["none"] < threshold).double()
    kept = metrics.bootstrap(range(number), lambda i: 100 * float(rejected[list(i)].mean()))
    above = (peaks["conjunction"][:, None] > peaks["none"][None, :]).double().mean()
    print(f"nothing meant: {kept.value:.0f} % rejected where 95 % of present objects are kept; ", end="")
    print(f"ranked right {100 * float(above):.0f} %")
    return [
        Figure(
            "nothing meant: rejected (N-acc) where 95 % of present objects are kept",
            kept.value,
            kept.low,
            kept.high,
            "%",
            note="by the largest value of the map; 5 % would be chance",
        ),
        Figure(
            "nothing meant: pairs ranked right by the largest value",
            100 * float(above),
            unit="%",
            note="50 % would be chance",
        ),
    ]


def _shares(pipe: Any, base: RefAMConfig, options: argparse.Namespace) -> list[Figure]:
    """What image queries give to each kind of text token, over all blocks, with and without magnets.

    Where padding takes more than words, it is a magnet that the model was trained with.
    """
    samples = world_samples(max(6, options.n // 12), seed=VALIDATION_SEED)
    pairs = [(s.picture(), s.expression) for s in samples]
    blocks = f"0-{pipe.weigh(pairs[:1], replace(base, blocks='0'))[0].weights.count - 1}"
    figures = []
    for magnets in ("none", "separate"):
        config = replace(base, blocks=blocks, magnet_encoding=magnets)
        shares: dict[str, list[float]] = {}
        for each in pipe.weigh(pairs, config, batch_size=options.batch):
            for kind in ("content", "outside", "stop", "special", "pad", "magnet"):
                columns = list(each.rows.table.columns(kind))
                shares.setdefault(kind, []).append(
                    100 * float(each.weights.i2t[:, columns].sum(dim=1).mean())
                )
        for kind, values in shares.items():
            found = metrics.bootstrap(range(len(values)), lambda i, v=values: sum(v[k] for k in i) / len(i))
            name = f"weight of image queries on {kind} tokens, magnets {magnets}"
            note = f"mean over {len(values)} expressions, blocks and heads"
            figures.append(Figure(name, found.value, found.low, found.high, "%", note=note))
        print(f"weight of image queries, magnets {magnets}: ", end="")
        print(", ".join(f"{kind} {sum(v) / len(v):.1f} %" for kind, v in shares.items()))
    return figures


def _video(pipe: Any, base: RefAMConfig, samples: list[Sample], options: argparse.Namespace) -> list[Figure]:
    """J&F of tracks, one expression after another."""
    scores = []
    for sample in samples:
        frames, truth = sample.picture(), sample.truth()
        found = pipe(frames, sample.expression, config=base)
        track = found.track if found.track is not None else torch.zeros_like(truth)
        whole = torch.zeros_like(truth)
        whole[: len(track)] = track[: len(truth)]
        scores.append(metrics.track_score(whole, truth, skip_ends=options.skip_ends))
        print(f"{sample.expression}: J {scores[-1].j:.3f} F {scores[-1].f:.3f}", flush=True)
    scenes = [sample.scene for sample in samples]

    def mean(values: list[float], chosen: Any) -> float:
        if options.level == "expression":
            return 100 * sum(values[i] for i in chosen) / len(chosen)
        by_video: dict[int, list[float]] = {}
        for i in chosen:
            by_video.setdefault(scenes[i], []).append(values[i])
        return 100 * sum(sum(v) / len(v) for v in by_video.values()) / len(by_video)

    note = f"mean over {options.level}s, {'without' if options.skip_ends else 'with'} first and last frame"
    figures = []
    for name, values in (
        ("J&F", [s.mean for s in scores]),
        ("J", [s.j for s in scores]),
        ("F", [s.f for s in scores]),
    ):
        found = metrics.bootstrap(scenes, lambda i, v=values: mean(v, i))
        figures.append(Figure(f"ref-davis17: {name}", found.value, found.low, found.high, "%", note=note))
        print(f"{name}: {found.value:.1f} [{found.low:.1f}, {found.high:.1f}] ({note})")
    return figures


def _calibrate(pipe: Any, options: argparse.Namespace) -> RefAMConfig:
    """Choose settings on the validation scenes and write them as a preset."""
    from diffctrl.drawing.source import ModelSource
    from diffctrl.scripts.bench.harness import commit, versions
    from diffctrl.scripts.grounding_calibration import Calibration

    began = time.perf_counter()
    samples = world_samples(options.validation, seed=VALIDATION_SEED)
    calibration = Calibration(pipe, samples, options.batch)
    best = calibration.run(RefAMConfig())
    unlike = {each.config: each for each in calibration.tried}.values()
    tried = sorted(unlike, key=lambda each: each.value, reverse=True)
    default = RefAMConfig().as_dict()
    settings = {name: value for name, value in best.config.as_dict().items() if value != default[name]}
    evidence = {
        "set": f"referring set, {len(samples)} expressions of seed {VALIDATION_SEED}, not the test seed",
        "criterion": "mean of pointing accuracy and average precision, percent",
        "weights": ModelSource.find(options.model).weights().sha256,
        "commit": commit(),
        "versions": versions(),
        "tried": len(tried),
        "chosen": best.as_dict(),
        "runners_up": [each.as_dict() for each in tried if each.config != best.config][:5],
        "best_of_each": _best_of_each(tried),
    }
    path = options.preset or FOLDER / f"{options.model}.json"
    write_preset(path, options.model, settings, evidence)
    print(f"{len(tried)} settings in {time.perf_counter() - began:.0f} s; {path.name}: {best.as_dict()}")
    return best.config


def _best_of_each(tried: list[Any]) -> dict[str, Any]:
    """The best result of each direction, noise level, encoder and magnet setting: what a choice is worth."""
    found: dict[str, Any] = {}
    for each in tried:  # best first
        config = each.config
        magnets = f"padding {config.padding}, magnets {config.magnet_encoding}"
        for key in (
            f"direction {config.direction}, normalise {config.normalise}",
            f"sigma {config.sigma:g}",
            f"encoder {config.encoder}",
            magnets,
            f"combine {config.combine}",
            f"noun phrase {config.noun_phrase}",
            f"sinks {config.sinks}",
        ):
            found.setdefault(key, each.as_dict())
    return found


if __name__ == "__main__":
    main()
