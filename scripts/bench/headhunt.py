"""What a search for heads costs against the plain loop, counted in rows through blocks, with the same result.

    python -m diffctrl.scripts.bench.headhunt --out docs/results/headhunt.json

The loop samples picture after picture: for each step a conditional and a perturbed pass through every block.
The search runs twice from nothing, over the same candidates: in full, and leaving out who cannot win.
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
from diffctrl.scripts.bench.harness import Figure, print_table, write_report
from diffctrl.scripts.find_headsets import Found, pairs_of, scoring_workers, search
from diffctrl.softpag import SoftPAGConfig
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
    defaults = SoftPAGConfig()
    config = HuntConfig(
        rounds=options.rounds,
        top=options.top,
        u=defaults.u,
        w=defaults.w,
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
    rows = [
        [f.name, f"{f.value:.4g} {f.unit}", "" if f.bar is None else str(f.as_dict()["holds"]), f.note]
        for f in figures
    ]
    print_table(["figure", "value", "holds", "note"], rows)
    return figures


def _costs(goal: str, full: Found, pruned: Found, pairs: int, steps: int) -> list[Figure]:
    naive = full.naive_block_rows
    note = f"{pairs} pairs, {steps} steps, {naive:,} rows through blocks in the loop"
    return [
        Figure(
            f"{goal}: batches, prefixes and shared steps, of the loop",
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
            float(_same(full, pruned)),
            bar=1.0,
            note=f"{full.headset}; 1 is yes",
        ),
    ]


def _same(full: Found, pruned: Found) -> bool:
    """The same heads in order; scores as near as batches of other sizes allow (a fact may flip)."""
    one, other = full.headset, pruned.headset
    return one.heads == other.heads and all(
        abs((a.score or 0.0) - (b.score or 0.0)) <= 0.02
        for a, b in zip(one.chosen, other.chosen, strict=True)
    )


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
    parser.add_argument("--top", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scorers", type=int, help="judging processes; default: beside a GPU one per core")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--quick", action="store_true", help="four prompts, one round, one step: does it run?"
    )
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
