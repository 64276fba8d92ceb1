"""The forward passes of the video model in training: the stock modules' weights, whole clips at once.

The stock autoencoder walks through a clip in chunks with caches; here all frames pass together, and a causal
3-D convolution is a 2-D one over stacked neighbouring frames, for which fast kernels exist at few channels.
`tests/zoo/test_training_video.py` holds everything equal to the stock modules.

Axes: B clips, T frames, F latent frames, P tokens of a frame, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffctrl.zoo.video import VideoParts

from .training_image_forward import TRAIN_TIMESTEPS, t5_layer
from .training_layers import lookup, maybe_compiled


def to_rows(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, F, H W / 4, 4 C), patches in the order of the transformer's output."""
    batch, channels, frames, height, width = latents.shape
    cells = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 3, 5, 4, 6, 1).reshape(batch, frames, height * width // 4, 4 * channels)


def causal(conv: Any, x: Tensor, frames: int) -> Tensor:
    """A causal 3-D convolution of stride one over (B T, C, H, W); earlier frames than the first are zero."""
    taps = conv.kernel_size[0]
    weight = conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
    if taps > 1:
        clip = F.pad(x.unflatten(0, (-1, frames)), (0, 0, 0, 0, 0, 0, taps - 1, 0))
        x = torch.cat([clip[:, tap : tap + frames] for tap in range(taps)], 2).flatten(0, 1)
    return F.conv2d(x, weight, conv.bias, padding=(conv._padding[2], conv._padding[0]))


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.silu(F.normalize(x.float(), dim=1) * norm.scale * norm.gamma.flatten()[:, None, None])


def _residual(block: Any, x: Tensor, frames: int) -> Tensor:
    skip = x if isinstance(block.conv_shortcut, nn.Identity) else causal(block.conv_shortcut, x, frames)
    hidden = causal(block.conv1, _normed(block.norm1, x), frames)
    return skip + causal(block.conv2, _normed(block.norm2, hidden), frames)


def _middle(block: Any, x: Tensor, frames: int) -> Tensor:
    first, second = block.resnets
    x = _residual(first, x, frames)
    return _residual(second, block.attentions[0](x[:, :, None])[:, :, 0], frames)


def _downsample(layer: Any, x: Tensor, frames: int) -> tuple[Tensor, int]:
    x = layer.resample(x)
    if layer.mode != "downsample3d":
        return x, frames
    clip = x.unflatten(0, (-1, frames))
    # The first frame stays alone; each later one sees two frames and the one before them.
    stacked = torch.cat([clip[:, :-2:2], clip[:, 1:-1:2], clip[:, 2::2]], 2).flatten(0, 1)
    weight = layer.time_conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
    later = F.conv2d(stacked, weight, layer.time_conv.bias).unflatten(0, (len(clip), -1))
    out = torch.cat([clip[:, :1].to(later.dtype), later], 1)
    return out.flatten(0, 1), out.shape[1]


def _upsample(layer: Any, x: Tensor, frames: int) -> tuple[Tensor, int]:
    if layer.mode == "upsample3d":
        clip = x.unflatten(0, (-1, frames))
        later = causal(layer.time_conv, clip[:, 1:].flatten(0, 1), frames - 1)
        later = later.unflatten(1, (2, -1)).unflatten(0, (len(clip), -1)).flatten(1, 2)
        x = torch.cat([clip[:, :1].to(later.dtype), later], 1).flatten(0, 1)
        frames = 2 * frames - 1
    return layer.resample(x), frames


def encode(vae: Any, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, F, C, h, w) of clips (B, T, 3, H, W) in [-1, 1]; T is odd and at least 3."""
    frames, encoder = clips.shape[1], vae.encoder
    x = causal(encoder.conv_in, clips.flatten(0, 1), frames)
    for layer in encoder.down_blocks:
        if hasattr(layer, "resample"):
            x, frames = _downsample(layer, x, frames)
        else:
            x = _residual(layer, x, frames)
    x = _middle(encoder.mid_block, x, frames)
    x = causal(encoder.conv_out, _normed(encoder.norm_out, x), frames)
    mean, log_variance = causal(vae.quant_conv, x, frames).unflatten(0, (-1, frames)).chunk(2, dim=2)
    return mean, log_variance


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Clips (B, T, 3, H, W), not clamped, of latents (B, F, C, h, w)."""
    frames, decoder = latents.shape[1], vae.decoder
    x = causal(vae.post_quant_conv, latents.flatten(0, 1), frames)
    x = _middle(decoder.mid_block, causal(decoder.conv_in, x, frames), frames)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual(layer, x, frames)
        for layer in block.upsamplers or ():
            x, frames = _upsample(layer, x, frames)
    x = causal(decoder.conv_out, _normed(decoder.norm_out, x), frames)
    return x.unflatten(0, (-1, frames))


def _block(block: Any, hidden: Tensor, context: Tensor, condition: Tensor, rotary: Any) -> Tensor:
    return block(hidden, context, condition, rotary)


def _noisy_tokens(transformer: Any, rows: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    clean = rows.float()
    mixed = torch.lerp(clean, noise, level[:, None, None])
    weight = transformer.patch_embedding.weight.permute(0, 2, 3, 4, 1).flatten(1)
    return F.linear(mixed, weight, transformer.patch_embedding.bias), noise - clean


def _velocity_loss(transformer: Any, hidden: Tensor, temb: Tensor, velocity: Tensor) -> Tensor:
    shift, scale = (transformer.scale_shift_table + temb[:, None]).chunk(2, dim=1)
    hidden = transformer.norm_out(hidden.float()) * (1 + scale) + shift
    return (transformer.proj_out(hidden).float() - velocity).square().mean()


class VideoForward:
    """Text encoding and flow loss over one set of components.

    Args:
        parts: the components; their parameters are read on every call, never copied.
        compiled: compile each repeated layer with `torch.compile`, once per shape.
    """

    def __init__(self, parts: VideoParts, *, compiled: bool) -> None:
        self.parts = parts
        self._t5_layer = maybe_compiled(t5_layer, compiled)
        self._block = maybe_compiled(_block, compiled)
        self._noisy_tokens = maybe_compiled(_noisy_tokens, compiled)
        self._velocity_loss = maybe_compiled(_velocity_loss, compiled)
        self._rotary: dict[int, Any] = {}
        self._buckets: Tensor | None = None

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, 32) long token ids -> (B, 32, D), zero after each caption's end, as in the pipeline."""
        encoder: Any = self.parts.text_encoder
        stack = encoder.encoder
        shown = ids != encoder.config.pad_token_id
        hidden_from = torch.zeros(ids.shape, device=ids.device).masked_fill(~shown, -1e9)[:, None, None]
        if self._buckets is None:
            attention = stack.block[0].layer[0].SelfAttention
            place = torch.arange(ids.shape[1], device=ids.device)
            buckets = attention._relative_position_bucket(place[None] - place[:, None])
            self._buckets = F.one_hot(buckets, encoder.config.relative_attention_num_buckets).float()
        hidden = lookup(encoder.shared.weight, ids)
        for layer in stack.block:  # each layer of UMT5 has positions of its own
            table = layer.layer[0].SelfAttention.relative_attention_bias.weight.float()
            bias = (self._buckets @ table).permute(2, 0, 1)[None] + hidden_from
            hidden = self._t5_layer(layer, hidden, bias)
        return stack.final_layer_norm(hidden) * shown[..., None]

    def loss(self, rows: Tensor, ids: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Rectified-flow loss of a batch.

        Args:
            rows: (B, F, P, 4 C) scaled latent patches, any float dtype.
            ids: (B, 32) long token ids.
            noise: as `rows`, float32 standard normal.
            level: (B,) float32 noise level in [0, 1].
        """
        transformer: Any = self.parts.transformer
        frames, side = rows.shape[1], 2 * int(rows.shape[2] ** 0.5)
        if frames not in self._rotary:
            self._rotary[frames] = transformer.rope(torch.empty(1, 1, frames, side, side))
        context = self.encode_text(ids)
        hidden, velocity = self._noisy_tokens(transformer, rows.flatten(1, 2), noise.flatten(1, 2), level)
        temb, condition, context, _ = transformer.condition_embedder(level * TRAIN_TIMESTEPS, context)
        condition = condition.unflatten(1, (6, -1))
        for block in transformer.blocks:
            hidden = self._block(block, hidden, context, condition, self._rotary[frames])
        return self._velocity_loss(transformer, hidden, temb, velocity)
