"""The files of a search's report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffctrl.drawing.hunt import PipelineSampler
from diffctrl.drawing.hunt_plan import HuntPlan
from diffctrl.softpag.headhunt import report
from diffctrl.softpag.headset import HeadSet

if TYPE_CHECKING:
    from PIL.Image import Image

_PAIRS = 4


def write(plan: HuntPlan, found: HeadSet, folder: Path) -> list[Path]:
    """Write heat map and sample grid; returns their paths."""
    paths = [folder / "heat-map.png", folder / "samples.png"]
    report.heat_map(found).save(paths[0])
    samples(plan, found).save(paths[1])
    return paths


def samples(plan: HuntPlan, found: HeadSet) -> Image:
    """A few of the search's pairs: unguided, and with the heads of each round."""
    rounds = sorted({each.round for each in found.chosen})
    sets = [(), *(found.up_to_round(number).heads for number in rounds)]
    titles = [
        "no guidance",
        *(f"round {number}: {len(heads)} heads" for number, heads in zip(rounds, sets[1:], strict=True)),
    ]
    sampler = PipelineSampler(plan.load(), replace(plan.config, steady=False), plan.call)
    try:
        lines = [
            (
                f"{pair.prompt} (seed {pair.seed})",
                [_picture(each) for each in sampler.sample([pair] * len(sets), sets)],
            )
            for pair in plan.pairs[:_PAIRS]
        ]
    finally:
        sampler.close()
    return report.sample_grid(titles, lines)


def _picture(image: Any) -> Image:
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
