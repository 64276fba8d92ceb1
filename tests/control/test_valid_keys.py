"""Padded text as block lists: what a GPU runs instead of the stock mask, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffctrl
from diffctrl.control import publish
from diffctrl.processors import NeutralAttnProcessor, base
from tests.helpers import CASES, build, example, run, shared

torch.set_num_threads(1)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "reads_lists", lambda device: True)
    monkeypatch.setattr(base, "engine_chooses", lambda query, mask, backend: backend is None)


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15", "hunyuan_video15-i2v", "mochi"])
def test_lists_say_what_the_stock_mask_says(name: str, as_on_a_gpu: None) -> None:
    model, inputs = shared(name), example(name)
    stock = run(model, inputs)
    with diffctrl.apply(model, NeutralAttnProcessor()) as handle:
        torch.testing.assert_close(run(model, inputs), stock, rtol=0, atol=1e-5)
        (context,) = handle.contexts.values()
        joint = [site for site in context.sites.values() if site.kind == "joint"]
        assert {site.valid_keys.n_valid.tolist()[1] for site in joint} == {45 + CASES[name].text_valid[1]}
        assert context.stats.calls["gathered"] == len(joint)
        assert context.masked_forwards == 0


def test_a_chosen_backend_keeps_the_mask(as_on_a_gpu: None) -> None:
    model, inputs = build("hunyuan_video"), example("hunyuan_video")
    model.set_attention_backend("native")
    with diffctrl.apply(model, NeutralAttnProcessor()) as handle:
        run(model, inputs)
        (stats,) = handle.stats().values()
    assert set(stats["calls"]) == {"sdpa"}


def test_a_cpu_keeps_the_mask() -> None:
    with diffctrl.apply(shared("hunyuan_video"), NeutralAttnProcessor()) as handle:
        run(shared("hunyuan_video"), example("hunyuan_video"))
        (context,) = handle.contexts.values()
    sites: Any = context.sites.values()
    assert all(site.valid_keys is None for site in sites)
