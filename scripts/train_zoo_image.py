"""Train the embedded image model `shapes-sd3`: `vae`, then `sd3` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_image vae --out runs/vae
    python -m diffctrl.scripts.train_zoo_image sd3 --vae runs/vae/vae.safetensors --state runs/sd3 --pack
    runs/pack.safetensors
    python -m diffctrl.scripts.train_zoo_image assemble runs/pack.safetensors diffctrl/zoo/weights/shapes-sd3

`--smoke` runs `vae` and `sd3` on a CPU, small and short. Each command prints its options with `--help`.
"""

import time
from typing import Any

from diffctrl.scripts.training_command import Command, run_command

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

    run_command(
        __doc__,
        {
            "vae": Command("first stage: the autoencoder", VaeOptions, train_vae, _SMOKE_VAE),
            "sd3": Command(
                "second stage: transformer and text encoders, resumable",
                ImageFlowOptions,
                train_flow,
                _SMOKE_SD3,
            ),
        },
        assemble=assemble,
        disassemble=disassemble,
        measured_by="scripts/evaluate_zoo.py",
        arguments=arguments,
        began=began,
    )


if __name__ == "__main__":
    main()
