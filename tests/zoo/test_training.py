"""The training script of the image model: a stock forward pass, sound optimisers, resumable slices."""

import copy
import json

import pytest
import torch

from diffctrl.scripts import train_zoo_image
from diffctrl.scripts.evaluation_image import HELD_OUT, ONE, suites
from diffctrl.scripts.training_image_data import (
    OVERLAP_SHARE,
    SHAPES_SHARE,
    CaptionedBatches,
    LatentPool,
    rendered_chunks,
    sample_scenes,
)
from diffctrl.scripts.training_image_forward import TrainingForward, to_rows
from diffctrl.scripts.training_image_pack import assemble, disassemble, read_pack, write_pack
from diffctrl.scripts.training_image_probe import sample_images
from diffctrl.scripts.training_image_vae import SMOKE_SIZE, load_vae
from diffctrl.scripts.training_loop import Clock
from diffctrl.scripts.training_optimizer import (
    Optimizer,
    WeightAverage,
    learning_rate_at,
    orthogonalised,
)
from diffctrl.zoo import worlds
from diffctrl.zoo.models import ImageParts, ImageSize, image_parts, image_pipeline
from diffctrl.zoo.tokenizers import WordTokens
from diffctrl.zoo.worlds.vocabulary import IN_FRONT_OF

SMALL = ImageSize(
    latent_size=8, vae_channels=(8, 16), layers=2, heads=2, head_dim=16, positions=12, text_width=16
)
FACTS = {"smoke": True, "shift": 3.0, "scaling_factor": 0.5, "shift_factor": 0.1}


@pytest.fixture(scope="module")
def tokens():
    return WordTokens.of(worlds.WORDS)


@pytest.fixture(scope="module")
def parts():
    return _random_parts(SMALL)


def _random_parts(size: ImageSize) -> ImageParts:
    """Components in which nothing is zero, so that no path is hidden by a closed gate."""
    torch.manual_seed(0)
    parts = image_parts(size)
    for _, module in parts.items():
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return parts


