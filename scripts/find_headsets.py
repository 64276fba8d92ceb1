"""Find the head sets that the package ships: HeadHunter on an embedded model, for quality and for each style.

    python -m diffctrl.scripts.find_headsets --out diffctrl/softpag/headsets

Writes OUT/<model>/<name>.json, where `heads="quality"` and `heads="style:soft"` find them, and a table of
what each search cost. Each goal is searched at several scales w. Of every set that was found, the heads up to
each round are drawn at several scales on prompts of their own, on which no head was chosen; the best of all,
with its scale, is the set. Where none of them does better there than no guidance, the set is empty.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffctrl.drawing.hunt import PipelineFactory, sampling_of
from diffctrl.drawing.hunt_plan import built_in_prompts
from diffctrl.drawing.source import ModelSource
from diffctrl.processors.universe import universe_of
from diffctrl.scripts.bench.harness import print_table
from diffctrl.softpag import Head
from diffctrl.softpag.config import DEFAULT_U
from diffctrl.softpag.headhunt import (
    Evaluator,
    Goal,
    HuntConfig,
    InProcess,
    Job,
    JobLog,
    Pair,
    Search,
    Setting,
    cost,
    parse_goal,
)
from diffctrl.softpag.headhunt.jobs import units_of
from diffctrl.softpag.headhunt.ranking import as_array, summarise
from diffctrl.softpag.headhunt.scoring import scoring_pool
from diffctrl.softpag.headset import HeadSet
from diffctrl.zoo import registry
from diffctrl.zoo.worlds import vocabulary

QUALITY = "quality"
NAMES = (QUALITY, *(f"style:{style}" for style in vocabulary.STYLES))
SCALES = (1.0, 1.5, 2.0, 3.0)
_POOL = 4
_STYLE_SEED = 10_000  # a style search has prompts and noise of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A finished search and what it took.

    Attributes:
        block_rows: rows that went through blocks; naive_block_rows: those of a loop over single pictures.
    """

    headset: HeadSet
    pictures: int
    block_rows: int
    naive_block_rows: int
    seconds: float


def search(
    pipe: Any,
    name: str,
    model: str,
    call: dict[str, Any],
    pairs: list[Pair],
    config: HuntConfig,
    *,
    scorers: int | Executor = 0,
    log: Path | None = None,
) -> Found:
    """One search on a loaded pipeline."""
    began, universe = time.monotonic(), universe_of(pipe)
    goal = _goal(name)
    call = {key: value for key, value in call.items() if key != "guidance_scale"}
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    setting = Setting(
        model={"id": model, "revision": ModelSource.find(model).weights().sha256},
        sampling=sampling_of(pipe.scheduler, call, dtype),
    )
    counts = []

    def factory(index: int) -> Evaluator:
        evaluator = PipelineFactory(pipe, goal, config, call, universe, scorers=scorers)(index)
        counts.append(evaluator.sampler.candidates)  # type: ignore[attr-defined]
        return evaluator

    with InProcess(factory) as engine, JobLog(log) as jobs:
        running = Search(universe, pairs, config, setting, goal, engine, jobs)
        headset = running.run()
    steps = call["num_inference_steps"]
    full = cost(universe, pairs, config, steps)
    rounds = len(headset.rounds)
    blocks = sum(layers for stack, layers, _ in universe.signature.stacks if stack != "attn2")
    return Found(
        headset=headset,
        pictures=running.computed,
        block_rows=sum(each.block_rows for each in counts),
        naive_block_rows=full.naive_forwards * blocks if rounds == config.rounds else 0,
        seconds=time.monotonic() - began,
    )


