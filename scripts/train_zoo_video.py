"""Train the embedded video model `shapes-wan`: `vae`, then `wan` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_video vae --out runs/wan-vae
    python -m diffctrl.scripts.train_zoo_video wan --vae runs/wan-vae/vae.safetensors --state runs/wan --pack
    runs/wan.safetensors
    python -m diffctrl.scripts.train_zoo_video assemble runs/wan.safetensors diffctrl/zoo/weights/shapes-wan

`--smoke` runs `vae` and `wan` on a CPU, small and short. Each command prints its options with `--help`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from diffctrl.scripts.training_command import add_options, commit, start_again, with_smoke

_SMOKE_VAE: dict[str, Any] = {"minutes": 0.2, "batch": 4, "pool": 32}
_SMOKE_WAN: dict[str, Any] = {
    "minutes": 0.3,
    "batch": 2,
    "pool": 32,
    "warmup_steps": 5,
    "chunk": 2,
    "check_captions": 2,
    "keep_pool": False,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` as on the command line, without the program's name."""
    began = time.monotonic()
    from diffctrl.scripts.training_loop import CaptureFailed
    from diffctrl.scripts.training_video_flow import VideoFlowOptions, train_video_flow
    from diffctrl.scripts.training_video_pack import assemble_video, disassemble_video
    from diffctrl.scripts.training_video_vae import VideoVaeOptions, train_video_vae

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(commands.add_parser("vae", help="first stage: the autoencoder"), VideoVaeOptions)
    wan = commands.add_parser("wan", help="second stage: transformer and text encoder, resumable")
    add_options(wan, VideoFlowOptions)
    building = commands.add_parser("assemble", help="build the pipeline folder out of a pack")
    building.add_argument("pack", type=Path)
    building.add_argument("folder", type=Path)
    building.add_argument("--metrics", type=Path, help="JSON of scripts/evaluate_zoo_video.py")
    parting = commands.add_parser("disassemble", help="the reverse: what `wan --start-from` goes on from")
    parting.add_argument("folder", type=Path)
    parting.add_argument("out", type=Path)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "vae":
            train_video_vae(VideoVaeOptions(**with_smoke(options, _SMOKE_VAE)), since=began)
        elif command == "wan":
            options = with_smoke(options, _SMOKE_WAN)
            options.setdefault("commit", commit())
            train_video_flow(VideoFlowOptions(**options), since=began)
        elif command == "disassemble":
            disassemble_video(options["folder"], options["out"])
        else:
            metrics = json.loads(options["metrics"].read_text()) if options["metrics"] else None
            assemble_video(options["pack"], options["folder"], metrics=metrics)
    except CaptureFailed as error:
        start_again(error, options, began)


if __name__ == "__main__":
    main()
