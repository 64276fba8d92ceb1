"""The architecture of the embedded image model `shapes-sd3`, built from scratch with its start weights.

A variational autoencoder that turns 128 px into 32 x 32 x 8, an SD3 transformer of 8 layers x 4 heads x 32
channels, two CLIP text encoders and one T5 encoder, all tiny. `image_parts` builds them, `image_pipeline`
joins them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .tokenizers import MAX_TOKENS, clip_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

WEIGHT_NAMES = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The pipeline's components that have weights, in a fixed order."""

NOISE_SHIFT = 3.0
"""How far training and sampling lean to high noise, where the layout of a picture is decided."""

_LONGEST_PERIOD_RADIANS = math.pi / 64
_SHORTEST_PERIOD_RADIANS = math.pi / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSize:
    """The numbers that a smaller model for tests may change; the defaults are the shipped model's.

    Args:
        latent_size: side of the latent, in latent pixels.
        latent_channels: channels of the latent.
        vae_channels: width of the autoencoder at each level; each level but the first halves the side.
        layers: transformer blocks.
        heads: attention heads of a block.
        head_dim: channels of a head; at least 16, a multiple of 4.
        positions: side of the position table, in patches.
        text_width: width of a CLIP encoder; the T5 encoder and the joint attention are twice as wide.
        text_layers: layers of each text encoder.
    """

    latent_size: int = 32
    latent_channels: int = 8
    vae_channels: tuple[int, ...] = (32, 64, 96)
    layers: int = 8
    heads: int = 4
    head_dim: int = 32
    positions: int = 32
    text_width: int = 64
    text_layers: int = 2

    @property
    def width(self) -> int:
        """Channels of a transformer token."""
        return self.heads * self.head_dim


@dataclass(slots=True)
class ImageParts:
    """The trained components in float32; the names are the pipeline's."""

    vae: "AutoencoderKL"
    transformer: "SD3Transformer2DModel"
    text_encoder: "CLIPTextModelWithProjection"
    text_encoder_2: "CLIPTextModelWithProjection"
    text_encoder_3: "T5EncoderModel"

    def items(self) -> list[tuple[str, nn.Module]]:
        """(name, module) in the order of `WEIGHT_NAMES`."""
        return [(name, getattr(self, name)) for name in WEIGHT_NAMES]


def world_words() -> tuple[str, ...]:
    """The word list that the tokenizers of the shipped model are made of."""
    from . import worlds

    return worlds.WORDS


def position_table(positions: int, width: int) -> torch.Tensor:
    """Sine-cosine table of 2-D patch positions, frequencies from pi/2 down to pi/64 per patch.

    The stock table spreads frequencies for grids of thousands and moves by half a step here, so that
    neighbouring patches look alike. Half of the channels hold the row, half the column; of each half one
    half sine, one cosine. The origin is the middle of the table: diffusers crops centrally, so every image
    size has its middle at zero.

    Args:
        positions: patches along each side of the table.
        width: channels, a multiple of 4.

    Returns:
        (1, positions * positions, width) float32, row-major; the layout of `PatchEmbed.pos_embed`.
    """
    steps = width // 4
    ladder = torch.linspace(
        math.log(_SHORTEST_PERIOD_RADIANS), math.log(_LONGEST_PERIOD_RADIANS), steps
    ).exp()
    place = torch.arange(positions, dtype=torch.float32) - positions // 2
    angle = place[:, None] * ladder
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (positions, width / 2)
    rows = axis[:, None].expand(positions, positions, -1)
    columns = axis[None].expand(positions, positions, -1)
    return torch.cat([rows, columns], dim=2).reshape(1, positions * positions, width)


def image_vae(size: ImageSize | None = None) -> "AutoencoderKL":
    """The autoencoder with random weights; its scaling and shift are set after training."""
    from diffusers import AutoencoderKL

    size = size or ImageSize()
    levels = len(size.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        # diffusers annotates tuples of one.
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=size.vae_channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=size.latent_channels,
        norm_num_groups=8,
        sample_size=size.latent_size * 2 ** (levels - 1),
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def image_transformer(size: ImageSize | None = None) -> "SD3Transformer2DModel":
    """The transformer with its start weights: re-spaced positions, closed gates, zero output."""
    from diffusers import SD3Transformer2DModel

    size = size or ImageSize()
    transformer = SD3Transformer2DModel(
        sample_size=size.latent_size,
        patch_size=2,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=2 * size.text_width,
        caption_projection_dim=size.width,
        pooled_projection_dim=2 * size.text_width,
        pos_embed_max_size=size.positions,
        qk_norm="rms_norm",
    )
    transformer.pos_embed.get_buffer("pos_embed").copy_(position_table(size.positions, size.width))
    closed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        closed += [block.norm1.linear, block.norm1_context.linear]
    for linear in closed:  # diffusers leaves them random; a block that starts as identity trains faster
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def image_text_encoders(
    size: ImageSize | None = None, words: tuple[str, ...] | None = None
) -> "tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]":
    """The three text encoders, with random weights and vocabularies sized to the tokenizers of `words`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    size = size or ImageSize()
    words = words or world_words()
    clip_config = CLIPTextConfig(
        vocab_size=_room(len(clip_tokenizer(words)), 128),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=size.text_width,
        bos_token_id=0,
        eos_token_id=1,  # 2 would select a legacy pooling that takes the highest id
        pad_token_id=1,
        hidden_act="gelu",
    )
    t5_config = T5Config(
        vocab_size=_room(len(t5_tokenizer(words)), 64),
        d_model=2 * size.text_width,
        d_kv=size.text_width // 2,
        d_ff=4 * size.text_width,
        num_layers=size.text_layers,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return (
        CLIPTextModelWithProjection(clip_config),
        CLIPTextModelWithProjection(clip_config),
        T5EncoderModel(t5_config),
    )


def image_parts(size: ImageSize | None = None, words: tuple[str, ...] | None = None) -> ImageParts:
    """All trained components with start weights drawn from torch's default generator."""
    clip_1, clip_2, t5 = image_text_encoders(size, words)
    return ImageParts(
        vae=image_vae(size),
        transformer=image_transformer(size),
        text_encoder=clip_1,
        text_encoder_2=clip_2,
        text_encoder_3=t5,
    )


def image_scheduler(shift: float = NOISE_SHIFT) -> "FlowMatchEulerDiscreteScheduler":
    """The sampler that belongs to rectified flow with shifted noise levels."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def image_pipeline(
    parts: ImageParts, *, shift: float = NOISE_SHIFT, words: tuple[str, ...] | None = None
) -> "StableDiffusion3Pipeline":
    """Join components, tokenizers and scheduler into a stock pipeline; the modules are not copied."""
    from diffusers import StableDiffusion3Pipeline

    words = words or world_words()
    trained: dict[str, Any] = dict(parts.items())
    return StableDiffusion3Pipeline(
        **trained,
        tokenizer=clip_tokenizer(words),
        tokenizer_2=clip_tokenizer(words),
        tokenizer_3=t5_tokenizer(words),
        scheduler=image_scheduler(shift),
    )


def _room(entries: int, step: int) -> int:
    """The next multiple of `step`, so that a few more words do not change the shape of the embedding."""
    return -(-entries // step) * step
