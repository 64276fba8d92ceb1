"""Train the embedded image model `shapes-sd3`: `vae`, then `sd3` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_image vae --out runs/vae
    python -m diffctrl.scripts.train_zoo_image sd3 --vae runs/vae/vae.safetensors --state runs/sd3 --pack
    runs/pack.safetensors python -m diffctrl.scripts.train_zoo_image assemble runs/pack.safetensors
    diffctrl/zoo/weights/shapes-sd3

`--smoke` runs `vae` and `sd3` on a CPU, small and short. Each command prints its options with `--help`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

_SMOKE_VAE: dict[str, Any] = {"minutes": 0.3, "batch": 16, "pool": 256}
_SMOKE_SD3: dict[str, Any] = {
    "minutes": 0.5,
    "batch": 16,
    "pool": 256,
    "warmup_steps": 10,
    "chunk": 4,
    "check_captions": 0,
    "keep_pool": False,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` as on the command line, without the program's name."""
    began = time.monotonic()
    from diffctrl.scripts.training_image_flow import FlowOptions, train_flow
    from diffctrl.scripts.training_image_loop import CaptureFailed
    from diffctrl.scripts.training_image_pack import assemble, disassemble
    from diffctrl.scripts.training_image_vae import VaeOptions, train_vae

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_options(commands.add_parser("vae", help="first stage: the autoencoder"), VaeOptions)
    sd3 = commands.add_parser("sd3", help="second stage: transformer and text encoders, resumable")
    _add_options(sd3, FlowOptions)
    sd3.add_argument("--evaluate", type=Path, help="when the budget is spent, evaluate and write this JSON")
    building = commands.add_parser("assemble", help="build the pipeline folder out of a pack")
    building.add_argument("pack", type=Path)
    building.add_argument("folder", type=Path)
    building.add_argument(
        "--metrics", type=Path, help="JSON of scripts/evaluate_zoo.py, for card and metrics.json"
    )
    parting = commands.add_parser("disassemble", help="the reverse: what `sd3 --start-from` goes on from")
    parting.add_argument("folder", type=Path)
    parting.add_argument("out", type=Path)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "vae":
            train_vae(VaeOptions(**_with_smoke(options, _SMOKE_VAE)), since=began)
        elif command == "sd3":
            evaluation = options.pop("evaluate")
            options = _with_smoke(options, _SMOKE_SD3)
            options.setdefault("commit", _commit())
            flow = FlowOptions(**options)
            if train_flow(flow, since=began) and evaluation is not None:
                _evaluate(flow, evaluation)
        elif command == "disassemble":
            disassemble(options["folder"], options["out"])
        else:
            metrics = json.loads(options["metrics"].read_text()) if options["metrics"] else None
            assemble(options["pack"], options["folder"], metrics=metrics)
    except CaptureFailed as error:
        _start_again(error, options, began)


def _add_options(parser: argparse.ArgumentParser, kind: type) -> None:
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


def _with_smoke(options: dict[str, Any], smoke: dict[str, Any]) -> dict[str, Any]:
    """The given options over the smoke run's, over the defaults."""
    return smoke | options if options.get("smoke") else options


def _evaluate(flow: Any, out: Path) -> None:
    """Evaluate the pack that the finished training has written."""
    from diffctrl.scripts.evaluate_zoo import main as evaluate

    if flow.pack is None:
        raise SystemExit("--evaluate needs --pack")
    evaluate(["--pack", str(flow.pack), "--out", str(out), "--batch", "64"])


def _start_again(error: Exception, options: dict[str, Any], began: float) -> None:
    """Replace this process by one that runs the step more plainly.

    A failed capture leaves the device unusable for this one.
    """
    plainer = ["--no-graph"]
    if "state" in options:
        left = options.get("slice_seconds", 540.0) - (time.monotonic() - began)
        plainer += ["--slice-seconds", str(max(60.0, left))]
    print(f"{error}\nstarting again with {' '.join(plainer)}", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *plainer])


def _commit() -> str:
    """The checkout's commit, or "unknown" outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    main()
