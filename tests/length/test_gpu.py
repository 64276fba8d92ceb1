"""Training on a GPU: blocks of 128 by the fastest backward, the loss of the CPU, a LoRA that loads."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from diffctrl.length import read
from diffctrl.lengthening import plan as planning
from diffctrl.lengthening.plan import TrainRequest
from diffctrl.lengthening.train import train
from diffctrl.pipelines.length import load_length_lora
from tests.length.models import latents, save, wan

pytestmark = pytest.mark.gpu


def losses(path: Path) -> list[float]:
    with (path.parent / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("block", ["128", "16"])
def test_it_trains_as_on_a_cpu(tmp_path: Path, block: str) -> None:
    model = save(tmp_path / "model")

    def trained(device: str, dtype: str) -> Path:
        request = TrainRequest(
            out=tmp_path / device, model=str(model), frames=129, clips=4, rank=4, steps=4, batch=2,
            settings=(("block", block),), learning_rate=1e-3, warmup_steps=1, device=device, dtype=dtype,
        )  # fmt: skip
        return train(planning.make(request))

    on_gpu, on_cpu = trained("cuda", "bfloat16"), trained("cpu", "float32")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=3e-2)
    assert read(on_gpu).latent_frames == (65, 65)
    pipe = wan().to("cuda", torch.bfloat16)
    with load_length_lora(pipe, on_gpu, dense_steps=0, dense_last_steps=0) as control:
        assert torch.isfinite(latents(pipe, frames=129)).all()
        (stats,) = control.stats().values()
    assert stats["masked_forwards"] == 3
