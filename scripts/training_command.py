"""The command line of the trainings: a command for each stage, and for the model's folder."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class Command:
    """A command that trains.

    Args:
        help: one line.
        options: dataclass of its options.
        train: called with them, and `since`, the moment at which the process began.
        smoke: what the options are in the short run on a CPU, where they are not given.
    """

    help: str
    options: type
    train: Callable[..., Any]
    smoke: Mapping[str, Any] = field(default_factory=dict)


def run_command(
    doc: str | None,
    trainings: Mapping[str, Command],
    *,
    assemble: Callable[..., None],
    measured_by: str,
    disassemble: Callable[[Path, Path], None] | None = None,
    arguments: list[str] | None = None,
    began: float,
) -> None:
    """Parse a command line and run it.

    Args:
        doc: shown by `--help`.
        trainings: by name; the last one's pack is what `assemble` takes.
        assemble: (pack, folder, metrics=...) builds the model's folder.
        measured_by: script whose JSON `--metrics` takes.
        disassemble: (folder, out) is the reverse, where there is one.
        arguments: as on the command line, without the program's name; None for its own.
        began: moment at which the process began.
    """
    from .training_loop import CaptureFailed

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, training in trainings.items():
        add_options(commands.add_parser(name, help=training.help), training.options)
    building = commands.add_parser("assemble", help="build the model's folder out of a pack")
    building.add_argument("pack", type=Path)
    building.add_argument("folder", type=Path)
    building.add_argument("--metrics", type=Path, help=f"JSON of {measured_by}, for card and metrics.json")
    if disassemble is not None:
        last = list(trainings)[-1]
        parting = commands.add_parser(
            "disassemble", help=f"the reverse: what `{last} --start-from` goes on from"
        )
        parting.add_argument("folder", type=Path)
        parting.add_argument("out", type=Path)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command == "assemble":
        metrics = json.loads(options["metrics"].read_text()) if options["metrics"] else None
        assemble(options["pack"], options["folder"], metrics=metrics)
    elif command == "disassemble" and disassemble is not None:
        disassemble(options["folder"], options["out"])
    else:
        training = trainings[command]
        options = with_smoke(options, training.smoke)
        if any(each.name == "commit" for each in fields(training.options)):
            options.setdefault("commit", commit())
        try:
            training.train(training.options(**options), since=began)
        except CaptureFailed as error:
            start_again(error, options, began)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """One option per field of an options dataclass; the default stays with the dataclass."""
    for each in fields(kind):
        flag = "--" + each.name.replace("_", "-")
        required = each.default is MISSING
        value_type = next((t for t in get_args(each.type) if t is not type(None)), each.type)
        if not isinstance(each.type, UnionType):
            value_type = each.type
        shown = None if required else f"default {each.default}"
        if value_type is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown
            )
        else:
            parser.add_argument(
                flag, type=value_type, required=required, default=argparse.SUPPRESS, help=shown
            )


def with_smoke(options: dict[str, Any], smoke: Mapping[str, Any]) -> dict[str, Any]:
    """The given options over the smoke run's, over the defaults."""
    return {**smoke, **options} if options.get("smoke") else options


def start_again(error: Exception, options: dict[str, Any], began: float) -> None:
    """Replace this process by one that runs the step more plainly.

    A failed capture leaves the device unusable for this one.
    """
    plainer = ["--no-graph"]
    if "state" in options:
        left = options.get("slice_seconds", 540.0) - (time.monotonic() - began)
        plainer += ["--slice-seconds", str(max(60.0, left))]
    print(f"{error}\nstarting again with {' '.join(plainer)}", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *plainer])


def commit() -> str:
    """The checkout's commit, or "unknown" outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
