"""What the tests of SparseD share: the worked example, tiny models, generations without a sampler."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SETTINGS: dict[str, Any] = {"select": 0.3, "block_size": 16, "auto_dense": False}


@dataclass(frozen=True)
class Worked:
    """Section 2 of the specification: one head, d = 4, scale 0.5, B = 2."""

    tokens: int = 12
    scale: float = 0.5
    block: int = 2

    @property
    def query(self) -> torch.Tensor:
        """float64 (1, S, 1, 4)."""
        return 2 * torch.sin(self._angles())

    @property
    def key(self) -> torch.Tensor:
        return 2 * torch.cos(self._angles())

    @property
    def value(self) -> torch.Tensor:
        """(1, S, 1, 4): the token's number in every column."""
        return torch.arange(self.tokens).double().view(1, -1, 1, 1).expand(1, -1, 1, 4).contiguous()

    def _angles(self) -> torch.Tensor:
        return (torch.arange(self.tokens).double()[:, None] * torch.arange(1, 5).double()).view(1, -1, 1, 4)


def tiny_llama(layers: int = 2, kv_heads: int = 2, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A LLaDA in small: Llama's architecture in both directions, with sharp attention."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, use_cache=False, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    config.is_causal = False
    return sharpened(LlamaForCausalLM, config, seed)


def tiny_qwen(seed: int = 0) -> Qwen2ForCausalLM:
    """A Dream in small: 7 query heads for each key head, biases."""
    config = Qwen2Config(
        vocab_size=61, hidden_size=56, intermediate_size=48, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, head_dim=16, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    config.is_causal = False
    return sharpened(Qwen2ForCausalLM, config, seed)


def sharpened(kind: Any, config: Any, seed: int) -> Any:
    """Random weights attend nearly alike to all keys; queries and keys are enlarged so that blocks differ."""
    torch.manual_seed(seed)
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(18.0)
            layer.self_attn.k_proj.weight.mul_(18.0)
    return model


def tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(
    control: Any,
    model: Any,
    ids: torch.Tensor,
    prompts: list[int],
    steps: int = 5,
    padding: list[int] | None = None,
    **begin: Any,
) -> list[torch.Tensor]:
    """Logits of each step of a generation that changes its last token in every step."""
    mask, left = None, None
    if padding is not None:
        left = torch.tensor(padding)
        mask = torch.arange(ids.shape[1]) >= left[:, None]
    generated = ids.shape[1] - max(
        prompts[b] + (padding or [0] * len(prompts))[b] for b in range(len(prompts))
    )
    control.begin(torch.tensor(prompts), generated, steps, left, **begin)
    outs = []
    with torch.no_grad():
        for step in range(steps):
            control.set_step(step)
            now = ids.clone()
            now[:, -1] = step
            outs.append(model(input_ids=now, attention_mask=mask).logits)
    return outs


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator makes inside, by the memory behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return out


def kept_sets(lists: Any) -> list[list[list[set[int]]]]:
    """Kept blocks per batch row, head and query block."""
    return [
        [[set(row[:count].tolist()) for row, count in zip(rows, counts, strict=True)]
         for rows, counts in zip(*pair, strict=True)]
        for pair in zip(lists.indices, lists.counts, strict=True)
    ]  # fmt: skip
