"""`diffctrl headhunt`: search the attention heads that a goal wants perturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffctrl.cli.generate import _sides
from diffctrl.cli.output import (
    complaints,
    no_loading_bars,
    prepare_libraries,
    printable,
    read_pair,
    say_error,
    writing,
)
from diffctrl.cli.tables import new_table
from diffctrl.errors import BadRequestError, nearest

if TYPE_CHECKING:
    from diffctrl.drawing.hunt_plan import HuntPlan
    from diffctrl.softpag.headhunt import Engine
    from diffctrl.softpag.headset import HeadSet


_ENGINES = ("processes", "ray")


def headhunt(
    prompts: Annotated[
        str,
        typer.Option(metavar="FILE|built-in", help="One prompt a line, or captions of the embedded world."),
    ] = "built-in",
    limit: Annotated[
        int | None, typer.Option(help="Prompts to use. [default: all of a file, 8 built-in]")
    ] = None,
    num: Annotated[int, typer.Option(help="Pictures per prompt, each with a seed of its own.")] = 1,
    seed: Annotated[int, typer.Option(help="The first picture's seed; the others follow.")] = 0,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:ARG][=WEIGHT]",
            help="judge, sharpness, style:NAME, or pickscore, clip, aesthetic with :FOLDER; several make a "
            "weighted z-score. [default: judge]",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Greedy rounds.")] = 1,
    top: Annotated[int, typer.Option(help="Heads chosen in each round.")] = 3,
    model: Annotated[
        str | None, typer.Option(help="Embedded model, folder, or hub repository. [default: shapes-sd3]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="SoftPAG's option during the search, as w=3; u is 1."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance in the search. [default: off]")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height x width in pixels.")] = None,
    batch: Annotated[int, typer.Option(help="Candidates sampled together; the result stays the same.")] = 16,
    workers: Annotated[
        int, typer.Option(help="Processes, or Ray's actors; each loads the model and takes a card.")
    ] = 1,
    engine: Annotated[
        str, typer.Option(metavar="processes|ray", help="Who the workers are; ray goes past one machine.")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster. [default: start one here]")
    ] = None,
    scorers: Annotated[
        int | None,
        typer.Option(help="Processes that score beside the sampling. [default: on a GPU, one per core]"),
    ] = None,
    steady: Annotated[
        bool,
        typer.Option(
            help="Batches of one size, short ones filled up: the same scores to the bit in any order. Off, "
            "the first step is shared, and on a GPU scores differ by rounding."
        ),
    ] = True,
    full: Annotated[
        bool,
        typer.Option("--full", help="Score every head on every pair, also those that cannot win any more."),
    ] = False,
    stop_early: Annotated[bool, typer.Option(help="End when no head beats the current set.")] = False,
    halving: Annotated[
        bool, typer.Option(help="Approximate: drop half of the heads after half of the pairs.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The head set.")] = Path("heads.json"),
    log: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Finished jobs, for resuming. [default: beside FILE]")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Heat map and sample grid. [default: beside FILE]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Find the heads whose perturbation serves a goal best. Killed searches go on where they stopped."""
    prepare_libraries()
    with complaints():
        from diffctrl.drawing import hunt_plan

        height, width = _sides(size, None, None)
        request = hunt_plan.HuntRequest(
            prompts=prompts,
            limit=limit,
            num=num,
            seed=seed,
            objectives=tuple(objective or ("judge",)),
            settings=tuple(read_pair(text, "u=0.5") for text in set_ or ()),
            config={
                "rounds": rounds,
                "top": top,
                "batch": batch,
                "stop_early": stop_early,
                "halving": halving,
                "prune": not full,
                "steady": steady,
            },
            model=model,
            guidance_scale=guidance_scale,
            steps=steps,
            height=height,
            width=width,
            device=device,
            dtype=dtype,
            scorers=scorers,
        )
        if workers < 1:
            raise BadRequestError(f"--workers {workers} is not a number of processes; it starts at 1")
        _check_engine(engine, address)
        with writing(out):  # a name may be too long to ask for
            is_folder = not out.name or out.is_dir()
        if is_folder:
            raise BadRequestError(f"--out {out} is a folder; name a file, as in --out heads.json")
        plan = hunt_plan.make(request)
        for warning in plan.warnings:
            say_error(f"note: {printable(warning)}")
        beside = out.with_suffix("")
        _hunt(
            plan,
            _Who(workers, engine, address),
            out,
            log or beside.with_name(f"{beside.name}-jobs"),
            report or beside.with_name(f"{beside.name}-report"),
        )


