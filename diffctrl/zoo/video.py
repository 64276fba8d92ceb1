"""The architecture of the embedded video model `shapes-wan`, built from scratch with its start weights.

A causal autoencoder that turns 33 frames of 64 px into 17 x 16 x 16 x 8, a Wan transformer of 8 layers x 6
heads x 32 channels in which one latent frame is 64 tokens, and a UMT5 encoder.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .models import NOISE_SHIFT, image_scheduler
from .tokenizers import MAX_TOKENS, WordTokens, t5_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5EncoderModel

VIDEO_WEIGHT_NAMES = ("vae", "transformer", "text_encoder")
"""The pipeline's components that have weights, in a fixed order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSize:
    """The numbers that a smaller model for tests may change; `shapes-wan` trained with the defaults.

    Args:
        pixels: side of a frame, a multiple of 16.
        latent_channels: channels of the latent.
        vae_width: width of the autoencoder's outermost level; the two others have twice that.
        decoder_width: the same of its decoder; None for the same. That of `shapes-wan` is widened to 32 after
            the training.
        layers: transformer blocks.
        heads: attention heads of a block.
        head_dim: channels of a head, even.
        mlp: channels inside the feed-forward part.
        positions: largest number of latent frames, rows or columns.
        text_width: width of the text encoder.
        text_layers: layers of the text encoder.
    """

    pixels: int = 64
    latent_channels: int = 8
    vae_width: int = 16
    decoder_width: int | None = None
    layers: int = 8
    heads: int = 6
    head_dim: int = 32
    mlp: int = 576
    positions: int = 256
    text_width: int = 128
    text_layers: int = 2

    @property
    def latent_size(self) -> int:
        """Side of the latent, in latent pixels."""
        return self.pixels // 4


@dataclass(slots=True)
class VideoParts:
    """The trained components in float32; the names are the pipeline's."""

    vae: "AutoencoderKLWan"
    transformer: "WanTransformer3DModel"
    text_encoder: "UMT5EncoderModel"

    def items(self) -> list[tuple[str, nn.Module]]:
        """(name, module) in the order of `VIDEO_WEIGHT_NAMES`."""
        return [(name, getattr(self, name)) for name in VIDEO_WEIGHT_NAMES]


def latent_frames(frames: int) -> int:
    """Latent frames of a clip: the first frame alone, then one for every two."""
    return (frames - 1) // 2 + 1


def caption_ids(words: Tensor) -> Tensor:
    """Captions as token ids, as the tokenizer pads them.

    Args:
        words: (B, N) long word ids of `clips.WORDS`, -1 after the last word; N < 32.

    Returns:
        (B, 32) long.
    """
    return _word_tokens(str(words.device)).t5_ids(words)


@lru_cache(maxsize=4)
def _word_tokens(device: str) -> WordTokens:
    from .clips import WORDS

    return WordTokens.of(WORDS).to(device)


def video_vae(size: VideoSize | None = None) -> "AutoencoderKLWan":
    """The autoencoder with random weights; mean and deviation of its latents are set after training."""
    from diffusers import AutoencoderKLWan

    size = size or VideoSize()
    return AutoencoderKLWan(
        base_dim=size.vae_width,
        decoder_base_dim=size.decoder_width,
        z_dim=size.latent_channels,
        dim_mult=[1, 2, 2],  # pyright: ignore[reportArgumentType] - diffusers annotates a tuple of one
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * size.latent_channels,
        latents_std=[1.0] * size.latent_channels,
        # Declared, not derived from dim_mult and temperal_downsample.
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def video_transformer(size: VideoSize | None = None) -> "WanTransformer3DModel":
    """The transformer with its start weights: closed gates, zero output."""
    from diffusers import WanTransformer3DModel

    size = size or VideoSize()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        text_dim=size.text_width,
        freq_dim=128,
        ffn_dim=size.mlp,
        num_layers=size.layers,
        rope_max_seq_len=size.positions,
    )
    # diffusers leaves these random; a network that starts as identity trains faster. Without the time
    # projection the gates are the tables alone, so their gate rows start at zero too.
    closed: list[Any] = [transformer.proj_out, transformer.condition_embedder.time_proj]
    for block in transformer.blocks:
        closed.append(block.attn2.to_out[0])
        with torch.no_grad():
            block.scale_shift_table.zero_()
    for linear in closed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    with torch.no_grad():
        transformer.scale_shift_table.zero_()
    return transformer


def video_text_encoder(
    size: VideoSize | None = None, words: tuple[str, ...] | None = None
) -> "UMT5EncoderModel":
    """The text encoder, with random weights and a vocabulary sized to the tokenizer of `words`."""
    from transformers import UMT5Config, UMT5EncoderModel

    size = size or VideoSize()
    config = UMT5Config(
        vocab_size=-(-len(t5_tokenizer(words or video_words())) // 64) * 64,
        d_model=size.text_width,
        d_kv=size.text_width // 4,
        d_ff=2 * size.text_width,
        num_layers=size.text_layers,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def video_words() -> tuple[str, ...]:
    """The word list that the tokenizer of the shipped model is made of."""
    from .clips import WORDS

    return WORDS


def video_parts(size: VideoSize | None = None) -> VideoParts:
    """All trained components with start weights drawn from torch's default generator."""
    return VideoParts(
        vae=video_vae(size), transformer=video_transformer(size), text_encoder=video_text_encoder(size)
    )


def video_pipeline(parts: VideoParts, *, shift: float = NOISE_SHIFT) -> "WanPipeline":
    """Join components, tokenizer and scheduler into a stock pipeline; the modules are not copied."""
    from diffusers import WanPipeline

    trained: dict[str, Any] = dict(parts.items())
    tokenizer: Any = t5_tokenizer(video_words())
    return WanPipeline(**trained, tokenizer=tokenizer, scheduler=image_scheduler(shift))


VIDEO_TOKENS = MAX_TOKENS
"""Length that captions are padded to; pass it as `max_sequence_length`."""
