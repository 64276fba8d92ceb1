"""A wider decoder draws the same at first, and its twins part in training."""

import pytest
import torch

from diffctrl.scripts import train_zoo_video, training_video_vae, training_widening
from diffctrl.scripts.training_video_forward import decode
from diffctrl.scripts.training_widening import widened
from diffctrl.zoo.video import VideoSize, video_vae


def _vae(width: int | None = None):
    torch.manual_seed(0)
    vae = video_vae(VideoSize(pixels=32, latent_channels=4, vae_width=4, decoder_width=width))
    for parameter in vae.parameters():  # norms and biases that do something
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return vae.eval()


@torch.no_grad()
@pytest.mark.parametrize("width", [4, 8, 12])
def test_a_wider_decoder_draws_the_same(width):
    vae = _vae()
    wide = widened(vae, width)
    assert wide.config.decoder_base_dim == width
    assert wide.decoder.conv_out.weight.shape[1] == width
    latents = torch.randn(1, 4, 3, 8, 8)
    torch.testing.assert_close(wide.decode(latents).sample, vae.decode(latents).sample, atol=1e-5, rtol=1e-5)
    for name in ("encoder", "quant_conv"):
        stock, own = (getattr(each, name).state_dict() for each in (vae, wide))
        assert all(torch.equal(stock[key], own[key]) for key in stock)


def test_a_wider_decoder_can_be_widened_again():
    vae = _vae(8)
    assert widened(vae, 16).decoder.conv_out.weight.shape[1] == 16
    for width in (4, 12):
        with pytest.raises(ValueError, match=f"of width 8 can be widened to a multiple of it; got {width}"):
            widened(vae, width)


@pytest.mark.parametrize("uneven", [training_widening._UNEVEN, 0.0])
def test_twins_are_trained_apart_as_they_are_weighed_unevenly(uneven, monkeypatch):
    monkeypatch.setattr(training_widening, "_UNEVEN", uneven)
    wide = widened(_vae(), 8).requires_grad_(True)
    decode(wide, torch.randn(1, 3, 4, 8, 8)).square().sum().backward()
    for layer in (wide.decoder.conv_in, wide.decoder.up_blocks[0].resnets[0].conv1):
        one, other = layer.weight.grad[::2], layer.weight.grad[1::2]
        apart = (one - other).norm() / one.norm()
        assert (apart > 0.1) == (uneven > 0)


def test_only_a_decoder_alone_is_widened(tmp_path):
    with pytest.raises(SystemExit, match="--decoder-width widens a trained decoder; give --decoder"):
        train_zoo_video.main(["vae", "--smoke", "--decoder-width", "16", "--out", str(tmp_path)])


def test_other_widths_are_refused_before_clips_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(training_video_vae, "load_video_vae", lambda _: _vae(8))
    monkeypatch.setattr(training_video_vae, "sample_clips", lambda *_, **__: pytest.fail("clips were drawn"))
    start = ["--decoder", "--start-from", str(tmp_path / "vae.safetensors"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="--decoder-width: a decoder of width 8 .* got 12"):
        train_zoo_video.main(["vae", "--smoke", *start, "--decoder-width", "12"])