@dataclass(frozen=True, slots=True)
class _Who:
    """Who samples."""

    workers: int
    engine: str
    address: str | None


def _check_engine(engine: str, address: str | None) -> None:
    if engine not in _ENGINES:
        raise BadRequestError(
            f"--engine {engine} is unknown{nearest(engine, _ENGINES)}; accepted: {', '.join(_ENGINES)}"
        )
    if engine == "ray" and find_spec("ray") is None:
        raise BadRequestError('--engine ray needs Ray; install it with `pip install "diffctrl[ray]"`')
    if engine != "ray" and address is not None:
        raise BadRequestError(f"--address {address} is of a Ray cluster; add --engine ray")


def _hunt(plan: HuntPlan, who: _Who, out: Path, log: Path, report: Path) -> None:
    from diffctrl.drawing import hunt_plan, hunt_report
    from diffctrl.softpag.headhunt import JobLog, Search, cost

    no_loading_bars()
    _make_folders(out.parent, log, report)
    universe, setting, goal = plan.universe(), hunt_plan.setting_of(plan), plan.goal()
    planned = cost(universe, plan.pairs, plan.config, plan.drawing.steps)
    with _engine(plan, who) as engine, JobLog(log, engine.writer) as jobs:
        if engine.main:
            say_error(
                f"{plan.config.rounds} round(s), {len(universe.heads)} heads, {len(plan.pairs)} pairs: "
                f"{planned.images:,} pictures, at most {planned.forwards:,} forwards of one "
                f"row ({planned.naive_forwards:,} one by one); {jobs.loaded:,} jobs in {log}"
            )
        with _progress(plan, engine.main) as on_progress:
            search = Search(
                universe, plan.pairs, plan.config, setting, goal, engine, jobs, on_progress=on_progress
            )
            found = _run(search)
        if not engine.main:
            return
        say_error(f"{search.computed:,} pictures scored in this run")
    _print_table(found)
    with writing(out):
        found.save(out)
    print(out)
    for path in hunt_report.write(plan, found, report):
        print(path)


def _run(search: Any) -> HeadSet:
    try:
        return search.run()
    except ValueError as error:  # no candidate could be scored, or a prompt that the judge cannot read
        raise BadRequestError(str(error)) from None


def _engine(plan: HuntPlan, who: _Who) -> Engine:
    from diffctrl.drawing.hunt_plan import PlanFactory
    from diffctrl.processes import launched
    from diffctrl.softpag.headhunt import InProcess, Processes, Ranks

    workers = who.workers
    if launched():
        if workers > 1 or who.engine == "ray":
            raise BadRequestError(
                "--workers and --engine have no place under `accelerate launch`, which starts the processes"
            )
        return Ranks(PlanFactory(plan))
    if who.engine == "ray":
        from diffctrl.softpag.headhunt.ray_engine import RayActors

        gpus = 0 if plan.drawing.device == "cpu" else 1
        return RayActors(PlanFactory(plan), workers, gpus=gpus, address=who.address)
    return InProcess(PlanFactory(plan)) if workers == 1 else Processes(PlanFactory(plan), workers)


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadRequestError(f"{folder} cannot be a folder ({error.strerror})") from None


@contextmanager
def _progress(plan: HuntPlan, shown: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        Remaining(),
    )
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=hidden) as bar:
        task = bar.add_task("loading", total=None)
        rounds = plan.config.rounds

        def on_progress(number: int, done: int, total: int) -> None:
            name = f"round {number} of {rounds}" if number <= rounds else "final set"
            bar.update(task, description=name, completed=done, total=total)

        yield on_progress


def _print_table(found: HeadSet) -> None:
    from rich.console import Console

    from diffctrl.softpag.headhunt import report

    name = found.objective["name"]
    table = new_table(f"Heads for {name}", "round", "head", f"{name} +- error", "gain +- error")
    for row in report.rows(found):
        table.add_row(
            str(row.round),
            row.head,
            _with_error(row.score, row.error),
            _with_error(row.difference, row.difference_error, sign="+"),
        )
    console = Console(stderr=True)
    console.print(table)
    unscored = sum(entry.get("unscored", 0) for entry in found.rounds)
    if unscored:
        say_error(f"note: {unscored} candidates had pictures without a score, and were ranked last")
    if not len(found):
        say_error(
            "note: no head was found: none does better than no guidance on these prompts. The head set is "
            "empty, and refused where it is used; another --set w or u, or more prompts, may find one"
        )
    elif found.rounds and found.rounds[-1].get("stopped"):
        say_error(f"note: stopped in round {found.rounds[-1]['round']}: no head beats the set")


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4g}" + ("" if error is None else f" +- {error:.2g}")
