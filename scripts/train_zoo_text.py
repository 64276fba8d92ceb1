"""Train the embedded text model `scenes-lm`: `train` in one or more slices, then `assemble`.

    python -m diffctrl.scripts.train_zoo_text train --state runs/text --pack runs/text.safetensors
    python -m diffctrl.scripts.train_zoo_text assemble runs/text.safetensors diffctrl/zoo/weights/scenes-lm

`disassemble` turns a folder back into the pack that `train --start-from` goes on from.
`--smoke` trains on a CPU, small and short. Each command prints its options with `--help`.
"""

import time
from typing import Any

from diffctrl.scripts.training_command import Command, run_command

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
    from diffctrl.scripts.training_text_pack import assemble, disassemble
    from diffctrl.scripts.training_text_run import TextOptions, train_text

    run_command(
        __doc__,
        {"train": Command("train, or go on training; resumable", TextOptions, train_text, _SMOKE)},
        assemble=assemble,
        disassemble=disassemble,
        measured_by="scripts/evaluate_dlm.py",
        arguments=arguments,
        began=began,
    )


if __name__ == "__main__":
    main()
