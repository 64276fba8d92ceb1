"""`diffctrl generate`: words in, a file of a picture or clip out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    import numpy as np
    from PIL.Image import Image

    from diffctrl.drawing.draw import Drawn
    from diffctrl.drawing.plan import Plan, Request
    from diffctrl.drawing.recipe import Recipe

_SIZE = re.compile(r"(\d+)[xX](\d+)")


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; may be left out with --from.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Embedded model, folder, or hub repository (default: shapes-sd3).")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Attention control, as listed by `diffctrl info`; repeatable.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A method's option; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The noise to start from (default: 0).")] = None,
    num: Annotated[int, typer.Option(help="Pictures, with seeds that follow each other.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height x width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length of the clip of a video model.")] = None,
    lora: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A LoRA of `train-length-lora`, for longer clips; or none."),
    ] = None,
    compare: Annotated[
        bool | None, typer.Option("--compare/--no-compare", help="Draw the stock model beside the method.")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Repeat a picture or clip; other options override."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("out"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Draw pictures or clips, under attention control where a method is given. Prints the path of each."""
    prepare_libraries()
    with complaints():
        from diffctrl.drawing import plan as planning

        height, width = _sides(size, height, width)
        request = planning.Request(
            prompt=prompt,
            model=model,
            methods=tuple(method) if method else None,
            settings=tuple(read_pair(text, "u=0.5") for text in set_ or ()),
            negative=negative,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            compare=compare,
            device=device,
            dtype=dtype,
            count=num,
            recipe=_recipe(from_),
            frames=frames,
            lora=lora,
        )
        plan = planning.make(request)
        for warning in plan.warnings:
            say_error(f"note: {printable(warning)}")
        _make_folder(out)
        _draw(plan, request, out)


def _sides(size: str | None, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    if size is None:
        return height, width
    if height is not None or width is not None:
        raise BadRequestError("--size and --height/--width say the same thing; give one of them")
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise BadRequestError(f"--size {size} is not HEIGHTxWIDTH, as in 128x192")
    return int(match[1]), int(match[2])


def _recipe(path: Path | None) -> Recipe | None:
    if path is None:
        return None
    from diffctrl.drawing import files

    return files.read_recipe(path)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequestError(f"--out {out} cannot be a folder ({error.strerror})") from None
    if not os.access(out, os.W_OK):
        raise BadRequestError(f"--out {out} is a folder that cannot be written to")


def _draw(plan: Plan, request: Request, out: Path) -> None:
    """Load, draw and write, under a progress bar on stderr; the paths go to stdout when it is gone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from diffctrl.drawing import draw, files

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = plan.steps * len(plan.seeds) * (2 if plan.compare else 1)
    notes: list[str] = []
    paths: list[Path] = []
    try:
        with Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task(f"loading {plan.source.slug}", total=total)
            no_loading_bars()
            pipe = draw.load(plan)
            progress.update(task, description="drawing")
            for drawn in draw.draw(plan, pipe, lambda: progress.advance(task)):
                if request.recipe is not None and not notes:
                    notes += [
                        f"note: {text}; pixels may differ"
                        for text in request.recipe.differences(drawn.recipe)
                    ]
                picture, read = _finished(plan, drawn)
                path = out / _file_name(plan, drawn)
                with writing(path):
                    files.write(picture, path, drawn.recipe)
                notes += read
                paths.append(path)
    finally:
        for note in notes:
            say_error(printable(note))
        for path in paths:
            print(path)


def _finished(plan: Plan, drawn: Drawn) -> tuple[Image | np.ndarray, list[str]]:
    """The picture or clip to write, and what to say about it."""
    from diffctrl.drawing import compare, reading

    drawings: list[tuple[Any, str]] = [] if drawn.stock is None else [(drawn.stock, "stock")]
    drawings.append((drawn.image, drawn.described))
    panels, notes = [], []
    for drawing, title in drawings:
        lines: tuple[str, ...] = ()
        if plan.source.embedded:
            read = reading.read if plan.frames is None else reading.read_clip
            seen = read(drawing, plan.prompt)
            lines = (f"reads: {seen.sentence}", seen.verdict)
            notes.append(f"{title}: {seen.sentence} ({seen.verdict})")
        panels.append((drawing, title, lines))
    if not plan.compare:
        return drawn.image, notes
    if plan.frames is not None:
        return compare.clips_side_by_side(panels), notes
    return compare.side_by_side([compare.Panel(*panel) for panel in panels]), notes


def _file_name(plan: Plan, drawn: Drawn) -> str:
    """Model, method, seed and a hash of the request; nothing of the prompt."""
    from diffctrl.drawing import files

    method = "-".join(spec.method for spec in plan.controls) or "stock"
    compared = "-compare" if plan.compare else ""
    end = files.suffix(drawn.recipe)
    return f"{plan.source.slug}-{method}-{drawn.recipe.seed}-{drawn.recipe.digest()}{compared}{end}"
