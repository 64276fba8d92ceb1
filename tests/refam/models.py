"""Tiny, randomly initialised, real pipelines with text encoders, tokenizers and autoencoders, for
grounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from diffctrl.pipelines import (
    FluxRefAMPipeline,
    MochiRefAMPipeline,
    StableDiffusion3RefAMPipeline,
    WanRefAMPipeline,
)
from diffctrl.zoo import tokenizers, worlds
from tests import tiny
from tests.helpers import build


def _t5(kind: Any, config: Any, width: int) -> Any:
    settings = config(
        vocab_size=256, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return kind(settings).eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def sd3() -> Any:
    """At 32 px: 4 x 4 tokens; two blocks."""
    return _quiet(StableDiffusion3RefAMPipeline(**tiny.sd3_pipeline().components))


@cache
def flux() -> Any:
    """Two double and two single blocks; a latent pixel is two pixels, a token four."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2, norm_num_groups=4,
            scaling_factor=0.5, shift_factor=0.1, mid_block_add_attention=False,
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=2048, hidden_size=20, intermediate_size=20, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=32, projection_dim=20, bos_token_id=0,
                eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
        t5 = _t5(T5EncoderModel, T5Config, 24)
    pipe = FluxRefAMPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tokenizers.clip_tokenizer(worlds.WORDS),
        text_encoder_2=t5,
        tokenizer_2=tokenizers.t5_tokenizer(worlds.WORDS),
        transformer=build("flux"),
    )
    pipe.default_sample_size = 16
    return _quiet(pipe)


@cache
def wan() -> Any:
    """A latent frame is two frames, a token sixteen pixels... of a side; see `reader.multiple`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.0, 2.0, 0.5, 1.5],
            scale_factor_temporal=2, scale_factor_spatial=2,
        )  # fmt: skip
        text = _t5(UMT5EncoderModel, UMT5Config, 16)
    return _quiet(
        WanRefAMPipeline(
            tokenizer=tokenizers.t5_tokenizer(worlds.WORDS),
            text_encoder=text,
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=build("wan"),
        )
    )


@cache
def mochi() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=4,
            layers_per_block=(1, 1, 1, 1, 1), temporal_expansions=(1, 2, 3), spatial_expansions=(2, 2, 2),
            latents_mean=(0.0, 0.1, 0.2, 0.3), latents_std=(1.0, 1.0, 2.0, 0.5),
            add_attention_block=(False,) * 5,
        )  # fmt: skip
        text = _t5(T5EncoderModel, T5Config, 16)
    return _quiet(
        MochiRefAMPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=vae.eval(),
            text_encoder=text,
            tokenizer=tokenizers.t5_tokenizer(worlds.WORDS),
            transformer=build("mochi"),
        )
    )


PIPELINES = {"sd3": sd3, "flux": flux, "wan": wan, "mochi": mochi}
# (height, width) at which each tiny model reads, not square.
SIZES = {"sd3": (24, 40), "flux": (12, 20), "wan": (12, 20), "mochi": (48, 80)}


def picture(seed: int = 0, size: tuple[int, int] = (30, 50)) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))
