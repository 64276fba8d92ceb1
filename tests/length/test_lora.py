"""The file of a length LoRA, and the pipelines that run it: with its mask, beside others, merged."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffctrl
from diffctrl.errors import BadRequestError
from diffctrl.length import MASK_FIELDS, at_work, read, tuned
from diffctrl.pipelines import HunyuanVideoRadialPipeline, WanRadialPipeline
from diffctrl.pipelines.length import LengthLoRAMixin, adapted, base_of, load_length_lora, unload_length_lora
from diffctrl.processors import RadialAttnProcessor, RadialConfig
from tests.length.models import MASK, latents, lora_file, wan

torch.set_num_threads(1)

# The mask alone leaves the first step dense: 0.04 of three steps, rounded up.
RUN: dict[str, Any] = {"dense_steps": 0, "dense_last_steps": 0}


@pytest.fixture(scope="module")
def stock() -> Any:
    return wan()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, stock: Any) -> Path:
    return lora_file(tmp_path_factory.mktemp("loras") / "length.safetensors", stock)


@pytest.fixture(scope="module")
def dense_file(tmp_path_factory: pytest.TempPathFactory, stock: Any) -> Path:
    return lora_file(tmp_path_factory.mktemp("loras") / "dense.safetensors", stock, method="dense")


def ready(pipe: Any | None = None) -> Any:
    made = WanRadialPipeline(**(pipe or wan()).components)
    made.set_progress_bar_config(disable=True)
    return made


# --- the file -----------------------------------------------------------------------------------------------


def test_what_it_was_trained_with_comes_back(file: Path, stock: Any) -> None:
    lora = read(file)
    assert (lora.method, lora.rank, lora.lora_alpha, lora.latent_frames) == ("radial", 4, 8.0, (9, 9))
    assert lora.mask == MASK
    own = base_of(stock.transformer, "tiny-wan")
    assert lora.base.differences(own.class_name, own.config) == []
    assert lora.base.likeness(own.sample) == pytest.approx(1.0)
    assert "17 frames on tiny-wan" in lora.summary()


def test_diffusers_alone_loads_it_with_the_right_alpha(file: Path, stock: Any) -> None:
    plain, ours = WanPipeline(**wan().components), ready()
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(file.parent), weight_name=file.name)
    ours.load_length_lora(file, mask=False)
    found = latents(plain)
    assert torch.equal(found, latents(ours, dense_fraction=1.0))
    assert (found - latents(stock)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 1"),
        ({"rank": "8"}, "not numbers"),
        ({"rank": 0}, "must be positive"),
        ({"method": "magic"}, "no way of training"),
        ({"radial": None}, "no way of training"),
        ({"radial": {"block": 16}}, "does not settle"),
        ({"latent_frames": [9, 3]}, "no range"),
        ({"frames": 17}, "nothing usable"),
        ({"more": 1}, "unknown"),
        ({"base": {"name": "x"}}, "missing or unknown"),
    ],
)
def test_metadata_of_others_is_checked(file: Path, tmp_path: Path, change: Any, says: str) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    own = json.loads(metadata["diffctrl_length_lora"])
    metadata["diffctrl_length_lora"] = json.dumps({**own, **change})
    save_file(load_file(file), tmp_path / "a.safetensors", metadata)
    with pytest.raises(BadRequestError, match=says):
        read(tmp_path / "a.safetensors")


def test_files_that_are_no_length_lora(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="no file"):
        read(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(BadRequestError, match="not a safetensors file"):
        read(tmp_path / "text.safetensors")
    save_file(load_file(file), tmp_path / "plain.safetensors")
    with pytest.raises(BadRequestError, match="does not say which mask"):
        read(tmp_path / "plain.safetensors")
    with pytest.raises(BadRequestError, match="no embedded one .length-4x. and no file"):
        ready().load_length_lora("length-5x")


def test_a_training_that_diverged_is_not_written(tmp_path: Path, stock: Any) -> None:
    with pytest.raises(ValueError, match="not finite in float16"):
        lora_file(tmp_path / "a.safetensors", stock, std=1e6)
    assert list(tmp_path.iterdir()) == []


# --- mask and weights together ------------------------------------------------------------------------------


def test_the_mask_comes_with_the_lora(file: Path) -> None:
    pipe = ready()
    pipe.load_length_lora(file, **RUN)
    found = latents(pipe)
    (stats,) = pipe.control.stats().values()
    assert stats["masked_forwards"] == 3
    by_hand = wan()
    by_hand.load_lora_weights(str(file.parent), weight_name=file.name)
    with diffctrl.apply(by_hand, RadialAttnProcessor(MASK, **RUN)):
        wanted = latents(by_hand)
    assert torch.equal(found, wanted)
    with diffctrl.apply(by_hand, RadialAttnProcessor(dense_fraction=1.0)):
        assert not torch.equal(latents(by_hand), wanted)


def test_a_stock_pipeline_gets_a_handle(file: Path) -> None:
    pipe, other = wan(), ready()
    other.load_length_lora(file, **RUN)
    with load_length_lora(pipe, file, **RUN):
        assert torch.equal(latents(pipe), latents(other))
    unload_length_lora(pipe)
    assert torch.equal(latents(pipe), latents(wan()))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_open_settings_are_the_loras_and_others_contradict(data: st.DataObject) -> None:
    trained = {name: getattr(MASK, name) for name in MASK_FIELDS}
    defaults = {field.name: field.default for field in fields(RadialConfig)}
    other = {"decay_factor": 0.5, "sink": False, "adjacent": "half", "width_base": "S", "block": 32,
             "dense_blocks": 1, "block_rule": "cover"}  # fmt: skip
    chosen = data.draw(
        st.dictionaries(st.sampled_from(sorted(other)), st.sampled_from(["open", "same", "other"]))
    )
    values = {"open": defaults, "same": trained, "other": other}
    given_ = {name: values[how][name] for name, how in chosen.items()}
    named = data.draw(st.booleans())
    dense = data.draw(st.sampled_from([{}, {"dense_steps": 3}, {"dense_fraction": 0.5}]))
    trained["dense_fraction"] = 0.24
    config, against = tuned(RadialConfig(**given_, **dense), trained, given_ if named else ())
    wrong = {name for name, how in chosen.items() if how == "other" and other[name] != trained[name]}
    if named:  # a default that was asked for is no open setting
        wrong |= {n for n, how in chosen.items() if how == "open" and defaults[n] != trained[n]}
    assert {text.split("=")[0] for text in against} == wrong
    # Dense steps are the user's: another number contradicts nothing.
    wanted = dense or {"dense_fraction": 0.24}
    assert (config.dense_steps, config.dense_fraction) == (
        wanted.get("dense_steps"),
        wanted.get("dense_fraction"),
    )
    for name in MASK_FIELDS:
        assert getattr(config, name) == (given_[name] if name in wrong else trained[name])


def test_a_mask_of_other_settings_is_refused_or_warned_of(file: Path, caplog: Any) -> None:
    pipe = ready()
    with pytest.raises(ValueError, match=r"decay_factor=0.5 \(trained with 1.0\); leave these settings out"):
        pipe.load_length_lora(file, decay_factor=0.5)
    assert at_work(pipe.transformer.blocks[0].attn1) is None  # nothing is left half done
    pipe.load_length_lora(file)
    with pytest.raises(ValueError, match="sink=False"):
        latents(pipe, sink=False)
    pipe.unload_length_lora()
    pipe.set_attn_processor(RadialAttnProcessor(block=32, dense_blocks=1))
    with pytest.raises(ValueError, match="block=32"):  # a mask that was on before
        pipe.load_length_lora(file, mask=False)
    pipe.set_attn_processor(None)
    with caplog.at_level(logging.WARNING, logger="diffctrl"):
        pipe.load_length_lora(file, strict=False, decay_factor=0.5)
    assert "decay_factor=0.5" in caplog.text


@pytest.mark.parametrize("setting", [{"block": 128}, {"adjacent": "full"}])
def test_a_default_that_is_asked_for_is_another_mask_too(file: Path, caplog: Any, setting: Any) -> None:
    """The LoRA's mask has blocks of 16 and sparse neighbours; only what is left out is taken from it."""
    pipe = ready()
    with pytest.raises(ValueError, match="leave these settings out"):
        pipe.load_length_lora(file, **setting)
    pipe.load_length_lora(file)
    with pytest.raises(ValueError, match="leave these settings out"):
        latents(pipe, **setting)
    pipe.unload_length_lora()
    pipe.set_attn_processor(RadialAttnProcessor(**setting))
    with pytest.raises(ValueError, match="leave these settings out"):
        pipe.load_length_lora(file, dense_steps=1)  # what was on is not forgotten
    pipe.set_attn_processor(None)
    with caplog.at_level(logging.WARNING, logger="diffctrl"):
        pipe.load_length_lora(file, strict=False, **setting)
    ((name, value),) = setting.items()
    assert f"{name}={value!r}" in caplog.text
    sites = adapted(pipe.transformer)
    pattern, _, _ = pipe.control.controls[0]._settled(sites, 9, 1)
    assert getattr(pattern, name) == value


