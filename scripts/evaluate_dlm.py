"""Measure sparse attention on a diffusion language model: exact match against dense and fixed patterns.

    python -m diffctrl.scripts.evaluate_dlm --out docs/results/dlm.json
    --figure docs/pictures/sparsed-ablation.png
    python -m diffctrl.scripts.evaluate_dlm --model GSAI-ML/LLaDA-8B-Instruct --jsonl ruler_4k.jsonl
    --gen-length 128 --out ruler.json

Three parts: `gate` (every suite with every variant, on the same prompts), `ablation` (select, skip, block
size and isolation, with a figure) and `patterns` (retained attention, and what patterns of steps and heads
have in common). A user's JSON lines take the place of the generated suites; their fields are described in
`evaluation_text_files.py`. Greedy decoding by confidence, as many steps as tokens.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from diffctrl.scripts.bench.harness import Figure, print_table, write_report

PARTS = ("gate", "ablation", "patterns")
TOPIC = "dlm"


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.n, options.lengths, options.ablation_length = min(options.n, 8), [128], 128
        options.ablation_n = min(options.ablation_n, 4)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = Evaluation(options, Path(scratch))
        for part in options.parts:
            for figures in getattr(evaluation, part)():
                evaluation.figures += figures
                evaluation.write()
                for figure in figures:
                    _say(figure, time.monotonic() - began)
    rows = [_row(figure) for figure in evaluation.figures]
    print_table(("figure", "value", "95 %", "bar", "note"), rows)
    return evaluation.figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="scenes-lm", help="embedded model, folder, or hub repository")
    parser.add_argument("--pack", type=Path, help="weights of scripts/train_zoo_text.py instead of --model")
    parser.add_argument("--jsonl", type=Path, nargs="*", default=[], help="files of prompts and answers")
    parser.add_argument("--gen-length", type=int, default=128, help="generated tokens, for --jsonl")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096], help="of lookups, in tokens")
    parser.add_argument("--n", type=int, default=1024, help="prompts of each suite")
    parser.add_argument(
        "--short", action=argparse.BooleanOptionalAction, default=True, help="the short tasks"
    )
    parser.add_argument("--ablation-length", type=int, default=1024)
    parser.add_argument("--ablation-n", type=int, default=256, help="prompts of each point of the ablation")
    parser.add_argument("--select", type=float, default=0.3)
    parser.add_argument("--skip", type=float, default=0.2)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a few short prompts, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--add", action="store_true", help="keep the figures that --out holds already")
    parser.add_argument("--figure", type=Path, help="PNG of the ablation")
    return parser


class Evaluation:
    """One model, its suites, and the figures so far."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        import torch

        from diffctrl.dlm import Checkpoint
        from diffctrl.sparsed import SparseDConfig
        from diffctrl.zoo.tasks import TOKENS

        self.options = options
        self.figures = _figures_of(options.out) if options.add else []
        checkpoint = Checkpoint.open(_folder(options, scratch))
        if checkpoint.sampler is None:
            raise SystemExit(
                f"{options.model} does not say how it decodes; write sampler into its diffctrl.json"
            )
        self._sampler = checkpoint.sampler
        self.tokenizer = checkpoint.tokenizer()
        if not options.jsonl and self.tokenizer.get_vocab().keys() != set(TOKENS):
            raise SystemExit(
                f"{options.model} does not know the words of the generated exercises; give --jsonl"
            )
        self.special = checkpoint.special(self.tokenizer)
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # 16 bits on a GPU, where the engine's kernels are; a CPU computes them slowly.
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.model = checkpoint.load(dtype).to(device)
        self.config = SparseDConfig(
            select=options.select, skip=options.skip, block_size=options.block_size, auto_dense=False
        )
        self._files = [self._file(path) for path in options.jsonl]

    def _file(self, path: Path) -> Any:
        from diffctrl.scripts.evaluation_text_files import file_suite

        return file_suite(path, self.tokenizer, gen_length=self.options.gen_length, count=self.options.n)

    def suites(self) -> list[Any]:
        """The user's files, or lookups at every length and the short tasks."""
        from diffctrl.scripts.evaluation_text import lookup_suites, short_suites

        if self._files:
            return self._files
        short = short_suites(self.tokenizer, self.options.n) if self.options.short else []
        return [*short, *lookup_suites(self.tokenizer, self.options.lengths, self.options.n)]

    def read(self, suite: Any, variant: Any) -> Any:
        from diffctrl.scripts.evaluation_text import greedy_sampler, read

        sampler = greedy_sampler(self._sampler, self.special, suite.gen_length)
        limit = self.options.batch_tokens
        return read(self.model, self.tokenizer, sampler, suite, variant, batch_tokens=limit)

    def gate(self) -> Iterator[list[Figure]]:
        """Every suite with every variant: shares of right answers, and differences to dense."""
        from diffctrl.scripts.evaluation_text import difference, share, variants

        for suite in self.suites():
            dense = None
            for variant in variants(self.config):
                if variant.processor is not None and self._too_short(suite):
                    continue
                if variant.early and not (self._files or suite.name.startswith("one fact")):
                    continue
                reading = self.read(suite, variant)
                note = f"{len(reading.right)} prompts"
                if variant.processor is not None:
                    note += (
                        f"; density {reading.density:.3f}, retained {reading.mass:.3f}, "
                        f"{reading.sparse_steps} of {reading.steps} steps sparse, blocks of "
                        f"{self.options.block_size}"
                    )
                bar = _dense_bar(suite.name) if dense is None and not self._files else None
                figures = [
                    Figure(f"{suite.name}: {variant.name}", *share(reading.right), "%", bar, note=note)
                ]
                if dense is None:
                    dense = reading
                else:
                    lost = difference(dense.right, reading.right)
                    bar, compare = self._loss_bar(variant.name)
                    figures.append(
                        Figure(
                            f"{suite.name}: lost to dense by {variant.name}",
                            *lost,
                            "points",
                            bar,
                            compare,
                            note,
                        )
                    )
                yield figures

    def _too_short(self, suite: Any) -> bool:
        """Fewer than four blocks: every variant would keep nearly everything."""
        longest = max(map(len, suite.prompts)) + suite.gen_length
        return longest < 4 * self.options.block_size

    def _loss_bar(self, variant: str) -> tuple[float | None, str]:
        """SparseD may lose half a point; a window has to lose thirty where one fact of many is asked for."""
        if variant == "SparseD":
            return 0.5, "<="
        return (30.0, ">=") if "no dense steps" in variant and not self._files else (None, ">=")

    def ablation(self) -> Iterator[list[Figure]]:
        """One lookup suite under other settings; draws the figure when all are there."""
        from diffctrl.scripts.evaluation_text import Variant, lookup_suites, share
        from diffctrl.scripts.evaluation_text_patterns import FixedPatternAttnProcessor

        options = self.options
        suites = self._files or lookup_suites(self.tokenizer, [options.ablation_length], options.ablation_n)
        suite = suites[-1]
        points: dict[str, list[tuple[float, float, float, float]]] = {}
        for series, at, processor in self._ablation_points(FixedPatternAttnProcessor):
            reading = self.read(suite, Variant(name=series, processor=processor))
            found = share(reading.right)
            points.setdefault(series, []).append((at, *found))
            note = f"density {reading.density:.3f}, retained {reading.mass:.3f}; {suite.name}"
            yield [Figure(f"ablation, {series}: {at:g}", *found, "%", note=note)]
        if options.figure is not None:
            _draw(points, suite.name, options.figure)

    def _ablation_points(self, fixed: Any) -> Iterator[tuple[str, float, Any]]:
        from diffctrl.processors import SparseDAttnProcessor

        base, quick = self.config, self.options.quick
        for select in (0.3,) if quick else (0.05, 0.1, 0.2, 0.3, 0.5):
            config = replace(base, select=select)
            yield "select, SparseD", select, SparseDAttnProcessor(config)
            yield "select, not isolated", select, SparseDAttnProcessor(replace(config, isolated=False))
            yield "select, sliding window", select, fixed("window", config)
            yield "select, StreamingLLM", select, fixed("streaming", config)
        for skip in (0.2,) if quick else (0.0, 0.1, 0.2, 0.4):
            for select in (0.1, base.select):
                config = replace(base, skip=skip, select=select)
                yield f"skip, select {select:g}", skip, SparseDAttnProcessor(config)
        for size in (16, 32) if quick else (16, 32, 64, 128):
            for select in (0.1, base.select):
                config = replace(base, block_size=size, select=select)
                yield f"block size, select {select:g}", size, SparseDAttnProcessor(config)

    def patterns(self) -> Iterator[list[Figure]]:
        """What patterns taken at other steps, and those of other heads, have in common."""
        from diffctrl.processors import SparseDAttnProcessor
        from diffctrl.scripts.evaluation_text import Variant, lookup_suites
        from diffctrl.scripts.evaluation_text_patterns import overlap, overlap_of_heads

        options = self.options
        suites = self._files or lookup_suites(self.tokenizer, [options.ablation_length], 8)
        suite = replace(suites[-1], prompts=suites[-1].prompts[:8], answers=suites[-1].answers[:8])
        taken = {}
        for skip in (0.0, options.skip, 0.5, 0.8):
            processor = SparseDAttnProcessor(replace(self.config, skip=skip))
            taken[skip] = self.read(suite, Variant(name="patterns", processor=processor))
        at, density = taken[options.skip].patterns, taken[options.skip].density
        chance = density / (2 - density)
        figures = []
        for skip, reading in taken.items():
            if skip == options.skip:
                continue
            shared = [overlap(at[layer].lists, reading.patterns[layer].lists) for layer in at]
            figures.append(
                Figure(
                    f"overlap of patterns taken after {options.skip:g} and {skip:g} of the steps",
                    sum(shared) / len(shared),
                    note=f"intersection over union, mean over layers; by chance {chance:.2f}; {suite.name}",
                )
            )
        heads = [overlap_of_heads(pattern.lists) for pattern in at.values()]
        figures.append(
            Figure(
                "overlap of patterns of two heads of a layer",
                sum(heads) / len(heads),
                note=f"intersection over union; by chance {chance:.2f}; {suite.name}",
            )
        )
        masses = [float(pattern.mass.mean()) for pattern in at.values()]
        by_layer = ", ".join(f"{mass:.3f}" for mass in masses)
        figures.append(
            Figure(
                "share of the attention in the kept blocks",
                sum(masses) / len(masses),
                note=f"by layer {by_layer}; density {density:.3f}; {suite.name}",
            )
        )
        yield figures

    def write(self) -> None:
        """The report so far."""
        write_report(self.options.out, TOPIC, self.figures, seeds=[77_000], model=self.options.model)


