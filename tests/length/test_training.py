"""Training a length LoRA: its gradients, that it learns, that a killed training ends at the same weights."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import diffctrl
from diffctrl import processes
from diffctrl.errors import BadRequestError
from diffctrl.families import Call, Site
from diffctrl.length import read
from diffctrl.lengthening import plan as planning
from diffctrl.lengthening.batches import Batch, Batches
from diffctrl.lengthening.checkpoints import Checkpoints
from diffctrl.lengthening.encoded import EncodedClips
from diffctrl.lengthening.plan import TrainPlan, TrainRequest
from diffctrl.lengthening.train import Progress, Training, train
from diffctrl.pipelines.length import load_length_lora, unload_length_lora
from diffctrl.processors import RadialAttnProcessor, RadialConfig
from diffctrl.radial import Layout, block_grid
from diffctrl.scripts.training_video_forward import VideoForward, encode, to_rows
from diffctrl.zoo.video import VideoParts
from tests.length.hunyuan import hunyuan
from tests.length.models import latents, save, wan

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
# Blocks of 16 tokens are one latent frame of 32 x 32 pixels.
SETTINGS = (("block", "16"),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny-wan")


def plan_of(out: Path, folder: Path, **changes: Any) -> TrainPlan:
    fields: dict[str, Any] = {
        "out": out, "model": str(folder), "frames": 33, "settings": SETTINGS, "rank": 4, "steps": 8,
        "batch": 2, "learning_rate": 1e-3, "warmup_steps": 2, "checkpoint_every": 3, "device": "cpu",
    }  # fmt: skip
    if "data" not in changes:
        fields["clips"] = 5
    return planning.make(TrainRequest(**{**fields, **changes}))


def training(plan: TrainPlan) -> Training:
    """Before the first step, with the clips encoded."""
    clips = EncodedClips(plan)
    pipe = plan.source.load(torch.float32)
    velocity = plan.kind.velocity_model()(pipe, plan.max_sequence_length)
    clips.encode(velocity, clips.missing(), torch.device("cpu"))
    checkpoints = Checkpoints(plan.out / "checkpoints", plan.identity(), plan.keep)
    return Training(plan, clips, velocity, processes.accelerator("cpu"), checkpoints)


# --- gradients ----------------------------------------------------------------------------------------------


class Written(RadialAttnProcessor):
    """The sparse attention by scaled_dot_product_attention, with the mask written out."""

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        if site.mask is None:
            return output
        frames, rows, columns = site.context.grid()
        text = (site.context.info.text_length or 0) if site.kind == "joint" else 0
        made, _ = self.resolved(site.family.name, frames)
        blocks = torch.from_numpy(block_grid(made, Layout(frames=frames, tokens=rows * columns, text=text)))
        mask = blocks.repeat_interleave(made.block, 0).repeat_interleave(made.block, 1)
        mask = mask[: call.query.shape[1], : call.query.shape[1]]
        assert 0 < mask.float().mean() < 1
        q, k, v = (part.transpose(1, 2) for part in (call.query, call.key, call.value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def gradients(run: Training, processor: RadialAttnProcessor) -> dict[str, Tensor]:
    with diffctrl.apply(run.model.transformer, processor):
        run.loss(0, 0, run.model.transformer).backward()
    found = {name: value.grad.clone() for name, value in run.adapter.items()}
    run.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_the_mask_written_out(
    model: Path, tmp_path: Path, checkpointing: bool
) -> None:
    run = training(plan_of(tmp_path, model, checkpointing=checkpointing))
    for value in run.adapter.values():  # B starts at zero, where A has no gradient
        torch.nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {**(run.plan.mask or {}), "dense_fraction": 0.0, "dense_last_steps": 0}
    wanted = gradients(run, Written(**settings))
    found = gradients(run, RadialAttnProcessor(**settings))
    dense = gradients(run, RadialAttnProcessor(dense_fraction=1.0))
    scale = max(float(value.abs().max()) for value in wanted.values())
    assert len(wanted) == 2 * len(run.plan.targets) == 24
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    # The planted fault: a dense backward is far off.
    assert max(float((dense[n] - wanted[n]).abs().max()) for n in wanted) > 1e-3 * scale


def test_only_the_adapter_is_trained_and_starts_at_nothing(model: Path, tmp_path: Path) -> None:
    run = training(plan_of(tmp_path, model))
    trained = [name for name, value in run.model.transformer.named_parameters() if value.requires_grad]
    assert {name.split(".lora_")[0].rpartition("attn1.")[2] for name in trained} == {
        "to_q", "to_k", "to_v", "to_out.0",
    }  # fmt: skip
    assert sorted(trained) == sorted(run.adapter)
    untouched = {n: v.clone() for n, v in run.model.transformer.state_dict().items() if ".lora_" not in n}
    run.model.transformer.eval()
    found = latents(run.model.pipe)
    run.model.transformer.disable_adapters()
    assert torch.equal(found, latents(run.model.pipe))
    run.model.transformer.enable_adapters()
    with run.masked():
        run.step(0, run.model.transformer)
    state = run.model.transformer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in untouched.items())


def test_the_objective_is_that_of_the_models_own_training(model: Path, tmp_path: Path) -> None:
    run = training(plan_of(tmp_path, model, method="dense", settings=(), empty_share=0.0))
    pipe = wan()
    pixels, captions = run.plan.clips.pixels(0, torch.device("cpu")), run.plan.clips.captions(0)
    mean, _ = encode(pipe.vae, pixels * 2 - 1)  # (B, F, C, h, w); the tiny model's latents are not scaled
    clean, _ = run.clips.batch(range(5), [False] * 5)
    torch.testing.assert_close(clean.float(), mean.transpose(1, 2), rtol=1e-3, atol=1e-3)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    parts = VideoParts(vae=pipe.vae, transformer=pipe.transformer, text_encoder=pipe.text_encoder)
    ids = pipe.tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        forward = VideoForward(parts, compiled=False)
        wanted = forward.loss(to_rows(clean.float()), ids, to_rows(noise), level)
        noisy = torch.lerp(clean.float(), noise, level[:, None, None, None, None])
        text = run.clips.batch(range(5), [False] * 5)[1]
        found = run.model.call(run.model.transformer, noisy, level, text) - (noise - clean.float())
    torch.testing.assert_close(found.square().mean(), wanted, rtol=1e-4, atol=0)


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["radial", "dense"])
def test_twenty_steps_lower_the_loss(model: Path, tmp_path: Path, method: str, caplog: Any) -> None:
    settings = SETTINGS if method == "radial" else ()
    plan = plan_of(
        tmp_path, model, method=method, settings=settings, steps=20, clips=2, learning_rate=3e-2,
        empty_share=0.0, frames=65,
    )  # fmt: skip
    run = training(plan)
    wrapped = run.model.transformer

    @torch.no_grad()
    def loss() -> float:  # always of the same noise
        return sum(float(run.loss(step, 0, wrapped)) for step in range(4))

    with run.masked():
        before = loss()
    caplog.clear()
    path = run.run(lambda progress: None)
    assert caplog.text == ""  # no word of a mask without a LoRA
    with run.masked():
        after = loss()
    assert after < 0.95 * before
    lora = read(path)
    assert (lora.method, lora.frames, lora.latent_frames) == (method, (65, 65), (33, 33))
    assert lora.training["steps"] == 20
    if method == "radial":
        assert lora.mask == RadialConfig(
            block_rule="hybrid", decay_factor=1.0, sink=True, block=16, dense_blocks=2, dense_fraction=0.04
        )


# --- noise levels of dense steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["logit-normal", "uniform"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6])
def test_levels_of_dense_steps_are_apart_and_as_frequent_as_before(
    model: Path, tmp_path: Path, sampling: str, fraction: float
) -> None:
    plan = plan_of(
        tmp_path, model, settings=(*SETTINGS, ("dense_fraction", str(fraction))), sampling=sampling
    )
    run = training(plan)
    draw = torch.Generator().manual_seed(0)
    levels, starts = [], []
    for number in range(1500):
        found, mark = run.batches.levels(torch.rand(4, generator=draw), number)
        levels.append(found)
        starts.append(mark == 0)
        assert bool(((levels[-1] > 1 - fraction) == starts[-1]).all())
    # All levels together are distributed as without dense steps; the logits of logit-normal ones are normal.
    pooled = torch.cat(levels)
    found = pooled if sampling == "uniform" else pooled.logit()
    mean, std = (0.5, 12**-0.5) if sampling == "uniform" else (0.0, 1.0)
    assert float(found.mean()) == pytest.approx(mean, abs=0.08)
    assert float(found.std()) == pytest.approx(std, abs=0.05)
    assert any(starts) == (fraction > 0)


def test_highest_levels_are_trained_dense_and_the_others_under_the_mask(model: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, ("dense_fraction", "0.4"))
    run = training(plan_of(tmp_path, model, settings=settings, frames=65))
    for value in run.adapter.values():
        torch.nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(1))
    wrapped, numbers = run.model.transformer, range(8)

    @torch.no_grad()
    def losses(processor: RadialAttnProcessor | None) -> list[float]:
        with run.masked() if processor is None else diffctrl.apply(wrapped, processor):
            return [float(run.loss(number, 0, wrapped)) for number in numbers]

    mask = run.plan.mask or {}
    dense = losses(RadialAttnProcessor(dense_fraction=1.0))
    sparse = losses(RadialAttnProcessor(**{**mask, "dense_fraction": 0.0}, dense_last_steps=0))
    starts = [run.batches.levels(torch.zeros(1), number)[1] == 0 for number in numbers]
    assert set(starts) == {False, True}
    wanted = [d if start else s for d, s, start in zip(dense, sparse, starts, strict=True)]
    assert losses(None) == pytest.approx(wanted, rel=1e-5)
    # The planted fault: one kind of attention for the other would show.
    assert min(abs(d - s) for d, s in zip(dense, sparse, strict=True)) > 1e-4


def test_the_loras_dense_part_is_the_runs_unless_another_is_given(model: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, ("dense_fraction", "0.5"))
    run = training(plan_of(tmp_path, model, settings=settings, steps=1))
    path = run.run(lambda progress: None)
    assert (read(path).radial or {})["dense_fraction"] == 0.5
    pipe = wan()
    for given_, sparse in (({}, 2), ({"dense_fraction": 0.0}, 4), ({"dense_steps": 3}, 1)):
        with load_length_lora(pipe, path, **given_, dense_last_steps=0) as control:
            latents(pipe, num_inference_steps=4)
            (stats,) = control.stats().values()
        assert stats["masked_forwards"] == sparse * stats["forwards"] / 4
        unload_length_lora(pipe)


def test_the_file_is_what_was_trained(model: Path, tmp_path: Path) -> None:
    """The transformer in training, mask and adapter on, against the file on a fresh pipeline."""
    run = training(plan_of(tmp_path, model, learning_rate=3e-2, lora_alpha=2.0))
    path = run.run(lambda progress: None)
    run.model.transformer.eval()
    fresh = wan()
    with run.masked():
        wanted = latents(run.model.pipe, frames=33)
    with load_length_lora(fresh, path, dense_steps=0, dense_last_steps=0):
        found = latents(fresh, frames=33)
    # float16 in the file.
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))
    assert (latents(wan(), frames=33) - wanted).abs().max() > 0.05 * wanted.abs().max()


def test_hunyuan_video_trains_its_texts_projections_too(tmp_path: Path) -> None:
    hunyuan().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    write_clips(data, 1, frames=37)
    plan = plan_of(tmp_path / "out", tmp_path / "model", data=data, steps=2, batch=1, height=32, width=32)
    assert sum("add_" in name for name in plan.targets) == 2 * 4  # of both double blocks
    lora = read(train(plan))
    assert lora.base.class_name == "HunyuanVideoTransformer3DModel"
    run = training(plan)
    clean, text = run.clips.batch([0, 0], [False, True])
    noisy, level = clean.float(), torch.tensor([0.3, 0.7])
    text["encoder_attention_mask"][0, 60:], text["encoder_attention_mask"][1, 100:] = 0, 0
    cut = run.model.trimmed(text)
    assert {name: value.shape[1] for name, value in cut.items()} == {
        "encoder_hidden_states": 100, "encoder_attention_mask": 100, "pooled_projections": 8,
    }  # fmt: skip
    with run.masked(), torch.no_grad():
        found, whole = (run.model.call(run.model.transformer, noisy, level, each) for each in (cut, text))
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    pipe = hunyuan()
    with load_length_lora(pipe, plan.lora_path, dense_steps=0, dense_last_steps=0) as control:
        pipe("a red circle", height=32, width=32, num_frames=33, num_inference_steps=2, output_type="latent")
        (stats,) = control.stats().values()
    assert stats["masked_forwards"] == 2
    fewer = plan_of(tmp_path / "b", tmp_path / "model", data=data, added=False, batch=1, height=32, width=32)
    assert not any("add_" in name for name in fewer.targets)


def test_frozen_weights_of_16_bits_and_an_adapter_of_32(model: Path, tmp_path: Path) -> None:
    run = training(plan_of(tmp_path, model, dtype="bfloat16"))
    assert {value.dtype for value in run.adapter.values()} == {torch.float32}
    pipe = run.plan.source.load({"default": torch.bfloat16, "vae": torch.float32})
    assert pipe.vae.dtype == torch.float32
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    losses: list[float] = []
    path = train(run.plan, lambda now: losses.append(now.loss) if now.loss is not None else None)
    whole = train(plan_of(tmp_path / "whole", model))
    assert len(losses) == 8
    with (tmp_path / "whole" / "log.csv").open(newline="") as file:
        wanted = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx(wanted, rel=2e-2)  # the same noise, in other dtypes
    assert read(path).training["dtype"] == "bfloat16"
    assert whole != path


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
def test_each_epoch_has_all_clips_in_an_order_of_its_own(count: int, seed: int) -> None:
    plan: Any = SimpleNamespace(seed=seed)
    batches = Batches(plan, range(count), shift=1.0, rank=0, world=1)  # type: ignore[arg-type]
    order = [batches.clip(place) for place in range(3 * count)]
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    places = list(range(0, 3 * count, 2))[::-1]
    assert [batches.clip(place) for place in places] == [order[place] for place in places]
    if count > 8:
        assert order[:count] != order[count : 2 * count]


def test_batches_drawn_ahead_are_those_drawn_when_asked_for(model: Path, tmp_path: Path) -> None:
    run = training(plan_of(tmp_path, model, batch=1, accumulate=2, steps=4))

    def parts(batch: Batch) -> list[Tensor]:
        return [batch.clean, batch.noise, batch.level, *batch.text.values(), torch.tensor(batch.mark)]

    drawn, draw = [], run.batches._draw

    def counted(*place: int) -> Batch:
        drawn.append(place)
        return draw(*place)

    run.batches._draw = counted  # type: ignore[method-assign]
    places = [(step, part) for step in range(4) for part in range(2)]
    in_order = [parts(run.batches.take(*place)) for place in places]
    assert drawn == places  # each once: what is drawn ahead is what is used
    backwards = [parts(run.batches.take(*place)) for place in places[::-1]][::-1]
    for one, other in zip(in_order, backwards, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    noises = [parts[1] for parts in in_order]
    assert not any(torch.equal(noises[0], noise) for noise in noises[1:])


def test_a_clip_that_cannot_be_read_ends_the_training(model: Path, tmp_path: Path) -> None:
    run = training(plan_of(tmp_path, model, steps=4))
    for path in run.clips.folder.glob("block-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="block-"):
        run.run(lambda progress: None)


# --- trainings in one process -------------------------------------------------------------------------------

_SEVERAL = """
from pathlib import Path
from accelerate import Accelerator
from diffctrl.lengthening.train import train
from tests.length.test_training import plan_of