def test_none_leaves_a_setting_to_the_lora(file: Path) -> None:
    pipe, other = ready(), ready()
    pipe.load_length_lora(file, block_rule=None, decay_factor=None, dense_steps=None, dense_last_steps=0)
    other.load_length_lora(file, dense_last_steps=0)
    assert torch.equal(latents(pipe), latents(other))


def test_a_call_says_its_dense_steps_in_its_own_way(file: Path) -> None:
    pipe, stock = ready(), wan()
    pipe.set_attn_processor(RadialAttnProcessor(dense_steps=2, block=16))
    assert torch.equal(latents(pipe, dense_fraction=1.0), latents(stock))
    assert pipe.control.controls[0].config.dense_steps == 2
    pipe.load_length_lora(file, dense_last_steps=0)
    config = pipe.control.controls[0].config
    assert (config.dense_steps, config.dense_last_steps) == (2, 0)  # what was on is kept


def test_a_dense_lora_has_no_mask(dense_file: Path) -> None:
    pipe = ready()
    pipe.load_length_lora(dense_file)
    assert pipe.control is None
    with pytest.raises(ValueError, match="trained with dense attention, and this mask is sparse"):
        latents(pipe, decay_factor=0.5)
    assert torch.isfinite(latents(pipe, dense_fraction=1.0)).all()
    with pytest.raises(BadRequestError, match="change a mask, and none is put on"):
        ready().load_length_lora(dense_file, decay_factor=1.0)


