"""What the training commands share: options out of a dataclass, a restart without capture, the commit."""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """One option per field of an options dataclass; the default stays with the dataclass."""
    for field in fields(kind):
        flag = "--" + field.name.replace("_", "-")
        required = field.default is MISSING
        value_type = next((t for t in get_args(field.type) if t is not type(None)), field.type)
        if not isinstance(field.type, UnionType):
            value_type = field.type
        shown = None if required else f"default {field.default}"
        if value_type is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown
            )
        else:
            parser.add_argument(
                flag, type=value_type, required=required, default=argparse.SUPPRESS, help=shown
            )


def with_smoke(options: dict[str, Any], smoke: dict[str, Any]) -> dict[str, Any]:
    """The given options over the smoke run's, over the defaults."""
    return smoke | options if options.get("smoke") else options


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
