"""The forward pass of the image model as training runs it: the stock modules' weights, called layer by layer.

Only plain tensor operations, no hooks and no host synchronisation, so that each repeated layer compiles once
and the whole step can be captured in a CUDA graph. `tests/zoo/test_training.py` holds it equal to the stock
modules.

Axes: B batch, T text tokens of one encoder, P patches, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffctrl.zoo.models import ImageParts

from .training_layers import lookup, maybe_compiled

TRAIN_TIMESTEPS = 1000.0


def clip_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One causal CLIP layer: (B, T, C) -> (B, T, C)."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query = _heads(attention.q_proj(normed), attention.num_heads)
    key = _heads(attention.k_proj(normed), attention.num_heads)
    value = _heads(attention.v_proj(normed), attention.num_heads)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def t5_layer(layer: nn.Module, hidden: Tensor, bias: Tensor) -> Tensor:
    """One T5 encoder layer with its additive position bias: (B, T, C), (1, H, T, T) -> (B, T, C)."""
    attention = layer.layer[0].SelfAttention
    normed = layer.layer[0].layer_norm(hidden)
    query = _heads(attention.q(normed), attention.n_heads)
    key = _heads(attention.k(normed), attention.n_heads)
    value = _heads(attention.v(normed), attention.n_heads)
    scores = (query @ key.transpose(2, 3)).float() + bias  # T5 does not scale the product
    mixed = scores.softmax(dim=-1).to(value.dtype) @ value
    hidden = hidden + attention.o(mixed.transpose(1, 2).flatten(2))
    return layer.layer[1](hidden)


def transformer_block(
    block: nn.Module, hidden: Tensor, context: Tensor, condition: Tensor
) -> tuple[Tensor, Tensor]:
    """One joint block: image (B, P, C), text (B, 2T, C), condition (B, C) -> (text or None, image)."""
    return block(hidden_states=hidden, encoder_hidden_states=context, temb=condition)


def noisy_tokens(transformer: nn.Module, rows: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Mix rows with noise and embed them.

    Args:
        transformer: the SD3 transformer.
        rows: (B, P, 4 C) clean latent patches, channels last within a patch (`to_rows`).
        noise: as `rows`, float32.
        level: (B,) float32 noise level in [0, 1].

    Returns:
        (B, P, width) tokens with positions added, and (B, P, 4 C) the velocity `noise - rows` in float32.
    """
    clean = rows.float()
    mixed = torch.lerp(clean, noise, level[:, None, None])
    embed = transformer.pos_embed
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    tokens = F.linear(mixed, weight, embed.proj.bias)
    side = math.isqrt(rows.shape[1]) * embed.patch_size
    return (tokens + embed.cropped_pos_embed(side, side)).to(tokens.dtype), noise - clean


