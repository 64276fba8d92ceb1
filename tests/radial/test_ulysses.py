"""Block lists where two processes share a sequence: the same as on one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffctrl.attention import BlockLists, Shard, attend
from diffctrl.control import context_parallel_plan
from tests.helpers import build, shared
from tests.radial.across_devices import main


def test_two_processes_share_a_video(tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    # Forked: a fresh interpreter would import everything once more.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=main, args=(rank, str(tmp_path / "meet"), str(report))) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert not any(alive)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = report.read_text().splitlines()
    assert len(lines) == 19
    assert [line for line in lines if not line.endswith(": ok")] == []


def _config(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=1, **fields))


def test_ring_is_refused_before_anything_is_sent() -> None:
    states = torch.zeros(1, 8, 2, 8)
    lists = BlockLists.full((4, 4), (16, 16))
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.raises(ValueError, match="ring_degree=2.*use ulysses_degree alone"):
        attend(states, states, states, mask=lists, parallel_config=config)
    with pytest.raises(ValueError, match="return_lse is not available across devices"):
        attend(states, states, states, mask=lists, parallel_config=_config(), return_lse=True)


def test_plans_split_the_video_alone() -> None:
    for name in ("hunyuan_video", "hunyuan_video15", "mochi", "cogvideox", "wan_vace"):
        plan = context_parallel_plan(shared(name))
        split = {argument for part in plan.values() if isinstance(part, dict) for argument in part}
        assert not [argument for argument in split if "encoder" in str(argument)]
    assert context_parallel_plan(shared("wan")) == shared("wan")._cp_plan
    with pytest.raises(TypeError, match="first frame's tokens"):
        context_parallel_plan(build("hunyuan_video-i2v"))
    with pytest.raises(TypeError, match="no plan for context parallelism"):
        context_parallel_plan(shared("unet"))


def test_a_shard_says_whether_tokens_are_everywhere() -> None:
    assert Shard(0, 8, 16).replicates(9)
    assert not Shard(0, 8, 16).replicates(8)
