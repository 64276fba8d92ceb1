"""Train the embedded image model `shapes-sd3`: `vae`, then `sd3` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_image vae --out runs/vae
    python -m diffctrl.scripts.train_zoo_image sd3 --vae runs/vae/vae.safetensors --state runs/sd3 --pack
    runs/pack.safetensors python -m diffctrl.scripts.train_zoo_image assemble runs/pack.safetensors
    diffctrl/zoo/weights/shapes-sd3

`--smoke` runs `vae` and `sd3` on a CPU, small and short. Each command prints its options with `--help`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from diffctrl.scripts.training_command import add_options, commit, start_again, with_smoke

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
    from diffctrl.scripts.training_image_flow import ImageFlowOptions, train_flow
    from diffctrl.scripts.training_image_pack import assemble, disassemble
    from diffctrl.scripts.training_image_vae import VaeOptions, train_vae
    from diffctrl.scripts.training_loop import CaptureFailed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(commands.add_parser("vae", help="first stage: the autoencoder"), VaeOptions)
    sd3 = commands.add_parser("sd3", help="second stage: transformer and text encoders, resumable")
    add_options(sd3, ImageFlowOptions)
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
            train_vae(VaeOptions(**with_smoke(options, _SMOKE_VAE)), since=began)
        elif command == "sd3":
            evaluation = options.pop("evaluate")
            options = with_smoke(options, _SMOKE_SD3)
            options.setdefault("commit", commit())
            flow = ImageFlowOptions(**options)
            if train_flow(flow, since=began) and evaluation is not None:
                _evaluate(flow, evaluation)
        elif command == "disassemble":
            disassemble(options["folder"], options["out"])
        else:
            metrics = json.loads(options["metrics"].read_text()) if options["metrics"] else None
            assemble(options["pack"], options["folder"], metrics=metrics)
    except CaptureFailed as error:
        start_again(error, options, began)


def _evaluate(flow: Any, out: Path) -> None:
    """Evaluate the pack that the finished training has written."""
    from diffctrl.scripts.evaluate_zoo import main as evaluate

    if flow.pack is None:
        raise SystemExit("--evaluate needs --pack")
    evaluate(["--pack", str(flow.pack), "--out", str(out), "--batch", "64"])


if __name__ == "__main__":
    main()
