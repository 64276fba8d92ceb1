"""What a search for heads costs against the plain loop, counted in rows through blocks, with the same result.

    python -m diffctrl.scripts.bench.headhunt --out docs/results/headhunt.json

The loop samples picture after picture: for each step a conditional and a perturbed pass through every block.
The search runs twice from nothing, over the same candidates: in full, and leaving out who cannot win. One
head is chosen a round, as in the searches for the shipped sets. All batches have the same number of rows, so
that the two must agree to the bit; rows that fill a batch up are counted. Where they do not agree, the note
says in which round and by how much.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffctrl.drawing.hunt import PipelineSampler
from diffctrl.processors.universe import universe_of
from diffctrl.scripts.bench.harness import Figure, print_figures, write_report
from diffctrl.scripts.find_headsets import Found, pairs_of, scoring_workers, search
from diffctrl.softpag.config import DEFAULT_U, DEFAULT_W
from diffctrl.softpag.headhunt import HuntConfig, Pair
from diffctrl.softpag.headhunt.scoring import scoring_pool
from diffctrl.zoo import registry

_GOALS = ("quality", "style:soft")
_CHECKED = 6


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.pairs, options.rounds, options.steps, options.goals = 4, 1, 1, "style:soft"
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = registry.load("shapes-sd3").to(device)
    pipe.set_progress_bar_config(disable=True)
    call = {**registry.recommended("shapes-sd3"), "num_inference_steps": options.steps}
    config = HuntConfig(
        rounds=options.rounds,
        top=options.top,
        u=DEFAULT_U,
        w=DEFAULT_W,
        mode="prefix",
        batch=options.batch,
        prune=False,
    )
    figures: list[Figure] = []
    workers = scoring_workers(options.scorers, device)
    with contextlib.ExitStack() as stack:
        scorers = stack.enter_context(scoring_pool(workers)) if workers else 0
        for goal in options.goals.split(","):
            pairs = pairs_of(goal, options.pairs)
            full, pruned = (
                search(pipe, goal, "shapes-sd3", call, pairs, each, scorers=scorers)
                for each in (config, replace(config, prune=True))
            )
            figures += _costs(goal, full, pruned, len(pairs), options.steps)
            write_report(options.out, "headhunt", figures, seeds=[pairs[0].seed])
    figures += _against_the_loop(pipe, call, config)
    write_report(options.out, "headhunt", figures, seeds=[0])
    print_figures(figures)
    return figures


def _costs(goal: str, full: Found, pruned: Found, pairs: int, steps: int) -> list[Figure]:
    naive = full.naive_block_rows
    note = f"{pairs} pairs, {steps} steps, {naive:,} rows through blocks in the loop"
    return [
        Figure(
            f"{goal}: batches and prefixes, of the loop",
            100 * full.block_rows / naive,
            unit="%",
            note=f"{note}; {full.pictures:,} pictures in {full.seconds:.1f} s",
        ),
        Figure(
            f"{goal}: and leaving out who cannot win, of the loop",
            100 * pruned.block_rows / naive,
            unit="%",
            bar=50.0,
            compare="<=",
            note=f"{pruned.pictures:,} pictures in {pruned.seconds:.1f} s",
        ),
        Figure(
            f"{goal}: same heads with the same scores",
            float(full.headset.chosen == pruned.headset.chosen),
            bar=1.0,
            note=f"1 is yes; {_apart(full, pruned)}",
        ),
    ]


def _apart(full: Found, pruned: Found) -> str:
    """Where two searches differ: the heads, and in each round the scores that both have of the same set."""
    told = [str(full.headset)]
    if full.headset.heads != pruned.headset.heads:
        told = [f"{full.headset} in full, {pruned.headset} leaving out"]
    for one, other in zip(full.headset.rounds, pruned.headset.rounds, strict=False):
        if one["selected"] != other["selected"]:
            break  # what follows is of other sets
        means = {each["head"]: each["mean"] for each in one["candidates"]}
        scored = {each["head"]: each["mean"] for each in other["candidates"] if each["mean"] is not None}
        gaps = {head: abs(mean - means[head]) for head, mean in scored.items() if mean != means[head]}
        if gaps:
            worst = max(gaps, key=lambda head: gaps[head])
            told.append(
                f"round {one['round']}: {len(gaps)} of {len(scored)} scores differ, by {gaps[worst]:.3g} at "
                f"most ({worst}: {means[worst]:.6g} in full, {scored[worst]:.6g} leaving out)"
            )
        if one["current"]["mean"] != other["current"]["mean"]:
            told.append(f"round {one['round']}: the current set differs")
    return "; ".join(told)


def _against_the_loop(pipe: Any, call: dict[str, Any], config: HuntConfig) -> list[Figure]:
    """Some candidates in one batch, and one by one as the loop would sample them."""
    call = {name: value for name, value in call.items() if name != "guidance_scale"}
    heads = universe_of(pipe).heads
    step = max(1, len(heads) // _CHECKED)
    sets = [(head,) for head in heads[::step]][:_CHECKED]
    pairs = [Pair("a red star left of a blue ring", index % 2) for index in range(len(sets))]
    pictures, seconds = [], []
    for mode, parts in (("prefix", [slice(None)]), ("batched", [slice(i, i + 1) for i in range(len(sets))])):
        sampler = PipelineSampler(pipe, replace(config, mode=mode, steady=False), call)
        began = time.monotonic()
        made = [sampler.sample(pairs[part], sets[part]).float().cpu() for part in parts]
        seconds.append(time.monotonic() - began)
        sampler.close()
        pictures.append(torch.cat(made))
    apart = (pictures[0] - pictures[1]).abs()
    note = f"{len(sets)} candidates, {seconds[0]:.2f} s in a batch and {seconds[1]:.2f} s one by one"
    return [
        Figure(
            "pictures of a batch and of the loop, largest difference",
            255 * apart.max().item(),
            unit="of 255",
            bar=1.0,
            compare="<=",
            note=note,
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--goals", default=",".join(_GOALS), help="quality, style:NAME")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--top", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="smaller ones leave out earlier")
    parser.add_argument("--scorers", type=int, help="judging processes; default: beside a GPU one per core")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--quick", action="store_true", help="four prompts, one round, one step: does it run?"
    )
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