def test_one_without_the_other_is_said_once(file: Path, caplog: Any) -> None:
    pipe = wan()
    load_length_lora(pipe, file, mask=False)
    with caplog.at_level(logging.WARNING, logger="diffctrl"):
        latents(pipe)
        latents(pipe)
        assert caplog.text.count("runs without the mask") == 1
        with diffctrl.apply(pipe, RadialAttnProcessor(**RUN)):
            latents(pipe)
            assert caplog.text.count("without the mask") == 1
            latents(pipe, frames=9)
            assert "was trained on clips of 9 latent frames, and this one has 5" in caplog.text
        pipe.disable_lora()
        caplog.clear()
        latents(pipe)
        assert caplog.text == ""


def test_a_mask_without_a_lora_beyond_the_models_length_is_said(caplog: Any) -> None:
    pipe = ready()
    with caplog.at_level(logging.WARNING, logger="diffctrl"):
        latents(pipe, frames=65, **RUN, block=16, dense_blocks=2)
    assert "without a LoRA for this length" in caplog.text


def test_another_model_is_refused(file: Path, caplog: Any) -> None:
    pipe = ready(wan(seed=1))
    with pytest.raises(BadRequestError, match=r"other weights than these, those of tiny-wan \(likeness"):
        pipe.load_length_lora(file)
    with caplog.at_level(logging.WARNING, logger="diffctrl"):
        pipe.load_length_lora(file, strict=False)
    assert "other weights" in caplog.text
    wide = wan()
    wide.transformer.register_to_config(num_layers=4)
    with pytest.raises(BadRequestError, match=r"num_layers=4 \(trained on 3\); it was trained on tiny-wan"):
        ready(wide).load_length_lora(file)


def test_a_second_length_lora_is_refused(file: Path) -> None:
    pipe = ready()
    pipe.load_length_lora(file)
    with pytest.raises(ValueError, match="has the length LoRA 'length'"):
        pipe.load_length_lora(file, adapter_name="other")
    pipe.unload_length_lora()
    with pytest.raises(ValueError, match="has no length LoRA"):
        pipe.unload_length_lora()


def test_an_estimate_is_of_the_loras_mask(file: Path) -> None:
    pipe = ready()
    size = {"height": 32, "width": 32, "frames": 65, "steps": 50}
    before = RadialAttnProcessor().estimate(pipe, **size)
    pipe.load_length_lora(file)
    found = RadialAttnProcessor().estimate(pipe, **size)
    pipe.unload_length_lora()
    wanted = RadialAttnProcessor(MASK, dense_fraction=0.04).estimate(ready(), **size)
    assert (found.density, found.dense_share) == (wanted.density, wanted.dense_share)
    assert found.density < before.density


# --- beside a style, merged ---------------------------------------------------------------------------------