def _batch(count: int, tokens: WordTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scenes = worlds.sample(count, seed=5)
    draw = torch.Generator().manual_seed(5)
    words = worlds.caption_words(scenes, torch.rand(count, worlds.CAPTION_UNIFORMS, generator=draw))
    words[0] = -1
    return words, tokens.clip_ids(words), tokens.t5_ids(words)


@torch.no_grad()
def test_text_equals_the_pipelines_encoding(parts, tokens):
    words, clip_ids, t5_ids = _batch(6, tokens)
    pipeline = image_pipeline(parts)
    expected, _, pooled, _ = pipeline.encode_prompt(
        worlds.to_text(words), None, None, max_sequence_length=32, do_classifier_free_guidance=False
    )
    context, own_pooled = TrainingForward(parts, compiled=False).encode_text(clip_ids, t5_ids)
    torch.testing.assert_close(context, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(own_pooled, pooled, atol=2e-5, rtol=1e-5)


def test_loss_and_gradients_equal_the_stock_forward(parts, tokens):
    _, clip_ids, t5_ids = _batch(3, tokens)
    torch.manual_seed(1)
    latents, noise, level = torch.randn(3, 8, 8, 8), torch.randn(3, 8, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    forward = TrainingForward(parts, compiled=False)
    forward.loss(to_rows(latents), clip_ids, t5_ids, to_rows(noise), level).backward()
    own = [value.grad.clone() for value in parts.transformer.parameters() if value.grad is not None]
    parts.transformer.zero_grad()
    context, pooled = forward.encode_text(clip_ids, t5_ids)
    mixed = torch.lerp(latents, noise, level[:, None, None, None])
    out = parts.transformer(mixed, context, pooled, level * 1000.0, return_dict=False)[0]
    (out - (noise - latents)).square().mean().backward()
    stock = [value.grad for value in parts.transformer.parameters() if value.grad is not None]
    assert len(own) == len(stock) > 50
    for mine, theirs in zip(own, stock, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_the_small_sampler_equals_the_pipeline(parts, tokens):
    words, clip_ids, t5_ids = _batch(3, tokens)
    images = sample_images(parts, clip_ids, t5_ids, tokens=tokens, shift=3.0, steps=4, seed=3)
    pipeline = image_pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn((3, 8, 8, 8), generator=torch.Generator().manual_seed(3))
    expected = pipeline(
        worlds.to_text(words),
        latents=latents,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=32,
        output_type="pt",
    ).images
    assert (images / 255.0 - expected).abs().max() < 2 / 255


def test_batches_point_at_their_scenes_and_drop_captions(tokens):
    scenes = sample_scenes(200, seed=4)
    batches = CaptionedBatches(scenes, tokens, batch=64, batches=5)
    torch.manual_seed(0)
    batches.refill()
    empty = 0
    background = torch.tensor([worlds.WORDS.index(name) for name in ("black", "white", "gray")])
    for _ in range(5):
        index, clip_ids, t5_ids = batches.next()
        assert index.shape == (64,)
        assert clip_ids.shape == t5_ids.shape == (64, 32)
        empty += int((t5_ids[:, 0] == 1).sum())
        assert torch.equal(t5_ids[:, 0] == 1, clip_ids[:, 1] == 1)
        for place, word in enumerate(background):  # these three words name nothing but a background
            named = (clip_ids == tokens.clip[word]).any(dim=1)
            assert (scenes.background[index[named]] == place).all()
    assert 12 < empty < 60


def test_scenes_do_not_depend_on_workers_and_hold_both_worlds():
    scenes = sample_scenes(50, seed=9)
    assert int(scenes.character.sum()) == 50 - round(50 * SHAPES_SHARE)
    images = torch.cat(list(rendered_chunks(scenes, device=torch.device("cpu"), size=16, chunk=7)))
    torch.testing.assert_close(images, worlds.render(scenes, size=16)[0])


def test_training_shows_more_overlapping_pairs_than_the_world_has():
    def overlapping(split):
        scenes = sample_scenes(400, seed=9, split=split)
        assert len(scenes) == 400
        return int((scenes.relation == IN_FRONT_OF).sum()) / int((~scenes.character).sum())

    assert overlapping("train") > OVERLAP_SHARE
    assert overlapping("test") < 0.15


def test_a_pool_is_reused_only_for_its_source(tmp_path):
    scenes = sample_scenes(6, seed=1)
    pool = LatentPool(torch.randn(6, 4, 8).half(), scenes, "one")
    pool.save(tmp_path / "pool.safetensors")
    again = LatentPool.load(tmp_path / "pool.safetensors", torch.device("cpu"), source="one")
    assert torch.equal(again.rows, pool.rows)
    assert torch.equal(again.scenes.colour, scenes.colour)
    assert LatentPool.load(tmp_path / "pool.safetensors", torch.device("cpu"), source="two") is None


@pytest.mark.parametrize("shape", [(3, 64, 48), (2, 128, 32), (2, 32, 128)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
    assert values.min() > 0.4
    assert values.max() < 1.3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_both_optimisers_fit_a_small_problem_and_restore(kind, parts):
    named = {f"m.{k}": v for k, v in copy.deepcopy(parts.transformer).named_parameters()}
    optimizer = Optimizer(named, kind=kind)
    assert all(group["lr"] is optimizer.learning_rate for group in optimizer.adamw.param_groups)
    optimizer.set_learning_rate(0.01)
    goal = {name: torch.randn_like(value) for name, value in named.items()}

    def distance() -> torch.Tensor:
        return sum((value - goal[name]).square().sum() for name, value in named.items())

    before = distance().item()
    for _ in range(12):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    assert distance().item() < 0.97 * before
    saved = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    assert len(saved) > 10
    other = Optimizer(named, kind=kind)
    for name, value in other.state_tensors().items():
        value.copy_(saved[name])


def test_muon_moves_every_matrix_by_its_learning_rate():
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    named = {"transformer_blocks.0.to_q.weight": weight, "bias": torch.nn.Parameter(torch.zeros(4))}
    optimizer = Optimizer(named, kind="muon", max_norm=1e9)
    optimizer.set_learning_rate(1e-2)
    weight.grad, named["bias"].grad = torch.randn(64, 32) * 1e-3, torch.ones(4)
    optimizer.step()
    size = weight.detach().square().mean().sqrt().item()
    assert 0.5 * 0.2e-2 < size < 2 * 0.2e-2  # the root mean square that AdamW's update tends to


def test_the_average_starts_at_once_and_then_slows():
    value, average = torch.zeros(3), torch.zeros(3)
    tracker = WeightAverage([value], [average])
    value.fill_(1.0)
    tracker.update()
    assert average[0].item() == pytest.approx(1 - 2 / 11)
    for _ in range(9500):
        tracker.update()
    value.zero_()
    tracker.update()
    assert average[0].item() == pytest.approx(0.999, abs=1e-4)


def test_learning_rate_schedule():
    rate = {f: learning_rate_at(f, 1000, peak=1e-3, warmup_steps=100) for f in (0.0, 0.6, 0.8, 1.0)}
    assert rate[0.0] == rate[0.6] == pytest.approx(1e-3)
    assert rate[0.8] == pytest.approx(0.5 * (1e-3 + 1e-5))
    assert rate[1.0] == pytest.approx(1e-5)
    assert learning_rate_at(0.0, 9, peak=1e-3, warmup_steps=100) == pytest.approx(1e-4)


def test_the_clock_counts_earlier_slices():
    clock = Clock(100.0, elapsed_seconds=60.0)
    assert clock.fraction == pytest.approx(0.6)
    clock.start()
    assert not clock.finished
    assert Clock(100.0, elapsed_seconds=100.0).finished


def test_a_pack_becomes_the_same_pipeline(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    parts = _random_parts(SMOKE_SIZE)
    write_pack(parts, tmp_path / "pack.safetensors", FACTS)
    read, facts = read_pack(tmp_path / "pack.safetensors")
    assert facts == FACTS
    assert read.vae.config.scaling_factor == 0.5
    figure = {"name": "one object: exact", "value": 95.0, "low": 91.0, "high": 98.0, "unit": "%", "bar": 92.0}
    assemble(tmp_path / "pack.safetensors", tmp_path / "model", metrics={"figures": [figure]})
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "model", dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    assert pipeline.scheduler.config.shift == 3.0
    for name, module in read.items():
        loaded = getattr(pipeline, name).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(loaded[key], value), (name, key)
    call = json.loads((tmp_path / "model" / "diffctrl.json").read_text())["call"]
    assert call == {
        "height": 32,
        "width": 32,
        "num_inference_steps": 28,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
    }
    card = (tmp_path / "model" / "README.md").read_text()
    assert "one object: exact | 95.0" in card
    assert len(json.loads((tmp_path / "model" / "metrics.json").read_text())["sha256"]) == 5


def test_a_pipeline_folder_becomes_the_pack_that_training_goes_on_from(tmp_path):
    stage = {"psnr_mean_db": 40.0, "psnr_5th_percentile_db": 36.0, "vae_steps": 7, "vae_minutes": 0.5}
    write_pack(_random_parts(SMOKE_SIZE), tmp_path / "pack.safetensors", FACTS | stage)
    assemble(tmp_path / "pack.safetensors", tmp_path / "model")
    disassemble(tmp_path / "model", tmp_path / "again")
    first, facts = read_pack(tmp_path / "pack.safetensors")
    second, same_facts = read_pack(tmp_path / "again" / "pack.safetensors")
    assert facts == same_facts
    autoencoder = load_vae(tmp_path / "again" / "vae.safetensors")
    assert autoencoder.config.scaling_factor == 0.5
    others = [*second.items(), ("vae", autoencoder)]
    for name, module in others:
        expected = getattr(first, name).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(expected[key], value), (name, key)


def test_a_pack_of_another_architecture_is_refused(parts, tmp_path):
    write_pack(parts, tmp_path / "pack.safetensors", FACTS)  # the facts claim the smoke size
    with pytest.raises((ValueError, RuntimeError)):
        read_pack(tmp_path / "pack.safetensors")


def test_evaluation_captions_are_fixed_and_of_their_kind():
    first, again = suites(8, 4, 4), suites(8, 4, 4)
    assert [suite.captions for suite in first] == [suite.captions for suite in again]
    by_name = {suite.name: suite for suite in first}
    assert (by_name[ONE].scenes.count == 1).all()
    for caption in by_name[HELD_OUT].captions:
        assert any(pattern in caption.split() for pattern in ("plain", "striped", "dotted"))
    assert len({seed for suite in first for seed in suite.seeds}) == sum(len(suite.seeds) for suite in first)


def test_smoke_run_lowers_the_loss_stops_and_continues(tmp_path, capsys):
    torch.set_num_threads(1)
    vae, state, pack = tmp_path / "vae", tmp_path / "state", tmp_path / "pack.safetensors"
    train_zoo_image.main(["vae", "--smoke", "--out", str(vae), "--minutes", "0.05", "--pool", "64"])
    command = [
        "sd3",
        "--smoke",
        "--vae",
        str(vae / "vae.safetensors"),
        "--state",
        str(state),
        "--pack",
        str(pack),
    ]
    command += ["--minutes", "0.25", "--pool", "64", "--keep-pool", "--warmup-steps", "5", "--chunk", "2"]
    # A slice that is over at once does its warm-up, one chunk and a save; the next call continues from it.
    train_zoo_image.main([*command, "--slice-seconds", "0"])
    assert "call again" in capsys.readouterr().out
    train_zoo_image.main([*command, "--slice-seconds", "1000000", "--check-captions", "8"])
    out = capsys.readouterr().out
    assert "encoded scenes loaded" in out
    assert "continuing at step 5" in out
    assert "last check: one exact" in out
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if "  loss " in line]
    assert losses
    # The start, zero output against unit noise and data, is near 2. A busy machine takes few steps.
    assert losses[-1] < 1.6
    assert "finished" in out
    read_pack(pack)