def best_of(
    pipe: Any,
    headsets: Sequence[HeadSet],
    pairs: Sequence[Pair],
    goal: Goal,
    config: HuntConfig,
    call: dict[str, Any],
    scales: Sequence[float] = SCALES,
    scorers: int | Executor = 0,
) -> HeadSet:
    """The best of sets, cut after each of their rounds, at the best of scales, on these pairs.

    Of equal ones the one with the fewest heads, then the least scale. An empty set where no guidance is as
    good: what did best on the prompts of a search may have done so by chance.
    """
    cut = {each.heads: each for headset in headsets for each in _prefixes(headset)}
    plain = _means(pipe, [()], pairs, goal, config, call, scorers)[0]
    tried = [
        {"heads": str(headset), "w": scale, "mean": mean, "error": error}
        for scale in scales
        for headset, (mean, error) in zip(
            cut.values(),
            _means(pipe, list(cut), pairs, goal, replace(config, w=scale), call, scorers),
            strict=True,
        )
    ]
    use = {
        "tried": tried,
        "unguided": plain[0],
        "pairs": [{"prompt": pair.prompt, "seed": pair.seed} for pair in pairs],
    }
    scored = [
        each for each in tried if each["mean"] is not None and (plain[0] is None or each["mean"] > plain[0])
    ]
    if not scored:
        return replace(headsets[0], chosen=(), use=use)
    best = max(scored, key=lambda each: (each["mean"], -each["heads"].count(","), -each["w"]))
    (headset,) = [each for each in cut.values() if str(each) == best["heads"]]
    return replace(headset, use={"u": config.u, "w": best["w"]} | use)


def _prefixes(headset: HeadSet) -> list[HeadSet]:
    return [headset.up_to_round(last) for last in sorted({each.round for each in headset.chosen})]


def _means(
    pipe: Any,
    sets: Sequence[tuple[Head, ...]],
    pairs: Sequence[Pair],
    goal: Goal,
    config: HuntConfig,
    call: dict[str, Any],
    scorers: int | Executor,
) -> list[tuple[float | None, float | None]]:
    """Mean and standard error of the goal for each set of heads."""
    universe = universe_of(pipe)
    call = {key: value for key, value in call.items() if key != "guidance_scale"}
    factory = PipelineFactory(pipe, goal, config, call, universe, scorers=scorers)
    found = []
    with InProcess(factory) as engine:
        for heads in sets:
            table: dict[Pair, tuple[float, ...]] = {}
            engine.run(
                units_of([Job(0, heads, None, pair) for pair in pairs], config.batch, universe.depth),
                lambda unit, values, new, table=table: table.update(
                    zip([job.pair for job in unit.jobs], values, strict=True)
                ),
            )
            values = as_array({None: [table[pair] for pair in pairs]}, [None])
            _, score = summarise(goal, values, values[0])
            found.append((score.mean, score.error))
    return found


def pairs_of(name: str, count: int, after: int = 0) -> list[Pair]:
    """Prompts of a search, none of them among the first `after`; those of a style name none.

    For quality they are the longest of several times as many: they name most, so that a picture has most to
    get wrong, and heads differ most.
    """
    if name != QUALITY:
        texts = built_in_prompts(after + count, name_style=False)[after:]
        return [Pair(text, _STYLE_SEED + after + index) for index, text in enumerate(texts)]
    first = _POOL * after
    pool = built_in_prompts(first + _POOL * count)[first:]
    texts = sorted(pool, key=lambda text: -len(text.split()))[:count]  # stable: the order of the pool
    return [Pair(text, first + index) for index, text in enumerate(texts)]