def velocity_loss(transformer: nn.Module, tokens: Tensor, condition: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error of the velocity that the last tokens predict; a float32 scalar."""
    predicted = transformer.proj_out(transformer.norm_out(tokens, condition))
    return (predicted.float() - velocity).square().mean()


def to_rows(latents: Tensor) -> Tensor:
    """(B, C, H, W) latents -> (B, H W / 4, 4 C) patches in the order of the transformer's output."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, height * width // 4, 4 * channels)


class TrainingForward:
    """Text encoding and flow loss over one set of components.

    Args:
        parts: the components; their parameters are read on every call, never copied.
        compiled: compile each repeated layer once with `torch.compile`.
    """

    def __init__(self, parts: ImageParts, *, compiled: bool) -> None:
        self.parts = parts
        self._clip_layer = maybe_compiled(clip_layer, compiled)
        self._t5_layer = maybe_compiled(t5_layer, compiled)
        self._block = maybe_compiled(transformer_block, compiled)
        self._noisy_tokens = maybe_compiled(noisy_tokens, compiled)
        self._lookup = maybe_compiled(lookup, compiled)
        self._velocity_loss = maybe_compiled(velocity_loss, compiled)
        self._buckets: Tensor | None = None

    def encode_text(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Joint text tokens and pooled text, as the SD3 pipeline joins them.

        Args:
            clip_ids: (B, T) long, padded as the CLIP tokenizer pads.
            t5_ids: (B, T) long, padded as the T5 tokenizer pads.

        Returns:
            (B, 2T, D) context with D the T5 width, and (B, 2 * clip width) pooled.
        """
        first, first_pooled = self._clip_features(self.parts.text_encoder, clip_ids)
        second, second_pooled = self._clip_features(self.parts.text_encoder_2, clip_ids)
        t5 = self._t5_features(self.parts.text_encoder_3, t5_ids)
        joint = torch.cat([first, second], dim=2)
        joint = F.pad(joint, (0, t5.shape[2] - joint.shape[2])).to(t5.dtype)
        return torch.cat([joint, t5], dim=1), torch.cat([first_pooled, second_pooled], dim=1)

    def loss(self, rows: Tensor, clip_ids: Tensor, t5_ids: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Rectified-flow loss of a batch.

        Args:
            rows: (B, P, 4 C) scaled latent patches, any float dtype.
            clip_ids: (B, T) long.
            t5_ids: (B, T) long.
            noise: (B, P, 4 C) float32 standard normal.
            level: (B,) float32 noise level in [0, 1].
        """
        transformer = self.parts.transformer
        context, pooled = self.encode_text(clip_ids, t5_ids)
        hidden, velocity = self._noisy_tokens(transformer, rows, noise, level)
        condition = transformer.time_text_embed(level * TRAIN_TIMESTEPS, pooled)
        context = transformer.context_embedder(context)
        for block in transformer.transformer_blocks:
            context, hidden = self._block(block, hidden, context, condition)
        return self._velocity_loss(transformer, hidden, condition, velocity)

    def _clip_features(self, encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) hidden state before the last layer and (B, projection) pooled text."""
        text = encoder.text_model
        hidden = self._lookup(text.embeddings.token_embedding.weight, ids)
        hidden = hidden + text.embeddings.position_embedding.weight[: ids.shape[1]]
        *body, last = text.encoder.layers
        for layer in body:
            hidden = self._clip_layer(layer, hidden)
        final = text.final_layer_norm(self._clip_layer(last, hidden))
        ends = (ids == encoder.config.eos_token_id).cumsum(dim=1)
        first_end = (ends == 1) & (ids == encoder.config.eos_token_id)
        # A masked sum picks the token without an index: its gradient needs neither sorting nor atomics.
        pooled = (final * first_end[:, :, None]).sum(dim=1)
        return hidden, encoder.text_projection(pooled)

    def _t5_features(self, encoder: nn.Module, ids: Tensor) -> Tensor:
        """(B, T, D) last hidden state."""
        stack = encoder.encoder
        attention = stack.block[0].layer[0].SelfAttention
        if self._buckets is None or self._buckets.device != ids.device:
            self._buckets = _bucket_one_hot(attention, ids.shape[1], ids.device)
        bias = (self._buckets @ attention.relative_attention_bias.weight.float()).permute(2, 0, 1)[None]
        hidden = self._lookup(encoder.shared.weight, ids)
        for layer in stack.block:
            hidden = self._t5_layer(layer, hidden, bias)
        return stack.final_layer_norm(hidden)


def _heads(projected: Tensor, heads: int) -> Tensor:
    """(B, T, H D) -> (B, H, T, D)."""
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)


def _bucket_one_hot(attention: nn.Module, tokens: int, device: torch.device) -> Tensor:
    """(T, T, buckets) float32, which distance bucket each pair of positions belongs to."""
    place = torch.arange(tokens, device=device)
    buckets = attention._relative_position_bucket(
        place[None, :] - place[:, None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return F.one_hot(buckets, attention.relative_attention_num_buckets).float()