out, model = Path({out!r}), Path({model!r})
train(plan_of(out / "first", model, steps=1))
own = Accelerator(mixed_precision="bf16")  # of the caller, on the device that the environment names
train(plan_of(out / "second", model, steps=1, dtype="bfloat16"))
print(own.device, own.mixed_precision)
"""


def test_trainings_of_one_process_do_not_meet_each_other_nor_the_callers_accelerator(
    model: Path, tmp_path: Path
) -> None:
    """accelerate refuses another device or precision than its first; "meta" stands where a GPU would."""
    code = _SEVERAL.format(out=str(tmp_path), model=str(model))
    place = {"ACCELERATE_TORCH_DEVICE": "meta", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | place, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["meta", "bf16"]
    found = [read(tmp_path / name / "length-lora.safetensors") for name in ("first", "second")]
    assert [lora.training["dtype"] for lora in found] == ["float32", "bfloat16"]


# --- killed trainings ---------------------------------------------------------------------------------------


def steps_of(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_killed_training_ends_at_the_same_weights(model: Path, tmp_path: Path) -> None:
    whole = train(plan_of(tmp_path / "whole", model, accumulate=2))
    command = [
        sys.executable, "-m", "diffctrl", "train-length-lora", "--model", model, "--out", tmp_path / "killed",
        "--frames", 33, "--clips", 5, "--set", "block=16", "--rank", 4, "--steps", 8, "--batch", 2,
        "--learning-rate", 1e-3, "--warmup-steps", 2, "--checkpoint-every", 3, "--device", "cpu",
        "--accumulate", 2,
    ]  # fmt: skip
    log = tmp_path / "killed" / "log.csv"
    process = subprocess.Popen([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 60
        while not (log.is_file() and len(steps_of(log)) >= 4) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL  # not done before it was killed
    assert not (tmp_path / "killed" / whole.name).exists()
    started: list[int] = []
    plan = plan_of(tmp_path / "killed", model, accumulate=2)
    train(plan, lambda now: started.append(now.done) if now.stage == "training" else None)
    assert started[0] in (3, 6)
    assert same(load_file(plan.lora_path), load_file(whole))
    assert steps_of(log) == list(range(1, 9))
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000006.safetensors", "step-00000008.safetensors"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stopped(Exception):
    pass


def stop_at(step: int) -> Any:
    def on_progress(now: Progress) -> None:
        if now.stage == "training" and now.done == step:
            raise Stopped

    return on_progress


def test_a_broken_checkpoint_is_passed_over(model: Path, tmp_path: Path, caplog: Any) -> None:
    whole = train(plan_of(tmp_path / "whole", model))
    plan = plan_of(tmp_path / "broken", model)
    with pytest.raises(Stopped):
        train(plan, stop_at(7))
    newest = tmp_path / "broken" / "checkpoints" / "step-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    train(plan)
    assert "cannot be read; going on from the one before it" in caplog.text
    assert same(load_file(plan.lora_path), load_file(whole))


def test_a_run_stopped_while_encoding_goes_on(model: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model, clips=20)

    def stop(now: Progress) -> None:
        if now.stage == "encoding":
            raise Stopped

    with pytest.raises(Stopped):
        train(plan, stop)
    clips = EncodedClips(plan)
    assert clips.missing() == [1]
    seen: list[Progress] = []
    train(replace(plan, steps=1), seen.append)
    assert [now.done for now in seen if now.stage == "encoding"] == [1]
    # Encoded clips need no encoders: they are not loaded again.
    assert clips.complete


def test_other_options_are_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    train(plan_of(tmp_path, model, steps=1))
    monkeypatch.setattr(type(plan_of(tmp_path, model).source), "load", None)
    with pytest.raises(BadRequestError, match=r"has steps 1 \(not 8\); go on with the same options"):
        train(plan_of(tmp_path, model))
    with pytest.raises(BadRequestError, match=r"clips.*were made with|has data"):
        train(plan_of(tmp_path, model, clips=6, steps=1))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(BadRequestError, match="without checkpoints, and a new training would write over it"):
        train(plan_of(tmp_path, model, steps=1))


def test_a_loss_that_is_not_finite_stops(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Training, "loss", lambda self, *a: sum(v.sum() for v in self.adapter.values()) * 1e39)
    with pytest.raises(BadRequestError, match="give a lower --learning-rate"):
        train(plan_of(tmp_path, model))
    assert not (tmp_path / "length-lora.safetensors").exists()


# --- clips and refusals -------------------------------------------------------------------------------------


def write_clips(folder: Path, count: int, *, frames: int = 33, size: tuple[int, int] = (32, 48)) -> None:
    import av
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with av.open(str(folder / f"{number}.mp4"), "w") as file:
            stream: Any = file.add_stream("libx264", rate=16)
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            for index in range(frames):
                picture = np.full((*size, 3), 10 + 5 * index, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        (folder / f"{number}.txt").write_text(f"clip  number\n{number}")


def test_clips_of_a_folder_are_cut_from_the_middle(model: Path, tmp_path: Path) -> None:
    write_clips(tmp_path / "data", 2, frames=41)
    plan = plan_of(tmp_path / "out", model, data=tmp_path / "data", batch=1)
    assert plan.clips.captions(1) == ["clip number 1"]
    pixels = plan.clips.pixels(0, torch.device("cpu"))
    assert pixels.shape == (1, 33, 3, 32, 32)
    shades = pixels.mean((0, 2, 3, 4)) * 255
    assert shades[0] == pytest.approx(10 + 5 * 4, abs=4)
    assert shades[-1] == pytest.approx(10 + 5 * 36, abs=4)
    train(replace(plan, steps=1))
    index = tmp_path / "data" / "metadata.jsonl"
    index.write_text('{"file_name": "1.mp4", "text": "the second"}\n')
    assert plan_of(tmp_path / "o", model, data=tmp_path / "data", batch=1).clips.captions(0) == ["the second"]


def test_clips_as_downloads_and_cameras_leave_them(model: Path, tmp_path: Path) -> None:
    write_clips(tmp_path / "blobs", 1)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.mp4", "B.MP4", "._a.mp4"):  # links into a store, as the hub's downloads are
        (data / name).symlink_to(tmp_path / "blobs" / "0.mp4")
    (data / "a.txt").write_text("a circle", encoding="utf-8-sig")
    (data / "B.txt").write_text("a star")
    plan = plan_of(tmp_path / "o", model, data=data, batch=1)
    assert sorted(clip.caption for clip in plan.clips.clips) == ["a circle", "a star"]
    first = '{"file_name": "a.mp4", "caption": "a \u2028 ring"}'
    lines = f'{first}\n{{"file_name": "B.MP4", "caption": "a star"}}'
    (data / "metadata.jsonl").write_text(lines, encoding="utf-8-sig")
    plan = plan_of(tmp_path / "o", model, data=data, batch=1)
    assert [clip.caption for clip in plan.clips.clips] == ["a ring", "a star"]


def test_captions_that_are_no_text_in_utf8(model: Path, tmp_path: Path) -> None:
    write_clips(tmp_path, 1)
    (tmp_path / "0.txt").write_bytes("ein gr\u00fcner Kreis".encode("latin-1"))
    with pytest.raises(BadRequestError, match=r"0.txt is no text in UTF-8"):
        plan_of(tmp_path / "out", model, data=tmp_path)


def test_captions_that_the_model_does_not_read_whole_are_warned_of(model: Path, tmp_path: Path) -> None:
    write_clips(tmp_path, 3)
    (tmp_path / "1.txt").write_text("a red circle and " * 30)
    plan = plan_of(tmp_path / "out", model, data=tmp_path)
    assert any("does not read to the end of 1 of 3 captions" in warning for warning in plan.warnings)


def test_other_weights_in_the_models_folder_are_another_training(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    plan = plan_of(tmp_path / "out", folder, steps=1)
    train(plan)
    trained = (tmp_path / "out" / "length-lora.safetensors").read_bytes()
    wan(seed=7).save_pretrained(folder)
    with pytest.raises(BadRequestError, match="the training in .* has weights"):
        train(plan_of(tmp_path / "out", folder, steps=1))
    assert (tmp_path / "out" / "length-lora.safetensors").read_bytes() == trained


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("no json", r"line 1 is not"),
        ('{"file_name": "0.mp4", "caption": null}', "line 1 is not"),
        ('{"file_name": "0.mp4", "caption": ["a", "b"]}', "line 1 is not"),
        ('{"caption": "a"}', "line 1 is not"),
        ('{"file_name": "../1.mp4", "caption": "a"}', "not in the folder"),
        ('{"file_name": "0.mp4", "caption": " "}', "is empty"),
        ("", "holds no clips"),
    ],
)
def test_faulty_lists_of_clips(model: Path, tmp_path: Path, index: str, says: str) -> None:
    write_clips(tmp_path / "data", 1)
    write_clips(tmp_path, 2)
    (tmp_path / "data" / "metadata.jsonl").write_text(index)
    with pytest.raises(BadRequestError, match=says):
        plan_of(tmp_path / "out", model, data=tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 32}, "the nearest is 33"),
        ({"frames": 35}, "multiples of 4 and one more"),
        ({"height": 30}, "multiples of 16"),
        ({"steps": 0}, "--steps 0 is out of range"),
        ({"learning_rate": float("nan")}, "not a positive number"),
        ({"empty_share": 1.0}, r"not in \[0, 1\)"),
        ({"method": "ring"}, "not one of radial, dense"),
        ({"method": "dense"}, "--method dense has none"),
        ({"sampling": "cosine"}, "not one of logit-normal, uniform"),
        ({"dtype": "float16"}, "no dtype to train in"),
        ({"settings": (("dense_steps", "2"),)}, "give dense_fraction, the part of a run"),
        ({"settings": (("dense_last_steps", "1"),)}, "there are no steps in training"),
        ({"settings": (("dense_fraction", "1"),)}, "leaves no noise level to the mask"),
        ({"settings": (("dense_fraction", "0.9995"),)}, "give at most 0.95"),
        ({"settings": (("dense_blocks", "3"),)}, "leaves none of the 3 blocks"),
        ({"settings": (("blok", "3"),)}, "did you mean block?"),
        ({"added": True}, "no projections of text"),
        ({"batch": 3, "accumulate": 2}, "a step takes 6 clips, and there are 5"),
        ({"data": Path("nowhere")}, "is no folder"),
        ({"data": Path("nowhere"), "clips": 3}, "give one of them"),
        ({"clips": 0}, "--clips 0 is not a number"),
        ({"model": "shapes-wan2"}, "did you mean shapes-wan?"),
        ({"model": "shapes-sd3"}, "is a StableDiffusion3Pipeline; length LoRAs are trained on WanPipeline"),
        ({"device": "cuda:99"}, "no device"),
    ],
)
def test_bad_requests(model: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        plan_of(tmp_path / "out", model, **changes)
    assert not (tmp_path / "out").exists()


def test_missing_captions_and_short_clips(model: Path, tmp_path: Path) -> None:
    write_clips(tmp_path / "data", 2, frames=17)
    with pytest.raises(BadRequestError, match=r"0.mp4, 1.mp4 in .* are shorter than --frames 33"):
        plan_of(tmp_path / "out", model, data=tmp_path / "data")
    (tmp_path / "data" / "1.txt").unlink()
    with pytest.raises(BadRequestError, match="no 1.txt beside it"):
        plan_of(tmp_path / "out", model, data=tmp_path / "data")


def test_models_with_noise_schedules_of_their_own_are_refused(model: Path, tmp_path: Path) -> None:

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        scheduler.read_text().replace('"use_dynamic_shifting": false', '"use_dynamic_shifting": true')
    )
    with pytest.raises(BadRequestError, match="shifts noise by the clip's size"):
        plan_of(tmp_path / "out", folder)
    scheduler.write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(BadRequestError, match="none of flow matching"):
        plan_of(tmp_path / "out", folder)


def test_a_step_is_the_same_in_parts(model: Path, tmp_path: Path) -> None:
    # Half of the noise levels are dense: parts of one update have levels of the same half.
    changes: dict[str, Any] = {"steps": 3, "sampling": "uniform"}
    changes["settings"] = (*SETTINGS, ("dense_fraction", "0.5"))
    whole = train(plan_of(tmp_path / "a", model, batch=4, **changes))
    parts = train(plan_of(tmp_path / "b", model, batch=2, accumulate=2, **changes))
    close(load_file(parts), load_file(whole))


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_is_the_same_compiled(model: Path, tmp_path: Path, checkpointing: bool) -> None:
    torch._dynamo.reset()
    settings = (*SETTINGS, ("dense_fraction", "0.5"))  # steps under the mask and dense ones
    changes: dict[str, Any] = {"steps": 3, "sampling": "uniform", "settings": settings}
    eager = train(plan_of(tmp_path / "a", model, **changes))
    before = torch._dynamo.utils.counters["frames"]["ok"]
    compiled = train(plan_of(tmp_path / "b", model, compile=True, checkpointing=checkpointing, **changes))
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    close(load_file(compiled), load_file(eager))


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-2, atol=2e-5, msg=name)


@pytest.mark.slow
def test_a_step_is_the_same_in_two_processes(model: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, ("dense_fraction", "0.5"))
    whole = train(plan_of(tmp_path / "one", model, steps=3, settings=settings))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29517, "-m",
        "diffctrl", "train-length-lora", "--model", model, "--out", tmp_path / "two", "--frames", 33,
        "--clips", 5, "--set", "block=16", "--set", "dense_fraction=0.5", "--rank", 4,
        "--steps", 3, "--learning-rate", 1e-3, "--warmup-steps", 2, "--device", "cpu",
    ]  # fmt: skip
    subprocess.run([str(w) for w in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    path = tmp_path / "two" / whole.name
    assert read(path).training["processes"] == 2
    close(load_file(path), load_file(whole))