def main(arguments: list[str] | None = None) -> dict[str, Found]:
    """Entry point; `arguments` as on the command line."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.pairs = options.style_pairs = options.choosing_pairs = 2
        options.rounds = options.steps = 1
    wanted = options.names.split(",") if options.names else list(NAMES)
    if unknown := [name for name in wanted if name not in NAMES]:
        raise SystemExit(f"--names {unknown[0]} is none of {', '.join(NAMES)}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = registry.load(options.model, dtype=getattr(torch, options.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = registry.recommended(options.model)
    if options.steps:
        call["num_inference_steps"] = options.steps
    workers = scoring_workers(options.scorers, device)
    found: dict[str, Found] = {}
    with contextlib.ExitStack() as stack:
        # One pool for all searches: starting it takes as long as a search.
        scorers = stack.enter_context(scoring_pool(workers)) if workers else 0
        _search_all(wanted, pipe, call, scorers, options, found)
    print_table(
        ["set", "heads", "w", "no guidance", "found", "pictures", "s"], [_row(n, f) for n, f in found.items()]
    )
    return found


def scoring_workers(wanted: int | None, device: str) -> int:
    """Judging processes: as asked, else one for each core beside a GPU and none beside a CPU that samples."""
    if wanted is not None:
        return wanted
    return 0 if device == "cpu" else max(1, min(16, (os.cpu_count() or 1) - 1))


def _search_all(
    wanted: list[str],
    pipe: Any,
    call: dict[str, Any],
    scorers: int | Executor,
    options: argparse.Namespace,
    found: dict[str, Found],
) -> None:
    searched_at, scales = _numbers(options.w), _numbers(options.scales)
    for name in wanted:
        count = options.pairs if name == QUALITY else options.style_pairs
        pairs = pairs_of(name, count)
        config = HuntConfig(
            rounds=options.rounds,
            top=options.top,
            u=options.u,
            mode="prefix",
            batch=options.batch,
            stop_early=True,
            prune=not options.full,
        )
        planned = cost(universe_of(pipe), pairs, config, call["num_inference_steps"])
        parts = []
        for w in searched_at:
            print(
                f"{name} at w = {w:g}: {len(pairs)} pairs, at most {planned.images:,} pictures in "
                f"{planned.batches:,} batches, {planned.forwards:,} rows through the denoiser",
                flush=True,
            )
            at = replace(config, w=w)
            parts.append(search(pipe, name, options.model, call, pairs, at, scorers=scorers))
        others = pairs_of(name, options.choosing_pairs, after=count)
        headset = best_of(
            pipe, [each.headset for each in parts], others, _goal(name), config, call, scales, scorers
        )
        found[name] = _together(parts, headset)
        _save(found[name], options.out, options.model, name)
        print(f"  {_told(headset)}, in {found[name].seconds:.1f} s", flush=True)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _together(parts: Sequence[Found], headset: HeadSet) -> Found:
    """What the searches at all scales took."""
    return Found(
        headset=headset,
        pictures=sum(each.pictures for each in parts),
        block_rows=sum(each.block_rows for each in parts),
        naive_block_rows=sum(each.naive_block_rows for each in parts),
        seconds=sum(each.seconds for each in parts),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes-sd3", help="name of an embedded image model")
    parser.add_argument("--names", help=f"comma-separated, of {', '.join(NAMES)}; default all")
    parser.add_argument("--pairs", type=int, default=96, help="prompts of the search for quality")
    parser.add_argument("--style-pairs", type=int, default=64, help="prompts of each search for a style")
    # One head a round: heads of one round are chosen without being tried together, and a small model has few.
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--top", type=int, default=1, help="heads chosen in each round")
    parser.add_argument("--u", type=float, default=DEFAULT_U)
    parser.add_argument("--w", default="2,3", help="scales of the searches, comma-separated")
    parser.add_argument(
        "--scales", default=",".join(map(str, SCALES)), help="scales tried for what they find"
    )
    parser.add_argument("--choosing-pairs", type=int, default=128, help="other prompts, to choose among that")
    parser.add_argument("--steps", type=int, help="denoising steps; default as recommended")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time")
    parser.add_argument("--full", action="store_true", help="score also those heads that cannot win any more")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--scorers", type=int, help="judging processes; default: beside a GPU one per core")
    parser.add_argument("--quick", action="store_true", help="two prompts, one round, one step: does it run?")
    parser.add_argument("--out", type=Path, required=True, help="folder of head sets")
    return parser


def _goal(name: str) -> Goal:
    return parse_goal(["judge" if name == QUALITY else name])


def _told(headset: HeadSet) -> str:
    """What a search found, in words; also where it found nothing."""
    if not len(headset):
        return (
            "no head did better than no guidance: the set is empty, and refused where it is used; another w "
            "or more pairs may find one"
        )
    return f"{headset} at w = {headset.w:g}: {_reached(headset):.3f}, {headset.use['unguided']:.3f} without"


def _reached(headset: HeadSet) -> float:
    """The mean at which the set was chosen."""
    return next(
        each["mean"]
        for each in headset.use["tried"]
        if (each["heads"], each["w"]) == (str(headset), headset.w)
    )


def _save(found: Found, out: Path, model: str, name: str) -> None:
    folder = out / model
    folder.mkdir(parents=True, exist_ok=True)
    found.headset.save(folder / f"{name.replace(':', '-')}.json")


def _row(name: str, found: Found) -> list[str]:
    headset = found.headset
    return [
        name,
        str(headset) or "none",
        f"{headset.w:g}" if len(headset) else "-",
        f"{headset.use['unguided']:.3f}",
        f"{_reached(headset):.3f}" if len(headset) else "-",
        f"{found.pictures:,}",
        f"{found.seconds:.1f}",
    ]


if __name__ == "__main__":
    main()
