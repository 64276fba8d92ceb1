"""`diffctrl text`: a prompt in, the answer of a diffusion language model out."""

from __future__ import annotations

import logging
import os
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
    from rich.console import Console

    from diffctrl.writing import Written
    from diffctrl.writing.plan import TextPlan


def text(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; may be left out with --from.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Embedded model, folder, or hub repository (default: scenes-lm).")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Attention control, as listed by `diffctrl info`.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A method's option; repeatable.")
    ] = None,
    gen_length: Annotated[int | None, typer.Option(help="Tokens to generate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps over the whole answer.")] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens decoded together, left to right (LLaDA).")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest tokens.")] = None,
    cfg_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 0 is off (LLaDA).")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Decide every token as sure as this in one step (LLaDA).")
    ] = None,
    alg: Annotated[
        str | None, typer.Option(help="Order: origin, maskgit_plus, topk_margin or entropy (Dream).")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens (Dream).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise; has no effect at temperature 0.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Repeat a text; other options override.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the answer with its recipe.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Answer a prompt with a diffusion language model, under attention control where a method is given.

    A terminal shows the order in which the tokens are decided; the answer goes to stdout.
    """
    prepare_libraries()
    with complaints():
        from diffctrl.writing import Written
        from diffctrl.writing import plan as planning

        before = None if from_ is None else Written.read(from_)
        if out is not None:
            _check_out(out)
        plan = planning.make(
            planning.TextRequest(
                prompt=prompt,
                model=model,
                methods=tuple(method) if method else None,
                settings=tuple(read_pair(pair, "select=0.3") for pair in set_ or ()),
                sampling={
                    "gen_length": gen_length,
                    "steps": steps,
                    "block_length": block_length,
                    "temperature": temperature,
                    "cfg_scale": cfg_scale,
                    "threshold": threshold,
                    "alg": alg,
                    "top_p": top_p,
                },
                seed=seed,
                device=device,
                dtype=dtype,
                recipe=None if before is None else before.recipe,
            )
        )
        for warning in plan.warnings:
            say_error(f"note: {printable(warning)}")
        _tell_warnings()
        written = _write(plan)
        try:
            if out is not None:
                with writing(out):
                    written.save(out)
        finally:  # an answer that cannot be saved is shown all the same
            _report(written, before)
        if not written.finished:
            say_error("diffctrl: stopped; what was decided by then is above")
            raise typer.Exit(130)


def _check_out(out: Path) -> None:
    with writing(out):  # a name may be too long to ask for
        is_folder = out.is_dir()
        above = next(folder for folder in out.absolute().parents if folder.exists())
    if is_folder:
        raise BadRequestError(f"--out {out} is a folder; name a file, as in --out {out / 'answer.json'}")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadRequestError(f"--out {out} cannot be written below {above}")


class _Notes(logging.Handler):
    """What the library logs, as notes of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say_error(f"note: {printable(record.getMessage())}")


def _tell_warnings() -> None:
    logger = logging.getLogger("diffctrl")
    logger.handlers = [_Notes(logging.WARNING)]
    logger.propagate = False


def _write(plan: TextPlan) -> Written:
    """Load and write, with a live view on a terminal."""
    from rich.console import Console
    from rich.live import Live

    from diffctrl.cli.text_view import OrderView
    from diffctrl.writing import write

    console = Console(stderr=True)
    no_loading_bars()
    with console.status(f"loading {plan.checkpoint.name}") if console.is_terminal else _nothing():
        pipe = write.load(plan)
    if not console.is_terminal:
        return write.write(plan, pipe)
    view = OrderView(pipe.tokenizer, pipe.special.ends, plan.sampling.gen_length)
    with Live(view, console=console, transient=True, refresh_per_second=12, redirect_stdout=False):
        written = write.write(plan, pipe, view.update)
    _show(console, view, written)
    return written


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _show(console: Console, view: Any, written: Written) -> None:
    """The whole view once more: the live one ends at the terminal's last line."""
    console.print(view)
    stats = written.stats
    line = f"{stats['forwards']} forwards, {stats['seconds']:.1f} s"
    control = stats["control"]
    if control is not None:
        line += f"; {written.recipe.controls[0].method}: "
        if control["stays_dense"]:
            line += "dense throughout"
        else:
            steps = control["steps"]
            line += f"{steps['sparse']} sparse steps of {sum(steps.values())}"
            if control["pattern_density"] is not None:
                line += f", {control['pattern_density']:.0%} of the pairs kept"
    console.print(line, style="dim", highlight=False)


def _report(written: Written, before: Written | None) -> None:
    """Differences to stderr, the answer to stdout."""
    if before is not None:
        for text in before.recipe.differences(written.recipe):
            say_error(f"note: {printable(text)}; the text may differ")
        if _asks_the_same(before, written) and before.tokens != written.tokens:
            say_error("note: the text is another than the file's")
    print("\n".join(printable(line) for line in written.text.splitlines()))


def _asks_the_same(before: Written, now: Written) -> bool:
    names = ("prompt", "seed", "sampler", "sampling", "controls", "model")
    return before.finished and all(getattr(before.recipe, n) == getattr(now.recipe, n) for n in names)