def style(pipe: Any, path: Path) -> dict[str, torch.Tensor]:
    """A LoRA as others write it, on cross-attention and one of the length LoRA's own layers."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for name in ("blocks.0.attn2.to_q", "blocks.2.attn1.to_v"):
        layer = pipe.transformer.get_submodule(name)
        for end, size in (("lora_A", (2, layer.in_features)), ("lora_B", (layer.out_features, 2))):
            weights[f"transformer.{name}.{end}.weight"] = torch.randn(size, generator=generator) * 0.3
    save_file(weights, path)
    return weights


def deltas(pipe: Any, weights: dict[str, torch.Tensor], scale: float) -> None:
    """Add updates to plain weights."""
    for name, down in weights.items():
        if name.endswith("lora_A.weight"):
            up = weights[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            pipe.transformer.get_submodule(path).weight.data += scale * (up.float() @ down.float())


@pytest.mark.parametrize("first", ["length", "style"])
def test_with_a_style_it_is_the_sum_of_both(file: Path, tmp_path: Path, first: str) -> None:
    pipe, summed = ready(), wan()
    weights = style(pipe, tmp_path / "style.safetensors")
    for which in sorted(("length", "style"), key=lambda name: name != first):
        if which == "length":
            pipe.load_length_lora(file, **RUN)
        else:
            pipe.load_lora_weights(str(tmp_path), weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters(["length", "style"])
    deltas(summed, load_file(file), 2.0)  # alpha / rank, once
    deltas(summed, weights, 1.0)
    with diffctrl.apply(summed, RadialAttnProcessor(MASK, **RUN)):
        torch.testing.assert_close(latents(pipe), latents(summed), rtol=0, atol=1e-4)
    assert at_work(pipe.transformer.blocks[0].attn1) is not None


def test_loading_keeps_a_style_active_and_its_strength(file: Path, tmp_path: Path) -> None:
    pipe = ready()
    style(pipe, tmp_path / "style.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters(["style"], [0.3])
    pipe.load_length_lora(file)
    layer = pipe.transformer.blocks[2].attn1.to_v
    assert set(layer.active_adapters) == {"style", "length"}
    assert layer.scaling == pytest.approx({"style": 0.3, "length": 2.0})


def test_merged_is_unmerged(file: Path) -> None:
    pipe = ready()
    pipe.load_length_lora(file, **RUN)
    before = latents(pipe)
    pipe.fuse_lora()
    assert at_work(pipe.transformer.blocks[0].attn1) is not None  # the mask stays the LoRA's
    torch.testing.assert_close(latents(pipe), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    with pytest.raises(ValueError, match="is fused"):
        pipe.unload_length_lora()
    pipe.unfuse_lora()
    pipe.unload_length_lora()
    pipe.set_attn_processor(None)
    torch.testing.assert_close(latents(pipe, dense_fraction=1.0), latents(wan()), rtol=0, atol=1e-4)


def test_ready_pipelines_have_the_method() -> None:
    for kind in (WanRadialPipeline, HunyuanVideoRadialPipeline):
        assert issubclass(kind, LengthLoRAMixin)


# --- the one in the package ---------------------------------------------------------------------------------


@torch.no_grad()
def test_the_embedded_lora_fits_its_model_and_denoises_long_clips_better(caplog: Any) -> None:
    from diffctrl.zoo import clips, registry

    pipe, call = registry.load("shapes-wan"), registry.recommended("shapes-wan")
    scenes = clips.sample(1, seed=31, split="test", frames=129)
    (caption,) = clips.to_text(clips.caption_words(scenes, torch.full((1, clips.CAPTION_UNIFORMS), 0.5)))
    vae, transformer = pipe.vae, pipe.transformer
    video = clips.render(scenes, call["height"])[0].transpose(1, 2) * 2 - 1
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    clean = (vae.encode(video).latent_dist.mode() - mean) / std
    assert clean.shape[2] == 65
    text, _ = pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, max_sequence_length=call["max_sequence_length"]
    )
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def losses() -> torch.Tensor:
        found = []
        for sigma in (0.8, 0.95):  # where a clip is laid out
            mixed = torch.lerp(clean, noise, sigma)
            out = transformer(mixed, torch.tensor([1000.0 * sigma]), text, return_dict=False)[0]
            found.append((out - (noise - clean)).square().mean())
        return torch.stack(found)

    dense = losses()
    with load_length_lora(pipe, "length-4x", dense_steps=0, dense_last_steps=0) as control:
        adapted = losses()
        (stats,) = control.stats().values()
        pipe.set_adapters(["length"], [0.0])
        masked = losses()
    assert stats["sparse_density"] < 0.5
    assert bool((adapted < 0.97 * dense).all()), (adapted, dense, masked)
    assert bool((adapted < 0.97 * masked).all()), (adapted, dense, masked)
    assert not [record for record in caplog.records if "trained on" in record.getMessage()]
