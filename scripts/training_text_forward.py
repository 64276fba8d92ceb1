"""The forward pass and the loss of the text model as training runs them, over the stock model's parameters.

Tokens of all rows lie in one flat axis T = B * S, so that everything but attention has one shape at every
length: it compiles once, and each length only captures its own graph. Plain tensor operations, no host
synchronisation. `tests/zoo/test_training_text.py` holds it equal to `LlamaForCausalLM`.

Axes: B rows, S tokens of a row, T = B * S, H heads, D channels of a head, C channels of a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .training_layers import lookup, maybe_compiled


def rotary_table(tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (S, D) float32 each, halves repeated as Llama does."""
    place = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / theta ** (place / head_dim)
    angle = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle, angle], dim=1).cos(), torch.cat([angle, angle], dim=1).sin()


def projections(
    layer: nn.Module, hidden: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with their positions, and values: (T, C), (T, D) twice -> (T, H, D) three times."""
    attention = layer.self_attn
    normed = _normed(layer.input_layernorm, hidden)
    query, key, value = (
        projection(normed).unflatten(1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return _rotated(query, cosine, sine), _rotated(key, cosine, sine), value


def rest_of_layer(layer: nn.Module, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Output projection and feed-forward part: (T, C) and the attention's (T, H D) -> (T, C)."""
    hidden = hidden + layer.self_attn.o_proj(mixed)
    normed = _normed(layer.post_attention_layernorm, hidden)
    mlp = layer.mlp
    return hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def head(norm: nn.Module, table: Tensor, hidden: Tensor) -> Tensor:
    """Logits (T, V) float32 of the tied head."""
    return F.linear(_normed(norm, hidden), table).float()


def masked_losses(
    norm: nn.Module, table: Tensor, hidden: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens' cross entropies, and which tokens the model would guess right.

    Args:
        norm: the model's last norm.
        table: (V, C) embedding, which is the head.
        hidden: (T, C).
        target: (T,) int64.
        weight: (T,) float32, zero where a token does not count.
    """
    logits = head(norm, table, hidden)
    losses = F.cross_entropy(logits, target, reduction="none")
    return (losses * weight).sum(), logits.argmax(dim=1) == target


class TextForward:
    """The model over flat tokens.

    Args:
        model: `LlamaForCausalLM` with tied embeddings and no biases; its parameters are read on every call.
        compiled: compile everything but attention with `torch.compile`.
    """

    def __init__(self, model: Any, *, compiled: bool) -> None:
        self.model = model
        config = model.config
        self._head_dim = config.head_dim
        self._theta = float(config.rope_parameters["rope_theta"])
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._lookup = maybe_compiled(lookup, compiled)
        self._projections = maybe_compiled(projections, compiled)
        self._rest = maybe_compiled(rest_of_layer, compiled)
        self._masked_losses = maybe_compiled(masked_losses, compiled)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (T, C), before the last norm."""
        rows, tokens = ids.shape
        cosine, sine = (table.repeat(rows, 1) for table in self._table(tokens, ids.device))
        # The sum over layers stays in float32 under autocast, as in the stock model.
        hidden = self._lookup(self.table, ids.flatten()).float()
        for layer in self.model.model.layers:
            query, key, value = self._projections(layer, hidden, cosine, sine)
            hidden = self._rest(layer, hidden, self._attended(query, key, value, rows))
        return hidden

    @property
    def table(self) -> Tensor:
        """(V, C) embedding, tied to the head."""
        return self.model.model.embed_tokens.weight

    def logits(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, V) float32."""
        return head(self.model.model.norm, self.table, self.hidden(ids)).unflatten(0, ids.shape)

    def losses(self, ids: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`masked_losses` of rows (B, S) against targets and weights (B, S); right guesses as (B, S)."""
        total, right = self._masked_losses(
            self.model.model.norm, self.table, self.hidden(ids), target.flatten(), weight.flatten()
        )
        return total, right.unflatten(0, ids.shape)

    def _table(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if tokens not in self._tables:
            self._tables[tokens] = rotary_table(tokens, self._head_dim, self._theta, device)
        return self._tables[tokens]

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        """Attention within rows, no mask: three times (T, H, D) -> (T, H D)."""
        if self._group > 1:
            key, value = (x.repeat_interleave(self._group, dim=1) for x in (key, value))
        query, key, value = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


def _normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    """RMS norm in float32, as Llama's."""
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * scaled.to(hidden.dtype)


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(T, H, D) turned by the angles of (T, D)."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (states * cosine[:, None] + turned * sine[:, None]).to(states.dtype)
