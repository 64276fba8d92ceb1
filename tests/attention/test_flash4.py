"""The adapter of flash-attn-4 without the package and without a GPU: what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffctrl.attention import chain
from diffctrl.attention.kernels import flash4, flash4_library
from diffctrl.attention.kernels.base import Request


def request(**changes) -> Request:
    fields = {"sparse": True, "block": (128, 128)} | changes
    return Request("cuda", fields.pop("arch", 90), torch.bfloat16, 1, 24, 24, 4608, 4608, 128, **fields)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(flash4, "installed_version", lambda: flash4.PINNED)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_gradients_are_refused_under_deterministic_algorithms(installed, deterministic):
    for sparse in (True, False):
        fields = {} if sparse else {"sparse": False, "block": (0, 0)}
        assert flash4.KERNEL.why_not(request(**fields)) is None
        assert "deterministic backward" in flash4.KERNEL.why_not(request(needs_grad=True, **fields))


def test_gradients_are_taken_otherwise(installed):
    assert flash4.KERNEL.why_not(request(needs_grad=True)) is None


def test_the_choice_follows_the_switch_of_deterministic_algorithms():
    """Also where the same call was made before."""

    class Picky:
        name = "picky"

        def why_not(self, request):
            return "is not deterministic" if torch.are_deterministic_algorithms_enabled() else None

        def run(self, request, operands):
            return chain.load("reference").run(request, operands)

    fields = {"needs_grad": True, "sparse": True, "block": (32, 32)}
    call = Request("cpu", None, torch.float32, 1, 2, 2, 100, 100, 32, **fields)
    chain.register("picky", Picky())
    try:
        assert chain.select_kernel(call, kernel="picky").kernel.name == "picky"
        torch.use_deterministic_algorithms(True)
        with pytest.raises(ValueError, match="is not deterministic"):
            chain.select_kernel(call, kernel="picky")
    finally:
        torch.use_deterministic_algorithms(False)
        chain.register("picky", None)


def prepared(block: tuple[int, int] = (128, 128)):
    lists = SimpleNamespace(full_count=torch.tensor([[[9, 9, 10]]], dtype=torch.int32))
    return flash4_library.PreparedLists(SimpleNamespace(block_size=block), None, lists, [4608])


def test_the_scheduled_form_runs_where_it_can_and_that_of_the_library_elsewhere(installed, monkeypatch):
    kernel = flash4.Flash4Kernel()
    assert kernel.is_scheduled(request(), prepared())
    assert not kernel.is_scheduled(request(arch=100), prepared())
    assert not kernel.is_scheduled(request(sparse=False), None)
    assert not kernel.is_scheduled(request(), prepared(block=(128, 64)))
    assert not kernel.is_scheduled(replace(request(), head_dim=72), prepared())
    assert not flash4.Flash4Kernel(scheduled=False).is_scheduled(request(), prepared())
    monkeypatch.setattr(flash4, "installed_version", lambda: "4.0.0")
    assert not kernel.is_scheduled(request(), prepared())
    assert kernel.why_not(request()) is None
