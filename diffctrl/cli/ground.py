"""`diffctrl ground`: a picture and words in, a mask out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from diffctrl.errors import BadRequestError

if TYPE_CHECKING:
    from diffctrl.grounding.plan import GroundPlan


def ground(
    image: Annotated[Path, typer.Argument(help="A picture; for video models also a video or frames.")],
    phrase: Annotated[
        str | None, typer.Argument(help="What to find, as 'the red cup left of the plate'.")
    ] = None,
    phrases: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More expressions, one a line.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Embedded model, folder, or hub repository (default: shapes-sd3).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="RefAM's option; repeatable.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size at which the model sees the picture.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video, how many are read at most.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = Path("out"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Find what words mean in a picture. Writes an overlay, a mask and a JSON file each, and prints paths."""
    prepare_libraries()
    with complaints():
        from diffctrl.grounding import plan as planning

        height, width = _sides(size, None, None)
        if frames is not None and frames < 1:
            raise BadRequestError(f"--frames {frames} is not a number of frames; it starts at 1")
        plan = planning.make(
            planning.GroundRequest(
                image=image,
                phrases=() if phrase is None else (phrase,),
                phrases_file=phrases,
                model=model,
                settings=tuple(read_pair(text, "sigma=0.5") for text in set_ or ()),
                size=None if height is None or width is None else (height, width),
                frames=frames,
                device=device,
                dtype=dtype,
            )
        )
        for warning in plan.warnings:
            say_error(f"note: {printable(warning)}")
        _check_folder(out)
        _ground(plan, out)


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequestError(f"--out {out} cannot be a folder ({error.strerror})") from None
    if not os.access(out, os.W_OK):
        raise BadRequestError(f"--out {out} is a folder that cannot be written to")


def _ground(plan: GroundPlan, out: Path) -> None:
    from contextlib import nullcontext

    from rich.console import Console

    from diffctrl.grounding import run

    console = Console(stderr=True)
    no_loading_bars()
    with console.status(f"reading with {plan.source.slug}") if console.is_terminal else nullcontext():
        pipe = run.load(plan)
        results = list(run.ground(plan, pipe))
    used = run.recipe(plan)
    for found in results:
        (height, width), (seen_height, seen_width) = found.size, found.model_size
        seen = "as it is" if found.size == found.model_size else f"resized to {seen_width} x {seen_height}"
        if found.track is not None and len(found.track) < plan.count:
            seen += f", the first {len(found.track)} of {plan.count} frames"
        box = "no mask" if found.box is None else f"box {', '.join(map(str, found.box))}"
        say_error(
            printable(
                f"{found.expression}: point {found.point[0]:.0f}, {found.point[1]:.0f}; {box} of {width} x "
                f"{height}, seen {seen}"
            )
        )
        for text in found.flags.values():
            say_error(printable(f"note: {found.expression}: {text}"))
        with writing(out):
            paths = run.write(plan, found, used, out)
        for path in paths:
            print(path)