def _folder(options: argparse.Namespace, scratch: Path) -> str | Path:
    from diffctrl.zoo import registry

    if options.pack is not None:
        from diffctrl.scripts.training_text_pack import assemble

        assemble(options.pack, scratch / "model")
        return scratch / "model"
    if options.model in registry.EMBEDDED:
        return registry.path(options.model)
    return options.model


def _figures_of(path: Path | None) -> list[Figure]:
    """The figures of an earlier report, none where there is none."""
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    names = {field.name for field in fields(Figure)}
    kept = [{key: value for key, value in figure.items() if key in names} for figure in found]
    return [Figure(**{**figure, "compare": figure["compare"] or ">="}) for figure in kept]


def _dense_bar(name: str) -> float:
    return 97.0 if name in ("sort", "add", "reverse", "scene") else 99.0


def _row(figure: Figure) -> tuple[str, str, str, str, str]:
    interval = "" if figure.low is None else f"{figure.low:.1f} to {figure.high:.1f}"
    bar = "" if figure.bar is None else f"{figure.compare} {figure.bar:g}"
    if figure.bar is not None and not figure.as_dict()["holds"]:
        bar += " MISSED"
    return figure.name, f"{figure.value:.4g} {figure.unit}".strip(), interval, bar, figure.note


def _say(figure: Figure, seconds: float) -> None:
    print(f"[{seconds:6.1f} s] " + "  ".join(part for part in _row(figure) if part), flush=True)


def _draw(points: dict[str, list[tuple[float, float, float, float]]], suite: str, path: Path) -> None:
    """Three panels: exact match against select, skip and block size, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, panel in zip(axes, ("select", "skip", "block size"), strict=True):
        for series, values in points.items():
            kind, _, label = series.partition(", ")
            if kind != panel:
                continue
            at, middle, low, high = zip(*values, strict=True)
            errors = [
                [m - value for m, value in zip(middle, low, strict=True)],
                [value - m for m, value in zip(middle, high, strict=True)],
            ]
            axis.errorbar(at, middle, yerr=errors, marker="o", capsize=3, label=label)
        axis.set_xlabel(panel)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[2].set_xscale("log", base=2)
    axes[0].set_ylabel("exact match, %")
    figure.suptitle(f"scenes-lm: {suite}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
