"""A training that begins with an earlier LoRA."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffctrl.errors import BadRequestError
from diffctrl.length import read, write
from diffctrl.lengthening.train import train
from tests.length.models import save, wan
from tests.length.test_training import plan_of, training

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny-wan")


def test_a_training_begins_with_an_earlier_lora(model: Path, tmp_path: Path) -> None:
    first = plan_of(tmp_path / "a", model, steps=3, learning_rate=3e-2)
    train(first)
    plan = plan_of(tmp_path / "b", model, steps=2, start_from=str(tmp_path / "a"))
    run = training(plan)
    saved = load_file(first.lora_path)
    for layer, (down, up) in run.weights().items():
        assert torch.equal(down.half(), saved[f"transformer.{layer}.lora_A.weight"])
        assert torch.equal(up.half(), saved[f"transformer.{layer}.lora_B.weight"])
        assert bool(up.any())
    plan = replace(plan, out=tmp_path / "c")
    trained = load_file(train(plan))
    said = read(plan.lora_path).training
    assert (said["steps"], said["earlier_steps"]) == (2, 3)
    assert said["started_from"] == read(first.lora_path).summary()
    third = plan_of(tmp_path / "d", model, steps=1, start_from=str(plan.lora_path))
    assert read(train(third)).training["earlier_steps"] == 5
    # What a checkpoint has comes after what the earlier LoRA has.
    plan.lora_path.unlink()
    resumed = load_file(train(plan))
    assert all(torch.equal(value, resumed[name]) for name, value in trained.items())
    # A killed training goes on from the same LoRA only.
    train(replace(first, seed=1, out=tmp_path / "other"))
    other = plan_of(plan.out, model, steps=2, start_from=str(tmp_path / "other"))
    for changed, says in ((other, r'"\w+"'), (replace(plan, start=None), "null")):
        with pytest.raises(BadRequestError, match=rf'has start_from "\w+" \(not {says}\); go on'):
            train(changed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start_from": "nowhere"}, "there is no length LoRA 'nowhere'"),
        ({"rank": 2}, r"has rank 4 and alpha 4; give --rank 4 --lora-alpha 4"),
        ({"lora_alpha": 8.0}, r"has rank 4 and alpha 4"),
        ({"cross": True}, r"adapts 12 layers, and 24 are to be trained"),
        ({"model": "shapes-wan"}, r"does not fit this model"),
    ],
)
def test_loras_that_a_training_cannot_begin_with(
    model: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    first = plan_of(tmp_path / "a", model)
    run = training(first)
    write(first.lora_path, run.weights(), run.described())
    fields = {"start_from": str(first.lora_path), **changes}
    with pytest.raises(BadRequestError, match=says):
        plan_of(tmp_path / "b", model, **fields)


def test_a_start_of_other_weights_is_refused(tmp_path: Path) -> None:
    first = plan_of(tmp_path / "a", save(tmp_path / "one"), steps=1)
    train(first)
    wan(seed=1).save_pretrained(tmp_path / "two")
    shutil.copy(tmp_path / "one" / "diffctrl.json", tmp_path / "two")
    plan = plan_of(tmp_path / "b", tmp_path / "two", start_from=str(first.lora_path))
    with pytest.raises(BadRequestError, match=r"--start-from: .* other weights than these.*\)$"):
        training(plan)
