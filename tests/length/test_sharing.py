"""Processes that share a clip train what one process trains."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.length import read
from diffctrl.lengthening import plan as planning
from diffctrl.lengthening.plan import TrainPlan
from diffctrl.lengthening.sharing import tokens_of
from diffctrl.lengthening.train import train
from tests.length.hunyuan import hunyuan
from tests.length.models import save
from tests.length.test_training import SETTINGS, close, plan_of, write_clips

torch.set_num_threads(1)

CHANGES: dict[str, Any] = {
    "steps": 4, "sampling": "uniform", "settings": (*SETTINGS, ("dense_fraction", "0.5")),
}  # fmt: skip


def _rank(rank: int, world: int, port: int, plans: list[TrainPlan]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, and there is none
    for plan in plans:
        train(plan)


def in_processes(world: int, plans: list[TrainPlan]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: a fresh interpreter would import everything once more.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, world, port, plans)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world


def test_processes_share_clips(tmp_path: Path) -> None:
    wan = save(tmp_path / "wan")
    hunyuan().save_pretrained(tmp_path / "hunyuan")
    data = tmp_path / "data"
    write_clips(data, 2, frames=37)
    source = ModelSource.find(str(tmp_path / "hunyuan"))
    assert tokens_of(source, planning.trainable(source).scale, 9, 32, 48) == 9 * 2 * 3
    plans = {
        "wan": plan_of(tmp_path / "wan-one", wan, **CHANGES),
        "in parts": plan_of(tmp_path / "parts-one", wan, **CHANGES | {"batch": 1, "accumulate": 2}),
        "dense": plan_of(tmp_path / "dense-one", wan, steps=2, method="dense", settings=()),
        "hunyuan": plan_of(
            tmp_path / "hunyuan-one", tmp_path / "hunyuan", data=data, height=32, width=32, **CHANGES
        ),
    }
    for plan in plans.values():
        train(plan)
    shared = {
        name: replace(plan, out=tmp_path / f"{name}-two", ulysses_degree=2) for name, plan in plans.items()
    }
    in_processes(2, list(shared.values()))
    for name, plan in shared.items():
        assert read(plan.lora_path).training["ulysses_degree"] == 2
        same(plan, plans[name])


@pytest.mark.slow
def test_groups_of_processes_share_clips(tmp_path: Path) -> None:
    one = plan_of(tmp_path / "one", save(tmp_path / "wan"), **CHANGES)
    groups = replace(one, out=tmp_path / "groups", batch=1, ulysses_degree=2)
    train(one)
    in_processes(4, [groups])  # two groups of two: each has one clip of the two
    same(groups, one, losses=False)


@pytest.mark.slow
def test_shared_clips_in_compiled_blocks(tmp_path: Path) -> None:
    one = plan_of(tmp_path / "one", save(tmp_path / "wan"), **CHANGES)
    compiled = replace(one, out=tmp_path / "two", ulysses_degree=2, compile=True)
    train(one)
    in_processes(2, [compiled])
    same(compiled, one)


def same(found: TrainPlan, wanted: TrainPlan, losses: bool = True) -> None:
    close(load_file(found.lora_path), load_file(wanted.lora_path))
    # AdamW does not tell a gradient from its double.
    for column in ("gradient_norm", "loss") if losses else ("gradient_norm",):
        assert _column(found, column) == pytest.approx(_column(wanted, column), rel=1e-3)


def _column(plan: TrainPlan, name: str) -> list[float]:
    with (plan.out / "log.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("started", "degree", "device", "says"),
    [
        (1, 2, "cuda", r"so many processes share a clip, and 1 run; start them with accelerate launch"),
        (6, 4, "cuda", r"so many processes share a clip, and 6 run"),
        (3, 3, "cuda", r"3 does not divide the 272 tokens of a clip"),
        (4, 4, "cuda", r"does not divide the 2 heads of .*tiny-wan; accepted: 1, 2"),
        (2, 2, "cpu", r"wants a GPU for each process"),
        (1, 0, "cpu", r"--ulysses-degree 0 is out of range"),
    ],
)
def test_what_cannot_be_shared(
    started: int, degree: int, device: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "tiny-wan")
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setattr(planning, "choose_device", lambda *args, **kwargs: (device, "float32"))
    with pytest.raises(BadRequestError, match=says):
        plan_of(tmp_path / "out", model, ulysses_degree=degree)
