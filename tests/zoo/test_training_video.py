"""The training of the video model: whole-clip passes equal to the stock modules, resumable slices, packs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffctrl.scripts import evaluate_zoo_video, train_zoo_video, training_video_vae
from diffctrl.scripts.training_vae import vae_objective
from diffctrl.scripts.training_video_forward import VideoForward, decode, encode, to_rows
from diffctrl.scripts.training_video_pack import (
    assemble_video,
    disassemble_video,
    read_video_pack,
    write_video_pack,
)
from diffctrl.scripts.training_video_vae import VideoVaeOptions, near, rendered, round_trips
from diffctrl.zoo import clips, registry
from diffctrl.zoo.video import VideoSize, caption_ids, video_parts, video_pipeline, video_vae

SMALL = VideoSize(
    pixels=32, latent_channels=4, vae_width=4, layers=2, heads=2, head_dim=16, mlp=48, text_width=16
)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    parts = video_parts(SMALL)
    for _, module in parts.items():  # nothing is zero, so that no path is hidden by a closed gate
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        module.eval()
    return parts


def test_full_size_is_what_the_package_has_room_for():
    parts = video_parts(VideoSize(decoder_width=32))
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    assert 4.4e6 < counts["transformer"] < 4.7e6
    assert counts["vae"] < 1.8e6
    assert sum(counts.values()) * 2 <= 13.4e6
    shipped = json.loads((registry.path("shapes-wan") / "vae" / "config.json").read_text())
    assert shipped["decoder_base_dim"] == parts.vae.config.decoder_base_dim


@torch.no_grad()
def test_whole_clips_equal_the_stock_autoencoder(parts):
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    mean, log_variance = encode(parts.vae, video.transpose(1, 2))
    stock = parts.vae.encode(video).latent_dist
    torch.testing.assert_close(mean.transpose(1, 2), stock.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_variance.transpose(1, 2), stock.logvar, atol=1e-5, rtol=1e-4)
    latents = torch.randn(2, 4, 5, 8, 8)
    own = decode(parts.vae, latents.transpose(1, 2)).transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(own, parts.vae.decode(latents).sample, atol=1e-5, rtol=1e-4)


def _ids(count: int) -> tuple[torch.Tensor, list[str]]:
    scenes = clips.sample(count, seed=5)
    draw = torch.rand(count, clips.CAPTION_UNIFORMS, generator=torch.Generator().manual_seed(1))
    words = clips.caption_words(scenes, draw)
    words[0] = -1
    return caption_ids(words), clips.to_text(words)


@torch.no_grad()
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_excerpts_in_training_reach_as_far_as_a_frame_depends_on(way):
    """Trained on less, the autoencoder meets in whole clips what it has never seen: 19 dB, not 35."""
    torch.manual_seed(0)
    vae = video_vae(VideoSize())
    first = torch.randn(1, 45, 8, 2, 2) if way == "decode" else torch.randn(1, 89, 3, 8, 8)
    second = first.clone()
    second[:, 0] += 1
    with torch.no_grad():
        found = [decode(vae, x) if way == "decode" else encode(vae, x)[0] for x in (first, second)]
    changed = (found[0] != found[1]).flatten(2).any(2).nonzero()[:, 1]
    frames = int(changed.max()) * (1 if way == "decode" else 2)
    assert 30 < frames < VideoVaeOptions(out=Path()).frames


def test_text_equals_the_pipelines_encoding(parts):
    ids, captions = _ids(5)
    expected, _ = video_pipeline(parts).encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=32, device=torch.device("cpu")
    )
    torch.testing.assert_close(
        VideoForward(parts, compiled=False).encode_text(ids), expected, atol=2e-5, rtol=1e-4
    )


def test_loss_and_gradients_equal_the_stock_forward(parts):
    ids, _ = _ids(2)
    torch.manual_seed(1)
    latents, noise = torch.randn(2, 2, 4, 3, 8, 8)
    level = torch.tensor([0.2, 0.8])
    transformer, forward = parts.transformer, VideoForward(parts, compiled=False)
    forward.loss(to_rows(latents), ids, to_rows(noise), level).backward()
    own = [value.grad.clone() for value in transformer.parameters()]
    transformer.zero_grad()
    mixed = torch.lerp(latents, noise, level[:, None, None, None, None])
    out = transformer(mixed, level * 1000, forward.encode_text(ids), return_dict=False)[0]
    (out - (noise - latents)).square().mean().backward()
    for mine, value in zip(own, transformer.parameters(), strict=True):
        torch.testing.assert_close(mine, value.grad, atol=1e-5, rtol=1e-3)


def test_a_decoder_alone_is_trained_in_the_noise_that_it_is_given():
    mean, noise = torch.randn(2, 1, 3, 2, 4, 4)
    log_variance = torch.full_like(mean, 2.0)
    seen = []

    def decoded(latents):
        seen.append(latents)
        return torch.zeros(1, 3, 3, 8, 8)

    samples = torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8)
    deviation = torch.tensor([0.1, 0.3])[:, None, None]
    for given in (deviation, None):
        vae_objective(lambda _: (mean, log_variance), decoded, deviation=given)(samples, noise)
    torch.testing.assert_close(seen[0], mean + deviation * noise)
    torch.testing.assert_close(seen[1], mean + torch.tensor(1.0).exp() * noise)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_options_of_the_loss_reach_it(tmp_path, monkeypatch, decoder):
    vae = video_vae(training_video_vae.SMOKE_SIZE)
    vae.register_to_config(latents_std=[2.0] * 8)
    seen = {}
    monkeypatch.setattr(training_video_vae, "load_video_vae", lambda _: vae)
    monkeypatch.setattr(training_video_vae, "vae_objective", lambda *_, **options: seen.update(options))
    monkeypatch.setattr(training_video_vae, "run_vae_training", lambda *_: (1, 0.0))
    monkeypatch.setattr(training_video_vae, "_finish", lambda *_, **__: {})
    start = ["--decoder", "--start-from", str(tmp_path / "vae.safetensors")] if decoder else []
    train_zoo_video.main(["vae", "--smoke", "--out", str(tmp_path), "--pool", "2", "--emphasis", "7", *start])
    assert seen["emphasis"] == 7
    if decoder:
        torch.testing.assert_close(seen["deviation"].flatten(), torch.full((8,), 0.3))
    else:
        assert seen["deviation"] is None


def test_what_is_near_an_object_counts_more_in_every_term_but_the_latents():
    zero = torch.zeros(1, 3, 3, 2, 4, 4)
    samples = torch.full((1, 3, 4, 8, 8), 128, dtype=torch.uint8)
    samples[:, :, 3] = 0
    samples[:, :, 3, :, 4:] = 255  # the right half
    error = torch.zeros(1, 3, 3, 8, 8)

    def parts(pool, **options):
        target = pool[:, :, :3].float() / 127.5 - 1
        objective = vae_objective(lambda _: (zero[:, 0], zero[:, 1]), lambda _: target + error, **options)
        return objective(pool, zero[:, 2]).tolist()

    for columns, times in ((slice(1, 3), 1), (slice(5, 7), 11)):
        error.zero_()[..., columns] = 0.5
        plain, counted = parts(samples[:, :, :3]), parts(samples)
        assert plain == pytest.approx([0.125, 0.0625, 2 * 0.5 / 7, 0.0])
        assert counted == pytest.approx([times * value for value in plain])
        more = parts(samples, emphasis=30.0)
        assert more == pytest.approx([(3 * times - 2) * value for value in plain])
    error.zero_()[..., 3, :] = 0.5  # an edge across: half of its length counts more
    assert parts(samples)[2] == pytest.approx(6 * parts(samples[:, :, :3])[2])


def test_near_an_object_is_two_pixels_around_what_can_be_seen_of_it():
    scenes = clips.sample(3, seed=3, forms=("wall",))
    ((images, cover),) = rendered(scenes, device=torch.device("cpu"), size=64)
    frames, masks = clips.render(scenes, 64)
    assert torch.equal(images, frames)
    torch.testing.assert_close(cover[:, :, 0], masks.sum(2).clamp(0, 1))
    assert (cover.flatten(2).amax(2) == 0).any()  # behind the wall there is nothing to see
    one = torch.zeros(1, 2, 1, 9, 9)
    one[0, 1, 0, 4, 2] = 0.5
    wanted = torch.zeros_like(one)
    wanted[0, 1, 0, 2:7, 0:5] = 0.5
    assert torch.equal(near(one), wanted)


def test_excerpts_carry_what_is_near_an_object(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training_video_vae, "run_vae_training", lambda _, pool, *rest: seen.append(pool) or (1, 0.0)
    )
    train_zoo_video.main(["vae", "--smoke", "--out", str(tmp_path), "--pool", "4"])
    (pool,) = seen
    scenes = training_video_vae.sample_clips(4, seed=1, frames=129)
    starts = torch.randint(129 - 17 + 1, (4,), generator=torch.Generator().manual_seed(0))
    ((images, cover),) = rendered(scenes, device=torch.device("cpu"), size=32, starts=starts, length=17)
    wanted = torch.cat([images, near(cover)], 2)
    torch.testing.assert_close(pool / 255, wanted, atol=0.5 / 255 + 1e-6, rtol=0)
    assert pool[:, :, 3].max() == 255


@torch.no_grad()
def test_round_trips_are_measured_where_the_objects_are():
    scenes = clips.sample(2, seed=3)
    images, masks = clips.render(scenes, 64)
    cover = masks.sum(2, keepdim=True).clamp(0, 1)
    wrong = (near(cover) > 0) & (images < 0.8)
    back = images + 0.1 * wrong
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_video_vae, "encode", lambda _, x: (x[:, :, :1], None))
        patch.setattr(training_video_vae, "decode", lambda *_: back * 2 - 1)
        trip = round_trips(None, iter([(images, cover)]))
    assert torch.equal(trip.decoded, back)
    for row in range(2):
        error = (wrong[row] * 0.01).mean(1, keepdim=True)
        at = near(cover)[row]
        assert trip.decibels[row].item() == pytest.approx(-10 * error.mean().log10().item(), rel=1e-4)
        local = (error * at).sum() / at.sum()
        assert trip.at_objects[row].item() == pytest.approx(-10 * local.log10().item(), rel=1e-4)


def test_hidden_matrices_of_wan_go_to_muon(parts):
    from diffctrl.scripts.training_optimizer import Optimizer

    named = {f"transformer.{name}": value for name, value in parts.transformer.named_parameters()}
    muon = Optimizer(named, kind="muon").muon
    assert muon is not None
    assert sum(len(group) for group in muon.groups.values()) == SMALL.layers * 10


def test_smoke_run_stops_continues_and_becomes_a_pipeline(tmp_path, capsys):
    from diffusers import WanPipeline

    torch.set_num_threads(1)
    vae, pack = tmp_path / "vae", tmp_path / "pack.safetensors"
    train_zoo_video.main(["vae", "--smoke", "--out", str(vae), "--minutes", "0.02", "--pool", "16"])
    first, second = vae / "vae.safetensors", tmp_path / "second"
    options = ["--minutes", "0.001", "--pool", "2", "--seed", "9", "--start-from", str(first)]
    train_zoo_video.main(["vae", "--smoke", "--out", str(second), *options])
    assert json.loads((second / "vae.json").read_text())["started_from"]["frames"] == 17
    moved = [  # a moment's training: from other random weights they would be far away
        (value.float() - load_file(first)[name].float()).abs().max().item()
        for name, value in load_file(second / "vae.safetensors").items()
    ]
    assert 0 < max(moved) < 0.02
    command = ["wan", "--smoke", "--vae", str(second / "vae.safetensors"), "--state", str(tmp_path / "state")]
    command += [
        "--pack",
        str(pack),
        "--minutes",
        "0.05",
        "--pool",
        "16",
        "--keep-pool",
        "--check-captions",
        "1",
    ]
    train_zoo_video.main([*command, "--slice-seconds", "0"])
    assert "call again" in capsys.readouterr().out
    train_zoo_video.main([*command, "--slice-seconds", "100000"])
    out = capsys.readouterr().out
    assert "encoded clips loaded" in out
    assert "continuing at step" in out
    assert "last check: background" in out
    assert "finished" in out
    figures = evaluate_zoo_video.main(
        ["--pack", str(pack), "--n", "0", "--walls", "1", "--steps", "1", "--frames", "17", "--cpu"]
    )["figures"]
    (bar,) = [row["bar"] for row in figures if row["name"] == "behind the wall: reappears"]
    assert bar is None  # 17 frames are not the length that the gate is for
    assemble_video(pack, tmp_path / "model", metrics={"figures": figures})
    pipeline = WanPipeline.from_pretrained(
        tmp_path / "model", dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    read, facts = read_video_pack(pack)
    assert list(pipeline.vae.config.latents_std) == facts["latents_std"]
    for name, module in read.items():
        loaded = getattr(pipeline, name).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items()), name
    disassemble_video(tmp_path / "model", tmp_path / "again")
    again, _ = read_video_pack(tmp_path / "again" / "pack.safetensors")
    stages = [json.loads((folder / "vae.json").read_text()) for folder in (second, tmp_path / "again")]
    assert stages[0]["started_from"] == stages[1]["started_from"] == facts["vae_started_from"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Before it, newest first: {stages[0]['started_from']['steps']} steps" in card
    for (_, first), (_, second) in zip(read.items(), again.items(), strict=True):
        assert all(map(torch.equal, first.parameters(), second.parameters()))
    _redecoded(tmp_path, again, vae)
    _redecoded(tmp_path, again, vae, "--decoder-width", "16")
    write_video_pack(video_parts(SMALL), pack, facts)
    with pytest.raises((ValueError, RuntimeError)):
        read_video_pack(pack)


def _redecoded(tmp_path, before, other, *wider):
    """A decoder trained alone, as wide as it was or wider, comes into the pack, and nothing else does."""
    parts, out = tmp_path / "again", tmp_path / "redecoded.safetensors"
    options = ["--minutes", "0.001", "--pool", "2", "--out", str(tmp_path / "decoder")]
    with pytest.raises(SystemExit, match="--start-from FILE"):
        train_zoo_video.main(["vae", "--smoke", "--decoder", *options])
    start = ["--decoder", "--start-from", str(parts / "vae.safetensors"), *wider]
    train_zoo_video.main(["vae", "--smoke", *start, *options])
    command = ["redecode", "--pack", str(parts / "pack.safetensors"), "--out", str(out), "--vae"]
    train_zoo_video.main([*command, str(tmp_path / "decoder" / "vae.safetensors")])
    after, facts = read_video_pack(out)
    assert facts["decoder"]["device"] == "cpu"
    assert facts["decoder_width"] == after.vae.config.decoder_base_dim == (16 if wider else None)
    moved = {
        name.split(".")[0]
        for name, value in after.vae.state_dict().items()
        if not torch.equal(value, before.vae.state_dict()[name])
    }
    assert moved == {"decoder", "post_quant_conv"}
    for name in ("transformer", "text_encoder"):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
    with pytest.raises(SystemExit, match="another encoder"):
        train_zoo_video.main([*command, str(other / "vae.safetensors")])
