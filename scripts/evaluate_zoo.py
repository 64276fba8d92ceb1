"""Measure an embedded image model: draw unseen captions with the real pipeline, let the judge read them.

    python -m diffctrl.scripts.evaluate_zoo --model shapes-sd3 --n 512 --out docs/results/zoo_image.json

The judge's ceilings, on clean renders of the same scenes and on their round trips through the autoencoder,
stand beside the model's figures: what the judge misreads there is not the model's fault.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SEEDS_NOTE = "scenes and captions 51000-54000 by set, noise the same plus the index of the caption"
_CHARACTER_FIELDS = ("colour", "pattern", "body", "hat", "hat_colour", "eyes", "action")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Entry point; `arguments` as on the command line. Returns what is written to `--out`."""
    options = _parser().parse_args(arguments)
    import torch

    from diffctrl.scripts.bench.harness import commit
    from diffctrl.scripts.evaluation_image import Judges, suites

    if options.quick:
        options.n, options.heldout, options.characters = 16, 4, 8
    began = time.monotonic()
    pipeline, call = _pipeline(options)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    workers = options.workers if options.workers is not None else max(1, min(14, (os.cpu_count() or 1) - 1))
    with Judges(workers) as judges:
        sets = suites(options.n, options.heldout, options.characters)
        readings = [_measure(pipeline, suite, judges, options, call) for suite in sets]
    result = {
        "topic": "zoo_image",
        "command": _command(arguments or sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit() or "unknown",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
        "seeds": SEEDS_NOTE,
        "call": call,
        "figures": _figures(readings),
    }
    _print_table(result, time.monotonic() - began)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-sd3", help="name of an embedded image model")
    parser.add_argument("--pack", type=Path, help="weights of scripts/train_zoo_image.py instead of --model")
    parser.add_argument("--n", type=int, default=512, help="captions of one- and two-object scenes")
    parser.add_argument("--heldout", type=int, default=128, help="captions with a held-out triple")
    parser.add_argument("--characters", type=int, default=256, help="captions of characters")
    parser.add_argument("--quick", action="store_true", help="a few captions, to see that it runs")
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--guidance", type=float, help="guidance scale; default as recommended")
    parser.add_argument("--shift", type=float, help="noise shift of the scheduler; default as saved")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--workers", type=int, help="judging processes; default one less than the cores")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--sheet", type=Path, help="PNG of the first pictures, captions in a .txt beside it")
    return parser


def _pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline in float32 on the CPU, and the call's arguments."""
    if options.pack is not None:
        from diffctrl.scripts.training_image_pack import RECOMMENDED, read_pack
        from diffctrl.zoo.models import image_pipeline

        parts, facts = read_pack(options.pack)
        pipeline = image_pipeline(parts, shift=float(facts["shift"]))
        config: Any = parts.vae.config
        pixels = config.sample_size
        call = {"height": pixels, "width": pixels, **RECOMMENDED}
    else:
        from diffctrl.zoo import registry

        pipeline, call = registry.load(options.model), registry.recommended(options.model)
    if options.steps is not None:
        call["num_inference_steps"] = options.steps
    if options.guidance is not None:
        call["guidance_scale"] = options.guidance
    if options.shift is not None:
        from diffctrl.zoo.models import image_scheduler

        pipeline.scheduler = image_scheduler(options.shift)
    return pipeline, call


def _measure(
    pipeline: Any, suite: Any, judges: Any, options: argparse.Namespace, call: dict[str, Any]
) -> dict[str, Any]:
    """Pictures, ceilings and their readings for one suite."""
    from diffctrl.scripts.evaluation_image import drawn, psnr, rendered, round_trips, to_bytes

    began = time.monotonic()
    pictures = drawn(pipeline, suite, batch=options.batch, call=call)
    seconds = time.monotonic() - began
    clean = rendered(suite, call["height"])
    decoded = round_trips(pipeline.vae, clean, batch=options.batch)
    if options.sheet is not None:
        _write_sheet(pictures, suite, options.sheet)
    reading = {
        "name": suite.name,
        "model": judges.read(pictures, suite.captions),
        "clean": judges.read(to_bytes(clean), suite.captions),
        "decoded": judges.read(to_bytes(decoded), suite.captions),
        "psnr": psnr(clean, decoded),
        "seconds": seconds / len(suite.captions),
    }
    total = time.monotonic() - began
    print(
        f"{suite.name}: {len(suite.captions)} captions in {total:.0f} s, {seconds:.0f} s of it drawing",
        flush=True,
    )
    return reading


