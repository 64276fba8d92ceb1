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


def prepared(counts: list[int], block: tuple[int, int] = (128, 128)):
    lists = SimpleNamespace(full_count=torch.tensor(counts, dtype=torch.int32).view(1, 1, -1))
    even = max(counts) <= flash4_library.EVEN * sum(counts) / len(counts)
    tensors = SimpleNamespace(block_size=block)
    return flash4_library.PreparedLists(tensors, None, lists, [4608], even)


def test_other_forms_run_where_they_can_and_the_stock_one_elsewhere(installed, monkeypatch):
    even, ragged = prepared([9, 9, 10]), prepared([1, 9, 17])
    for form in (flash4.Form("persistent"), flash4.Form("scheduled")):
        kernel = flash4.Flash4Kernel(form)
        assert kernel.form_for(request(), ragged) == form
        assert kernel.form_for(request(arch=100), ragged) == flash4.STOCK
        assert kernel.form_for(request(sparse=False), None) == flash4.STOCK
    kernel = flash4.Flash4Kernel(flash4.Form("persistent", even=True))
    assert kernel.form.label == "flash4-persistent-even"
    assert kernel.form_for(request(), even) == kernel.form
    assert kernel.form_for(request(), ragged) == flash4.STOCK
    kernel = flash4.Flash4Kernel(flash4.Form("scheduled"))
    assert kernel.form_for(request(), prepared([3], block=(128, 64))) == flash4.STOCK
    assert kernel.form_for(replace(request(), head_dim=72), even) == flash4.STOCK
    monkeypatch.setattr(flash4, "installed_version", lambda: "4.0.0")
    assert kernel.form_for(request(), even) == flash4.STOCK
    assert kernel.why_not(request()) is None
