"""Tiny random checkpoints in the original layouts, and their forwards written from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

WORDS = ("<|mask|>", "<|eos|>", "<|pad|>", "<|eot_id|>", "the", "red", "cup", "is", "on", "a", "plate", ".")
VOCABULARY = 24

LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": VOCABULARY,
    "eos_token_id": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "mask_token_id": 0,
    "max_sequence_length": 64,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "use_cache": False,
    "vocab_size": VOCABULARY - 1,
    "weight_tying": False,
}
DREAM = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "mask_token_id": 0,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) * shape[-1] ** -0.5


def llada_weights(config: dict = LLADA) -> dict[str, Tensor]:
    torch.manual_seed(0)
    width, inner, root = config["d_model"], config["mlp_hidden_size"], "model.transformer"
    weights = {
        f"{root}.wte.weight": _random(VOCABULARY, width),
        f"{root}.ln_f.weight": 1 + 0.1 * torch.randn(width),
        f"{root}.ff_out.weight": _random(VOCABULARY, width),
    }
    for layer in range(config["n_layers"]):
        block = f"{root}.blocks.{layer}"
        for name in ("attn_norm", "ff_norm"):
            weights[f"{block}.{name}.weight"] = 1 + 0.1 * torch.randn(width)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            weights[f"{block}.{name}.weight"] = _random(width, width)
        for name in ("ff_proj", "up_proj"):
            weights[f"{block}.{name}.weight"] = _random(inner, width)
        weights[f"{block}.ff_out.weight"] = _random(width, inner)
    return weights


def dream_weights(config: dict = DREAM) -> dict[str, Tensor]:
    torch.manual_seed(1)
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = {
        "model.embed_tokens.weight": _random(VOCABULARY, width),
        "model.norm.weight": 1 + 0.1 * torch.randn(width),
        "lm_head.weight": _random(VOCABULARY, width),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{block}.{name}.weight"] = 1 + 0.1 * torch.randn(width)
        for name, out in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow)):
            weights[f"{block}.self_attn.{name}.weight"] = _random(out, width)
            weights[f"{block}.self_attn.{name}.bias"] = 0.1 * torch.randn(out)
        weights[f"{block}.self_attn.o_proj.weight"] = _random(width, width)
        weights[f"{block}.mlp.gate_proj.weight"] = _random(inner, width)
        weights[f"{block}.mlp.up_proj.weight"] = _random(inner, width)
        weights[f"{block}.mlp.down_proj.weight"] = _random(width, inner)
    return weights


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on (B, H, S, D): the first half of the channels pairs with the second."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] / theta ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, theta: float) -> Tensor:
    """Every token attends to every token."""
    batch, tokens, _ = q.shape
    q, k, v = (
        t.view(batch, tokens, n, -1).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    q, k = _rotated(q, theta), _rotated(k, theta)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (maps @ v).transpose(1, 2).reshape(batch, tokens, -1)


def llada_forward(weights: dict[str, Tensor], tokens: Tensor, config: dict = LLADA) -> Tensor:
    root, eps = "model.transformer", config["rms_norm_eps"]
    x = weights[f"{root}.wte.weight"][tokens]
    for layer in range(config["n_layers"]):
        w = {
            n: weights[f"{root}.blocks.{layer}.{n}.weight"]
            for n in (
                "attn_norm",
                "ff_norm",
                "q_proj",
                "k_proj",
                "v_proj",
                "attn_out",
                "ff_proj",
                "up_proj",
                "ff_out",
            )
        }
        h = _norm(x, w["attn_norm"], eps)
        q, k, v = (h @ w[n].T for n in ("q_proj", "k_proj", "v_proj"))
        x = (
            x
            + _attended(q, k, v, config["n_heads"], config["n_kv_heads"], config["rope_theta"])
            @ w["attn_out"].T
        )
        h = _norm(x, w["ff_norm"], eps)
        x = x + (functional.silu(h @ w["ff_proj"].T) * (h @ w["up_proj"].T)) @ w["ff_out"].T
    return _norm(x, weights[f"{root}.ln_f.weight"], eps) @ weights[f"{root}.ff_out.weight"].T


def dream_forward(weights: dict[str, Tensor], tokens: Tensor, config: dict = DREAM) -> Tensor:
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        attn, mlp = f"{block}.self_attn", f"{block}.mlp"
        h = _norm(x, weights[f"{block}.input_layernorm.weight"], eps)
        q, k, v = (h @ weights[f"{attn}.{n}_proj.weight"].T + weights[f"{attn}.{n}_proj.bias"] for n in "qkv")
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        mixed = _attended(q, k, v, heads, kv_heads, config["rope_theta"])
        x = x + mixed @ weights[f"{attn}.o_proj.weight"].T
        h = _norm(x, weights[f"{block}.post_attention_layernorm.weight"], eps)
        gate, up = h @ weights[f"{mlp}.gate_proj.weight"].T, h @ weights[f"{mlp}.up_proj.weight"].T
        x = x + (functional.silu(gate) * up) @ weights[f"{mlp}.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def word_tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """Every word of WORDS is a token; `template` gives it a chat template."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    vocabulary |= {f"w{index}": index for index in range(len(WORDS), VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        unk_token=".",
        mask_token="<|mask|>",
    )
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'the ' + m['content'] + ' <|eot_id|> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
        )
    return tokenizer


def write(
    folder: Path, config: dict, weights: dict[str, Tensor], shards: int = 1, template: bool = True
) -> Path:
    """A model folder as it lies on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: weights[n] for n in names[shard::shards]}, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names[shard::shards], file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
    word_tokenizer(template).save_pretrained(folder)
    return folder
