"""Measure an embedded video model: draw unseen captions with the real pipeline, let the judge read the clips.

    python -m diffctrl.scripts.evaluate_zoo_video --model shapes-wan --n 256 --out docs/results/zoo_video.json

The judge's ceilings, on clean renders of the same clips and on their round trips through the autoencoder,
stand beside the model's figures: what the judge misreads there is not the model's fault.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.scripts.bench.harness import commit
from diffctrl.scripts.evaluate_zoo import versions
from diffctrl.scripts.evaluation_image import share
from diffctrl.scripts.evaluation_video import VideoSuite, judged, video_suite
from diffctrl.scripts.training_loop import training_device
from diffctrl.zoo import clips

BARS = {"direction": 90.0, "colour": 95.0, "shape": 85.0, "reappears": 70.0}
"""Gate 3, at 33 frames."""
_SEEDS = {"all forms": 61_000, "behind the wall": 62_000}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Entry point; `arguments` as on the command line. Returns what is written to `--out`."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.n, options.walls, options.steps = 2, 1, 2
    began = time.monotonic()
    pipeline, call = packed_pipeline(options)
    call = {**call, "num_frames": options.frames or call["num_frames"]}
    if options.steps is not None:
        call["num_inference_steps"] = options.steps
    if options.guidance is not None:
        call["guidance_scale"] = options.guidance
    device = torch.device("cpu") if options.cpu else training_device(smoke=not torch.cuda.is_available())
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    figures: list[dict[str, Any]] = []
    gated = call["num_frames"] == 33
    for (name, seed), forms in zip(_SEEDS.items(), (None, ("wall",)), strict=True):
        count = options.n if forms is None else options.walls
        if not count:
            continue
        suite = video_suite(count, seed=seed, frames=call["num_frames"], forms=forms)
        figures += _measure(pipeline, suite, name, options.batch, call, gated=gated)
        print(f"{name}: {count} clips done after {time.monotonic() - began:.0f} s", flush=True)
    result = {
        "topic": "zoo_video" if gated else f"zoo_video_{call['num_frames']}",
        "command": _command(arguments or sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit() or "unknown",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
        "seeds": "clips and captions 61000 and 62000 by set, noise the same plus the index of the caption",
        "call": call,
        "figures": figures,
    }
    for row in figures:
        bar = "" if row["bar"] is None else f"  bar {row['bar']:g} {'holds' if row['holds'] else 'MISSED'}"
        print(
            f"{row['name']:36s} {row['value']:6.1f} [{row['low']:.1f}, {row['high']:.1f}] "
            f"{row['unit']}{bar}  {row['note']}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-wan", help="name of an embedded video model")
    parser.add_argument("--pack", type=Path, help="weights of scripts/train_zoo_video.py instead of --model")
    parser.add_argument("--n", type=int, default=256, help="clips of all forms")
    parser.add_argument("--walls", type=int, default=200, help="clips behind the wall, on top")
    parser.add_argument("--frames", type=int, help="length; default as recommended. Bars are for 33")
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--guidance", type=float, help="guidance scale; default as recommended")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="three clips, two steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    return parser


def packed_pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline in float32 on the CPU, and the call's arguments."""
    if options.pack is None:
        from diffctrl.zoo import registry

        return registry.load(options.model), registry.recommended(options.model)
    from diffctrl.scripts.training_video_pack import RECOMMENDED, read_video_pack
    from diffctrl.scripts.training_video_vae import SMOKE_SIZE
    from diffctrl.zoo.video import VideoSize, video_pipeline

    parts, facts = read_video_pack(options.pack)
    pixels = (SMOKE_SIZE if facts["smoke"] else VideoSize()).pixels
    return video_pipeline(parts, shift=float(facts["shift"])), {
        "height": pixels,
        "width": pixels,
        **RECOMMENDED,
    }


def _measure(
    pipeline: Any, suite: VideoSuite, name: str, batch: int, call: dict[str, Any], *, gated: bool
) -> list[dict[str, Any]]:
    """Figures of one suite, with the judge's ceilings in the notes."""
    rates: list[dict[str, list[bool]]] = [{}, {}, {}]
    for first in range(0, len(suite.captions), batch):
        part = slice(first, first + batch)
        some = VideoSuite(
            scenes=suite.scenes.select(part), facts=suite.facts[part], captions=suite.captions[part]
        )
        for into, videos in zip(rates, _videos(pipeline, some, _SEEDS[name] + first, call), strict=True):
            for fact, flags in judged(videos, some).items():
                into.setdefault(fact, []).extend(flags)
    model, clean, decoded = rates
    figures = []
    for fact, flags in sorted(model.items()):
        value, low, high, count = share(flags)
        bar = BARS.get(fact) if gated and (name == "all forms") != (fact == "reappears") else None
        figures.append(
            {
                "name": f"{name}: {fact}",
                "value": value,
                "low": low,
                "high": high,
                "unit": "%",
                "bar": bar,
                "compare": ">=",
                "holds": None if bar is None else value >= bar,
                "note": f"{count} facts; judge's ceiling {share(clean[fact])[0]:.1f} on renders, "
                f"{share(decoded[fact])[0]:.1f} on round trips",
            }
        )
    return figures


@torch.no_grad()
def _videos(pipeline: Any, suite: VideoSuite, seed: int, call: dict[str, Any]) -> Iterator[Tensor]:
    """The model's clips, clean renders, and round trips: each (B, T, 3, H, W) in [0, 1] on the CPU."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(suite.captions))]
    drawn = pipeline(suite.captions, generator=generators, output_type="pt", **call).frames
    yield drawn.float().cpu()
    clean, _ = clips.render(suite.scenes, call["height"])
    yield clean
    vae = pipeline.vae
    # The stock encoder takes 4 k + 1 frames; a remainder is repeated at the end and cut off again.
    missing = -(clean.shape[1] - 1) % 4
    padded = torch.cat([clean, clean[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    latents = vae.encode(padded.transpose(1, 2).to(vae.device, vae.dtype) * 2 - 1).latent_dist.mean
    back = vae.decode(latents).sample.transpose(1, 2)[:, : clean.shape[1]]
    yield (back.float() * 0.5 + 0.5).clamp(0, 1).cpu()


def _command(arguments: list[str]) -> str:
    """The command line as it can be repeated elsewhere: of a path only its name."""
    words = [Path(word).name if "/" in word else word for word in arguments]
    return " ".join(["python -m diffctrl.scripts.evaluate_zoo_video", *words])


if __name__ == "__main__":
    main()
