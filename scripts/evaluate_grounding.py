"""Measure grounding: RefAM part by part, against plain attention maps and priors that need no model.

    python -m diffctrl.scripts.evaluate_grounding --out docs/results/grounding.json
    python -m diffctrl.scripts.evaluate_grounding --calibrate
    python -m diffctrl.scripts.evaluate_grounding --model shapes-wan --data clips --out FILE
    python -m diffctrl.scripts.evaluate_grounding --model FOLDER --data refcoco:FOLDER --split val

On the referring set of the shapes world (500 unseen expressions) with the embedded model by default; on clips
of two moving shapes with the video model: a point on every frame that shows the target, J and F of the track.
With --calibrate, blocks, direction, noise level, text encoder and magnets are chosen on other scenes, and
written as the model's preset with what was measured. Intervals are 95 %, bootstrapped over scenes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffctrl.refam import RefAMConfig, metrics
from diffctrl.refam.presets import FOLDER, preset, write_preset
from diffctrl.scripts import grounding_extras as extras
from diffctrl.scripts import grounding_ladder as ladder
from diffctrl.scripts.bench.harness import Figure, print_table, write_report
from diffctrl.scripts.grounding_data import (
    CLIP_FRAMES,
    TEST_SEED,
    VALIDATION_SEED,
    Sample,
    clip_samples,
    davis_samples,
    refcoco_samples,
    world_samples,
)

EMBEDDED = "shapes-sd3"


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns what is written to `--out`."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.n, options.validation = 12, 12
    pipe, base, plain = _pipeline(options)
    if options.calibrate:
        base, plain = _calibrate(pipe, options)
    began = time.perf_counter()
    kind, _, place = options.data.partition(":")
    if kind == "davis":
        figures = _video(pipe, base, "ref-davis17", davis_samples(Path(place), options.n), options)
    elif kind == "clips":
        figures = _clips(pipe, base, plain, options)
    else:
        samples = _samples(kind, place, options)
        figures = _pictures(pipe, base, plain, samples, kind == "world", options)
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
        help="world, clips, refcoco:FOLDER, refcoco+:FOLDER, refcocog:FOLDER, davis:FOLDER",
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


def _pipeline(options: argparse.Namespace) -> tuple[Any, RefAMConfig, RefAMConfig | None]:
    """The pipeline, its settings, and those that suit plain maps best where they were measured."""
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
    rival = None if found is None else found.evidence.get("plain")
    plain = None if rival is None else RefAMConfig.from_dict(rival["settings"])
    return pipe, settings.parse(RefAMConfig, {**base, **given}, of="refam"), plain


def _device(pipe: Any) -> str:
    return torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu"


def _world(options: argparse.Namespace) -> dict[str, Any]:
    """Embedded models know the world's own words and its size; for others people's words, large."""
    return {} if options.model == EMBEDDED else {"size": 512, "wording": "english"}


def _samples(kind: str, place: str, options: argparse.Namespace) -> list[Sample]:
    if kind == "world":
        return world_samples(options.n, seed=TEST_SEED, **_world(options))
    if kind not in ("refcoco", "refcoco+", "refcocog"):
        raise SystemExit(f"--data {options.data} is none of world, clips, refcoco, refcoco+, refcocog, davis")
    return refcoco_samples(Path(place), kind, options.split, options.n)


def _pictures(
    pipe: Any,
    base: RefAMConfig,
    plain: RefAMConfig | None,
    samples: list[Sample],
    world: bool,
    options: argparse.Namespace,
) -> list[Figure]:
    others = world_samples(60, seed=VALIDATION_SEED) if world else samples
    rungs = _answered(pipe, base, plain, samples, others, options.batch)
    figures = _ladder_figures(samples, rungs, ladder.MEASURES)
    if world:
        figures += _split_figures(samples, rungs)
        figures += extras.stop_words(pipe, base, options.n, options.batch, _world(options))
        figures += extras.nothing_meant(pipe, base, options.n, options.batch, _world(options))
        figures += extras.shares(pipe, base, options.n, options.batch, _world(options))
    return figures


def _clips(
    pipe: Any, base: RefAMConfig, plain: RefAMConfig | None, options: argparse.Namespace
) -> list[Figure]:
    """The ladder on clips of the generated world."""
    samples, others = clip_samples(options.n, seed=TEST_SEED), clip_samples(60, seed=VALIDATION_SEED)
    rungs = _answered(pipe, base, plain, samples, others, options.batch, CLIP_FRAMES)
    figures = _ladder_figures(samples, rungs, ladder.CLIP_MEASURES)
    best = ladder.reachable(samples, pipe.reader.multiple)
    note = "share of frames in which the middle of any token is on the target"
    figures.append(Figure("reachable: pointing accuracy", best, unit="%", note=note))
    return figures + _split_figures(samples, rungs)


def _answered(
    pipe: Any,
    base: RefAMConfig,
    plain: RefAMConfig | None,
    samples: list[Sample],
    others: list[Sample],
    batch: int,
    frames: int | None = None,
) -> list[ladder.Rung]:
    """Every rung and prior with its answers; the random box has the usual area of the others' targets."""
    rungs = ladder.rungs_of(base, plain)
    ladder.climb(pipe, samples, rungs, batch=batch, frames=frames)
    return rungs + ladder.priors(samples, ladder.mean_area(others), seed=TEST_SEED)


