"""The commands, in one place."""

from __future__ import annotations

from typing import Annotated

import typer

from diffctrl import __version__
from diffctrl.cli.doctor import doctor
from diffctrl.cli.generate import generate
from diffctrl.cli.ground import ground
from diffctrl.cli.headhunt import headhunt
from diffctrl.cli.info import info
from diffctrl.cli.text import text
from diffctrl.cli.train_length_lora import train_length_lora

app = typer.Typer(
    name="diffctrl",
    help="Attention control for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(generate)
app.command()(text)
app.command()(ground)
app.command()(headhunt)
app.command()(train_length_lora)
app.command()(info)
app.command()(doctor)
