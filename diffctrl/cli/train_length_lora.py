"""`diffctrl train-length-lora`: clips in, a LoRA for longer videos out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
)

if TYPE_CHECKING:
    from diffctrl.lengthening.plan import TrainPlan
    from diffctrl.lengthening.train import Progress


def train_length_lora(
    frames: Annotated[int, typer.Option(help="Length of the clips to learn, in frames.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="LoRA, log and checkpoints; the same again goes on.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Embedded model, folder, or hub repository (default: shapes-wan).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="MP4 files, a .txt of the same name beside each, or metadata.jsonl (default: generated).",
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(help="Clips to generate, without --data (default: 2000).")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height x width in pixels.")] = None,
    method: Annotated[str, typer.Option(metavar="radial|dense", help="Attention in training.")] = "radial",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Option of the radial mask; repeatable."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 128,
    lora_alpha: Annotated[float | None, typer.Option(help="Its strength, over rank (default: rank).")] = None,
    start_from: Annotated[
        str | None,
        typer.Option(help="Begin with this LoRA: name, file or folder.", metavar="LORA"),
    ] = None,
    added: Annotated[
        bool | None,
        typer.Option("--added/--no-added", help="Adapt the text's projections of joint attention too."),
    ] = None,
    cross: Annotated[bool, typer.Option("--cross", help="Adapt cross-attention too.")] = False,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Peak; falls to zero by a cosine.")] = 1e-4,
    warmup_steps: Annotated[int, typer.Option(help="Until the peak.")] = 50,
    batch: Annotated[int, typer.Option(help="Clips of a forward, in each process.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Forwards of an update.")] = 1,
    empty_share: Annotated[float, typer.Option(help="Captions left out, for guidance.")] = 0.1,
    sampling: Annotated[
        str, typer.Option(metavar="logit-normal|uniform", help="Noise levels, then shifted as the model's.")
    ] = "logit-normal",
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing/--no-checkpointing", help="Trade a third more time for memory."),
    ] = True,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks: a minute more at first, faster steps.")
    ] = False,
    ulysses_degree: Annotated[
        int, typer.Option(help="GPUs that share a clip, each with a part of its tokens.")
    ] = 1,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    keep: Annotated[int, typer.Option(help="Checkpoints that are left.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights, order, noise and generated clips.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, of the frozen weights (default: by device).")
    ] = None,
) -> None:
    """Train a LoRA that makes a video model longer, under the radial mask. Killed trainings go on."""
    prepare_libraries()
    with complaints():
        from diffctrl.lengthening import plan as planning

        height, width = _sides(size, None, None)
        plan = planning.make(
            planning.TrainRequest(
                out=out,
                model=model,
                data=data,
                clips=clips,
                frames=frames,
                height=height,
                width=width,
                method=method,
                settings=tuple(read_pair(text, "block=64") for text in set_ or ()),
                rank=rank,
                lora_alpha=lora_alpha,
                start_from=start_from,
                added=added,
                cross=cross,
                steps=steps,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                batch=batch,
                accumulate=accumulate,
                empty_share=empty_share,
                sampling=sampling,
                checkpointing=checkpointing,
                compile=compile_,
                ulysses_degree=ulysses_degree,
                checkpoint_every=checkpoint_every,
                keep=keep,
                seed=seed,
                device=device,
                dtype=dtype,
            )
        )
        for warning in plan.warnings:
            say_error(f"note: {printable(warning)}")
        _train(plan)


def _train(plan: TrainPlan) -> None:
    from diffctrl import processes
    from diffctrl.lengthening.train import train

    no_loading_bars()
    main = processes.accelerator(plan.device).is_main_process
    if main:
        modules = len(plan.targets)
        say_error(
            f"{plan.method} LoRA of rank {plan.rank} on {modules} layers of {plan.source.slug}, "
            f"{len(plan.clips)} clips of {plan.frames} frames ({plan.latent_frames} latent), "
            f"{plan.clips.height} x {plan.clips.width}; {plan.steps} steps, log in {plan.out / 'log.csv'}"
        )
    with _bar(shown=main) as on_progress:
        path = train(plan, on_progress)
    if main:
        print(path)


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        Remaining(),
    )
    hidden = not (shown and console.is_terminal)
    stage = ""
    with Bars(*columns, console=console, transient=True, redirect_stdout=False, disable=hidden) as bars:
        task = bars.add_task("loading", total=None)

        def on_progress(now: Progress) -> None:
            nonlocal stage
            if now.stage != stage:
                stage = now.stage
                bars.reset(task, total=now.total)
            loss = "" if now.loss is None else f", loss {now.loss:.4f}"
            bars.update(task, description=f"{now.stage}{loss}", completed=now.done)

        yield on_progress
