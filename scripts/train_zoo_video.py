"""Train the embedded video model `shapes-wan`: `vae`, then `wan` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_video vae --out runs/wan-vae
    python -m diffctrl.scripts.train_zoo_video wan --vae runs/wan-vae/vae.safetensors --state runs/wan --pack
    runs/wan.safetensors
    python -m diffctrl.scripts.train_zoo_video assemble runs/wan.safetensors diffctrl/zoo/weights/shapes-wan

A better decoder for a trained model, which is all else what it was, LoRAs included. That of `shapes-wan` was
made so on an H200, out of one half as wide:

    python -m diffctrl.scripts.train_zoo_video disassemble diffctrl/zoo/weights/shapes-wan runs/parts
    python -m diffctrl.scripts.train_zoo_video vae --decoder --start-from runs/parts/vae.safetensors
    --decoder-width 32 --emphasis 30 --learning-rate 1.2e-3 --seed 5 --minutes 9 --out runs/wan-decoder
    python -m diffctrl.scripts.train_zoo_video redecode --pack runs/parts/pack.safetensors --vae
    runs/wan-decoder/vae.safetensors --out runs/wan.safetensors
    python -m diffctrl.scripts.train_zoo_video assemble runs/wan.safetensors diffctrl/zoo/weights/shapes-wan

`--smoke` runs `vae` and `wan` on a CPU, small and short. Each command prints its options with `--help`.
"""

import time
from typing import Any

from diffctrl.scripts.training_command import Command, run_command

_SMOKE_VAE: dict[str, Any] = {"minutes": 0.2, "batch": 2, "frames": 17, "pool": 32}
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
    from diffctrl.scripts.training_video_flow import VideoFlowOptions, train_video_flow
    from diffctrl.scripts.training_video_pack import (
        RedecodeOptions,
        assemble_video,
        disassemble_video,
        redecode,
    )
    from diffctrl.scripts.training_video_vae import VideoVaeOptions, train_video_vae

    run_command(
        __doc__,
        {
            "vae": Command("first stage: the autoencoder", VideoVaeOptions, train_video_vae, _SMOKE_VAE),
            "redecode": Command("put such a decoder into a pack", RedecodeOptions, redecode),
            "wan": Command(
                "second stage: transformer and text encoder, resumable",
                VideoFlowOptions,
                train_video_flow,
                _SMOKE_WAN,
            ),
        },
        assemble=assemble_video,
        disassemble=disassemble_video,
        measured_by="scripts/evaluate_zoo_video.py",
        arguments=arguments,
        began=began,
    )


if __name__ == "__main__":
    main()
