"""The benchmark of attention with its gradients: that it runs, and that what is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffctrl.attention import attend
from diffctrl.radial import Pattern, block_lists
from diffctrl.scripts.bench import backward


def test_it_runs_and_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "backward.json"
    backward.main(["--dry-run", "--rounds", "2", "--out", str(out)])
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert len(figures) == 7  # dense, two for each of two blocks, and the gain of `attend` in each
    assert figures["tiny: attend, blocks of 32"]["note"].endswith("rounds; gathered")
    assert figures["tiny: gain of attend, blocks of 16"]["note"] == "density 0.929; over sdpa dense"


def test_shapes_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(backward.main(["--dry-run", "--rounds", "1", "--only", "tin"])) == 7
    with pytest.raises(SystemExit):
        backward.main(["--dry-run", "--only", "shapes-wan"])
    assert "--only shapes-wan: no shape has that in its name" in capsys.readouterr().err


def test_wrong_gradients_are_left_out() -> None:
    shape = backward.DRY_SHAPES[0]
    mask = block_lists(Pattern(block=16, sink=True), shape.layout)
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.layout.length, shape.heads, shape.dim)
    q, k, v, grad = (torch.randn(size, generator=generator) for _ in range(4))
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    expected = backward.exact_gradients(inputs, grad, mask)

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, mask=mask)

    def stale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key.detach() + 0.0 * key, value, mask=mask)

    def fault(attention: object) -> str | None:
        return backward.fault(backward.Contender("one", attention, 1.0), inputs, grad, expected)  # type: ignore[arg-type]

    assert fault(masked) is None
    assert "gradient of query" in (fault(attend) or "")  # dense
    assert "gradient of key" in (fault(stale) or "")
