"""Train the embedded text model `scenes-lm`: `train` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_text train --state runs/text --pack runs/text.safetensors
    python -m diffctrl.scripts.train_zoo_text assemble runs/text.safetensors
    diffctrl/zoo/weights/scenes-lm

`--smoke` trains on a CPU, small and short. Each command prints its options with `--help`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from diffctrl.scripts.training_command import add_options, commit, start_again, with_smoke

_SMOKE: dict[str, Any] = {
    "minutes": 0.5,
    "batch_tokens": 1536,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "chunk": 8,
    "report_seconds": 5.0,
    "probe_minutes": 1e9,
    "probe_rows": 16,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` as on the command line, without the program's name."""
    began = time.monotonic()
    from diffctrl.scripts.training_loop import CaptureFailed
    from diffctrl.scripts.training_text_pack import assemble
    from diffctrl.scripts.training_text_run import TextOptions, train_text

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(commands.add_parser("train", help="train, or go on training; resumable"), TextOptions)
    building = commands.add_parser("assemble", help="build the model's folder out of a pack")
    building.add_argument("pack", type=Path)
    building.add_argument("folder", type=Path)
    building.add_argument(
        "--metrics", type=Path, help="JSON of scripts/evaluate_dlm.py, for card and metrics.json"
    )
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "train":
            options = with_smoke(options, _SMOKE)
            options.setdefault("commit", commit())
            train_text(TextOptions(**options), since=began)
        else:
            metrics = json.loads(options["metrics"].read_text()) if options["metrics"] else None
            assemble(options["pack"], options["folder"], metrics=metrics)
    except CaptureFailed as error:
        start_again(error, options, began)


if __name__ == "__main__":
    main()