def _ladder_figures(
    samples: list[Sample], rungs: list[ladder.Rung], measures: Mapping[str, ladder.Measure]
) -> list[Figure]:
    by_name = {rung.name: rung for rung in rungs}
    rows, figures = [], []
    intervals: dict[tuple[str, str], metrics.Interval] = {}
    for rung in rungs:
        cells = [rung.name]
        for name, measure in measures.items():
            found = intervals[rung.name, name] = ladder.interval(samples, rung.answers, measure)
            cells.append(f"{found.value:5.1f} [{found.low:.1f}, {found.high:.1f}]")
            figures.append(
                Figure(f"{rung.name}: {name}", found.value, found.low, found.high, "%", note=_note(rung))
            )
        rows.append(cells)
    print_table(["", *measures], rows)
    parts = [ladder.PLAIN, ladder.STOP, ladder.PHRASE, ladder.SINKS, ladder.BIAS, ladder.FULL]
    for before, name in zip(parts, parts[1:], strict=False):
        gain = ladder.difference(samples, by_name[name], by_name[before])
        # No part may cost more than a point.
        note = "on top of the parts before it, same scenes"
        figures.append(
            Figure(f"{name}: points gained", gain.value, gain.low, gain.high, "points", bar=-1.0, note=note)
        )
    for rung in (by_name[ladder.FULL], by_name[ladder.CHOSEN]):
        for other in (ladder.PLAIN_BEST, ladder.PLAIN, ladder.CENTRE, ladder.BOX):
            if other not in by_name:
                continue
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


def _video(
    pipe: Any, base: RefAMConfig, name: str, samples: list[Sample], options: argparse.Namespace
) -> list[Figure]:
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
    parts: dict[str, Any] = {name: range(len(samples))}
    for split in dict.fromkeys(sample.split for sample in samples):
        parts[split] = [i for i, sample in enumerate(samples) if sample.split == split]
    for part, places in parts.items():
        for measure, values in (
            ("J&F", [s.mean for s in scores]),
            ("J", [s.j for s in scores]),
            ("F", [s.f for s in scores]),
        ):
            found = metrics.bootstrap(
                [scenes[i] for i in places], lambda k, v=values, p=list(places): mean(v, [p[i] for i in k])
            )
            figures.append(Figure(f"{part}: {measure}", found.value, found.low, found.high, "%", note=note))
            print(f"{part}, {measure}: {found.value:.1f} [{found.low:.1f}, {found.high:.1f}] ({note})")
    return figures


def _calibrate(pipe: Any, options: argparse.Namespace) -> tuple[RefAMConfig, RefAMConfig]:
    """Choose settings on the validation scenes and write them as a preset; those of plain maps too."""
    from diffctrl.drawing.source import ModelSource
    from diffctrl.scripts.bench.harness import commit, versions
    from diffctrl.scripts.grounding_calibration import Calibration

    began = time.perf_counter()
    clips = options.data == "clips"
    samples = (
        clip_samples(options.validation, seed=VALIDATION_SEED)
        if clips
        else world_samples(options.validation, seed=VALIDATION_SEED, **_world(options))
    )
    calibration = Calibration(pipe, samples, options.batch, CLIP_FRAMES if clips else None)
    best = calibration.run(RefAMConfig())
    unlike = {each.config: each for each in calibration.tried}.values()
    tried = sorted(unlike, key=lambda each: each.value, reverse=True)
    default = RefAMConfig().as_dict()
    settings = {name: value for name, value in best.config.as_dict().items() if value != default[name]}
    evidence = {
        "set": f"{'clips' if clips else 'referring set'}, {len(samples)} expressions of seed "
        f"{VALIDATION_SEED}, not the test seed",
        "criterion": "mean of pointing accuracy and average precision, percent",
        "weights": ModelSource.find(options.model).weights().sha256,
        "commit": commit(),
        "versions": versions(),
        "tried": len(tried),
        "chosen": best.as_dict(),
        "plain": calibration.best_plain().as_dict(),
        "runners_up": [each.as_dict() for each in tried if each.config != best.config][:5],
        "best_of_each": _best_of_each(tried),
    }
    path = options.preset or FOLDER / f"{options.model}.json"
    write_preset(path, options.model, settings, evidence)
    print(f"{len(tried)} settings in {time.perf_counter() - began:.0f} s; {path.name}: {best.as_dict()}")
    return best.config, calibration.best_plain().config


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
