"""Where in a run a length LoRA falls short of another: its error at each noise level, on unseen clips.

    python -m diffctrl.scripts.evaluate_length_error --lora length-4x --against runs/length-dense \\
        --out docs/results/length_error.json --picture docs/pictures/length_error.png

Both predict the velocity of the same clips with the same noise, each with its own attention: a LoRA of a mask
dense in the part of a run that it was trained so for. The error is the mean square that training lowers; the
ratio of the two is taken clip by clip. Runs begin with the highest levels. `--quick` measures LoRAs of a tiny
random model.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import diffctrl
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.length import LengthLoRA, read
from diffctrl.lengthening.batches import MARKS
from diffctrl.lengthening.train import processor
from diffctrl.pipelines.length import find, load_length_lora, unload_length_lora
from diffctrl.pipelines.length_models import WanVelocity
from diffctrl.scripts.bench.harness import Figure, print_figures, write_report
from diffctrl.scripts.evaluate_length import make_quick
from diffctrl.scripts.evaluation_length import bootstrapped
from diffctrl.scripts.evaluation_video import measured, video_suite
from diffctrl.zoo import clips

TOPIC = "length_error"
PARTS = (0.02, 0.1, 0.2, 0.28, 0.38, 0.48, 0.6, 0.75, 0.9)
"""Of a run, at which the error is measured."""
_SEED = 91_000


@dataclass(frozen=True, slots=True)
class Subject:
    """A LoRA, and what it is called in tables."""

    name: str
    path: Path
    lora: LengthLoRA

    @classmethod
    def of(cls, source: str) -> Subject:
        """By name, file or folder.

        Raises:
            BadRequestError: there is no such LoRA.
        """
        path = find(source)
        given = Path(source)
        return cls(given.parent.name if given.suffix else given.name, path, read(path))

    def is_dense(self, part: float) -> bool:
        """Whether it attends all at this part of a run."""
        return self.lora.radial is None or part < self.lora.radial.get("dense_fraction", 0.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """Some clips: latents (B, C, F, h, w), embeddings of their captions, and the noise that is added."""

    clean: Tensor
    text: dict[str, Tensor]
    noise: Tensor


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    return measured(_parser(), arguments, _make_quick, _measure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-wan", help="embedded video model, or a folder like it")
    parser.add_argument("--lora", default="length-4x", help="name, file or folder")
    parser.add_argument("--against", default="runs/length-dense", help="the LoRA to compare with")
    parser.add_argument("--form", default="wall", choices=(*clips.FORMS, "all"), help="of the clips")
    parser.add_argument("--n", type=int, default=24, help="clips")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model and two clips: does it run?"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--picture", type=Path, help="PNG of the ratio over a run; needs diffctrl[plots]")
    return parser


def _make_quick(options: argparse.Namespace, folder: Path) -> None:
    make_quick(options, folder)
    options.lora, options.against, options.n, options.batch = options.radial, options.dense, 2, 2


def _measure(options: argparse.Namespace) -> list[Figure]:
    if options.picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadRequestError("--picture needs matplotlib: pip install 'diffctrl[plots]'")
    subjects = [Subject.of(options.lora), Subject.of(options.against)]
    if subjects[0].lora.frames != subjects[1].lora.frames:
        raise BadRequestError("the two LoRAs are for clips of other lengths")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = ModelSource.find(options.model)
    call = source.recommended()
    if not call:
        raise BadRequestError(f"{options.model} is none of the package's video models")
    pipe = source.load(torch.float32).to(device)
    model = WanVelocity(pipe, call.get("max_sequence_length"))
    forms = None if options.form == "all" else (options.form,)
    samples = _samples(model, options, forms, subjects[0].lora.frames[0], int(call["height"]), device)
    figures: list[Figure] = []
    for part in PARTS:
        level = (1 - part) * model.shift / (1 + (model.shift - 1) * (1 - part))
        errors = [_errors(model, subject, samples, part, level) for subject in subjects]
        figures += _figures(part, level, subjects, errors)
        print(f"{figures[-1].name}: {figures[-1].value:.3f}", flush=True)
        write_report(options.out, TOPIC, figures, seeds=[_SEED], form=options.form)
    if options.picture is not None:
        _draw(options.picture, figures, subjects)
    print_figures(figures)
    return figures


@torch.no_grad()
def _samples(
    model: WanVelocity,
    options: argparse.Namespace,
    forms: tuple[str, ...] | None,
    frames: int,
    size: int,
    device: torch.device,
) -> list[Sample]:
    suite = video_suite(options.n, seed=_SEED, frames=frames, forms=forms)
    samples = []
    for first in range(0, options.n, options.batch):
        places = list(range(first, min(options.n, first + options.batch)))
        pixels = clips.render(suite.scenes.select(places).to(device), size)[0]
        clean = model.latents(pixels * 2 - 1)
        noise = [
            torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(_SEED + place))
            for place in places
        ]
        text = model.embeddings([suite.captions[place] for place in places], device)
        samples.append(Sample(clean, text, torch.stack(noise).to(device)))
    return samples


@torch.no_grad()
def _errors(
    model: WanVelocity, subject: Subject, samples: Sequence[Sample], part: float, level: float
) -> list[float]:
    """Mean square error of the velocity, of each clip."""
    load_length_lora(model.pipe, subject.path, mask=False)
    run = SimpleNamespace(step_index=int(part * MARKS), timesteps=range(MARKS))
    errors: list[float] = []
    try:
        with diffctrl.apply(model.transformer, processor(subject.lora.radial), scheduler=run):
            for one in samples:
                levels = torch.full((len(one.clean),), level, device=one.clean.device)
                found = model.call(
                    model.transformer, torch.lerp(one.clean, one.noise, level), levels, one.text
                )
                wrong = found.float() - (one.noise - one.clean)
                errors += wrong.square().flatten(1).mean(1).tolist()
    finally:
        unload_length_lora(model.pipe)
    return errors


def _figures(
    part: float, level: float, subjects: Sequence[Subject], errors: Sequence[Sequence[float]]
) -> list[Figure]:
    note = f"noise level {level:.3f}, {len(errors[0])} clips"
    figures = [
        Figure(f"{part:g} of the run: error of {subject.name}", *bootstrapped(found), note=note)
        for subject, found in zip(subjects, errors, strict=True)
    ]
    ratio = bootstrapped([one / other for one, other in zip(*errors, strict=True)])
    attention = "dense" if subjects[0].is_dense(part) else "under the mask"
    label = f"{part:g} of the run: {subjects[0].name} over {subjects[1].name}"
    return [*figures, Figure(label, *ratio, note=f"{note}, {attention}")]


def _draw(path: Path, figures: Sequence[Figure], subjects: Sequence[Subject]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    ratios = [figure for figure in figures if " over " in figure.name]
    values = [figure.value for figure in ratios]
    spread = [
        [figure.value - (figure.low or figure.value) for figure in ratios],
        [(figure.high or figure.value) - figure.value for figure in ratios],
    ]
    _, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.axhline(1.0, color="0.6", linewidth=1)
    if subjects[0].lora.radial is not None:
        dense = subjects[0].lora.radial.get("dense_fraction", 0.0)
        axes.axvspan(0.0, dense, color="0.92", label="dense steps")
        axes.legend(loc="lower right")
    axes.errorbar(PARTS, values, yerr=spread, marker="o", markersize=4, capsize=3)
    axes.set(xlabel="part of the run", ylabel="error over that of the other LoRA", xlim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(path, dpi=120)
    pyplot.close()


if __name__ == "__main__":
    main()