def _figures(readings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All figures of the evaluation, in the order of the table."""
    import torch

    from diffctrl.scripts.evaluation_image import CHARACTERS, HELD_OUT, ONE, TWO

    figures = []
    bars = {ONE: 92.0, TWO: 82.0, HELD_OUT: 70.0}
    for reading in readings:
        figures.append(
            _share_figure(
                f"{reading['name']}: exact", reading, lambda judged: judged.exact, bars.get(reading["name"])
            )
        )
    shapes = [reading for reading in readings if reading["name"] in (ONE, TWO)]
    fields = {"background": 99.0, "texture": None, "style": None, "colour": 99.0, "shape": None}
    fields |= {"size": None, "pattern": None, "relation": 98.0}
    for field, bar in fields.items():
        figures += _field_figures("shapes", shapes, field, bar)
    characters = [reading for reading in readings if reading["name"] == CHARACTERS]
    for field in ("background", "texture", "relation", *_CHARACTER_FIELDS):
        bar = 90.0 if field in _CHARACTER_FIELDS else None
        figures += _field_figures("characters", characters, field, bar)
    values = torch.cat([reading["psnr"] for reading in readings])
    half = 1.96 * values.std().item() / len(values) ** 0.5
    mean = values.mean().item()
    figures.append(
        _figure(
            "autoencoder PSNR, mean",
            mean,
            mean - half,
            mean + half,
            "dB",
            40.0,
            f"{len(values)} unseen scenes",
        )
    )
    fifth = values.quantile(0.05).item()
    figures.append(_figure("autoencoder PSNR, 5th percentile", fifth, None, None, "dB", None, ""))
    return figures


def _field_figures(
    world: str, readings: list[dict[str, Any]], field: str, bar: float | None
) -> list[dict[str, Any]]:
    """One figure of an attribute over some suites, or none where no caption names it."""
    from diffctrl.scripts.evaluation_image import Judged

    merged: dict[str, Any] = {}
    for source in ("model", "clean", "decoded"):
        facts = [fact for reading in readings for fact in reading[source].facts if fact[0] == field]
        merged[source] = Judged(exact=[right for _, right in facts], facts=facts)
    if not merged["model"].exact:
        return []
    return [_share_figure(f"{world}: {field}", merged, lambda judged: judged.exact, bar)]


def _share_figure(name: str, reading: dict[str, Any], flags: Any, bar: float | None) -> dict[str, Any]:
    from diffctrl.scripts.evaluation_image import share

    value, low, high, count = share(flags(reading["model"]))
    clean, decoded = share(flags(reading["clean"]))[0], share(flags(reading["decoded"]))[0]
    note = f"{count} facts; judge's ceiling {clean:.1f} on renders, {decoded:.1f} on round trips"
    return _figure(name, value, low, high, "%", bar, note)


def _figure(
    name: str, value: float, low: float | None, high: float | None, unit: str, bar: float | None, note: str
) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "low": low,
        "high": high,
        "unit": unit,
        "bar": bar,
        "compare": ">=",
        "holds": None if bar is None else value >= bar,
        "note": note,
    }


def _print_table(result: dict[str, Any], seconds: float) -> None:
    print(f"\n{result['device']}, {seconds:.0f} s, call {result['call']}")
    for row in result["figures"]:
        interval = "" if row["low"] is None else f" [{row['low']:.1f}, {row['high']:.1f}]"
        bar = "" if row["bar"] is None else f"  bar {row['bar']:g} {'holds' if row['holds'] else 'MISSED'}"
        print(f"{row['name']:34s} {row['value']:6.1f}{interval:15s} {row['unit']:3s}{bar:20s}  {row['note']}")


def _write_sheet(pictures: Any, suite: Any, path: Path, columns: int = 8, rows: int = 4) -> None:
    """The first pictures of a suite as one PNG, named after the suite."""
    from PIL import Image

    chosen = pictures[: columns * rows]
    _, _, height, width = chosen.shape
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height))
    for index, picture in enumerate(chosen):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(tile, (index % columns * width, index // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_stem(f"{path.stem}_{suite.name.replace(' ', '_')}")
    sheet.save(target)
    target.with_suffix(".txt").write_text("\n".join(suite.captions[: len(chosen)]) + "\n")


def _command(arguments: list[str]) -> str:
    """The command line as it can be repeated elsewhere: of a path only its name."""
    words = [Path(word).name if "/" in word else word for word in arguments]
    return " ".join(["python -m diffctrl.scripts.evaluate_zoo", *words])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "diffctrl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    main()
