"""What the config.json of a diffusion language model says, in transformers' own terms.

LLaDA and Dream ship code of their own. None of it is needed: their computation is that of Llama and Qwen2
without the causal mask, under other names (compared in the tests with a forward written from the papers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffctrl.errors import BadRequestError

# (pattern, replacement): of the checkpoint's names; the first that fits counts. Replacements may use \1 only,
# which is what transformers' `key_mapping` takes.
Renames = tuple[tuple[str, str], ...]

_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
_LLADA_RENAMES: Renames = (
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    *(
        (rf"{_BLOCK}{theirs}\.", rf"model.layers.\1.{ours}.")
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "ff_norm": "post_attention_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        }.items()
    ),
)
# What LLaDA's code can do otherwise, and the mapping to Llama cannot. Its class has GPT-2's values where the
# first group is left out, so that these must be written in the file; the second may be left out.
_LLADA_WRITTEN: Mapping[str, Any] = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "include_bias": False,
    "include_qkv_bias": False,
}
_LLADA_UNUSED: Mapping[str, Any] = {
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "input_emb_norm": False,
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "scale_logits": False,
}
_REFUSED = {
    "llada2": "a mixture of experts with block-causal attention: diffusers runs it with LLaDA2Pipeline",
    "lladamoe": "a mixture of experts, which is not the Llama architecture",
    "lladavision": "a model of pictures and text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A diffusion language model in transformers' terms.

    Attributes:
        layout: "llada", "dream", or "transformers" for a folder that transformers wrote.
        model_class: class in transformers.
        config_class: its config's class.
        sampler: the decoding it was trained for, "llada" or "dream"; None where the config does not say.
        config: keywords of the config.
        renames: how the names of its weights become transformers'.
    """

    layout: str
    model_class: str
    config_class: str
    sampler: str | None
    config: Mapping[str, Any]
    renames: Renames = field(default=())

    def rename(self, name: str) -> str:
        """The name in transformers of a weight of the checkpoint.

        >>> llada = Architecture(layout="llada", model_class="", config_class="", sampler=None, config={},
        ...                      renames=_LLADA_RENAMES)
        >>> llada.rename("model.transformer.blocks.3.ff_out.weight")
        'model.layers.3.mlp.down_proj.weight'
        """
        for pattern, replacement in self.renames:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        return name


def read_architecture(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        config: the file's table.
        name: the model's, for messages.

    Raises:
        BadRequestError: the model is of another kind, an entry is missing, or it asks for something that the
            architecture in transformers does not compute.
    """
    kind = str(config.get("model_type", ""))
    _refuse(config, kind, name)
    if kind == "llada":
        return _llada(_Entries(config, name))
    if kind.lower() == "dream":
        return _dream(_Entries(config, name))
    if kind in ("llama", "qwen2"):
        return _transformers(config, kind, name)
    raise BadRequestError(
        f"{name} is a model of type {kind or 'unknown'!r}; accepted: llada, Dream, and llama or qwen2 with "
        '"is_causal": false'
    )


def _refuse(config: Mapping[str, Any], kind: str, name: str) -> None:
    """Name what is known and not supported; model types differ between revisions, class names less."""
    architectures = [str(each) for each in config.get("architectures") or ()]
    for text in (kind, *architectures):
        plain = re.sub(r"[^a-z0-9]", "", text.lower())
        for start, reason in _REFUSED.items():
            if plain.startswith(start):
                raise BadRequestError(f"{name} is {text}, {reason}")
    if "n_experts" in config or "num_experts" in config:
        raise BadRequestError(f"{name} is {kind}, a mixture of experts, which is not supported")
    if kind.lower() == "dream" and config.get("block_size") is not None:
        raise BadRequestError(
            f"{name} is a Dream of blocks (block_size={config['block_size']}), whose attention is causal "
            "between blocks; models that attend in both directions throughout are supported"
        )


class _Entries:
    """A config's entries, each of which must be there: a default could be another model's size."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def number(self, key: str, kind: type = int) -> Any:
        value = self._get(key)
        accepted = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, accepted) or value <= 0:
            raise BadRequestError(f"{self.name}: {key}={value!r} in its config.json is no positive number")
        return kind(value)

    def token(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BadRequestError(f"{self.name}: {key}={value!r} in its config.json is no token id")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise BadRequestError(
                f"{self.name}: {key}={value!r} in its config.json is neither true nor false"
            )
        return value

    def expect(self, key: str, value: Any, *, written: bool) -> None:
        found = self._get(key) if written else self.config.get(key, value)
        if found != value:
            raise BadRequestError(
                f"{self.name}: {key}={found!r} in its config.json; only {value!r} has a counterpart in "
                "transformers"
            )

    def _get(self, key: str) -> Any:
        if key not in self.config:
            raise BadRequestError(
                f"{self.name}: its config.json lacks {key}, and no default is safe; take the file of the "
                "original repository"
            )
        return self.config[key]


def _llada(entries: _Entries) -> Architecture:
    for key, value in _LLADA_WRITTEN.items():
        entries.expect(key, value, written=True)
    for key, value in _LLADA_UNUSED.items():
        entries.expect(key, value, written=False)
    # The embedding may be padded beyond the vocabulary; the weights have its size.
    vocabulary = "embedding_size" if entries.config.get("embedding_size") else "vocab_size"
    config = {
        "vocab_size": entries.number(vocabulary),
        "hidden_size": entries.number("d_model"),
        "intermediate_size": entries.number("mlp_hidden_size"),
        "num_hidden_layers": entries.number("n_layers"),
        "num_attention_heads": entries.number("n_heads"),
        "num_key_value_heads": entries.number("n_kv_heads"),
        "max_position_embeddings": entries.number("max_sequence_length"),
        "rms_norm_eps": entries.number("rms_norm_eps", float),
        "tie_word_embeddings": entries.flag("weight_tying"),
        "attention_bias": False,
        "mlp_bias": False,
    }
    return Architecture(
        layout="llada",
        model_class="LlamaForCausalLM",
        config_class="LlamaConfig",
        sampler="llada",
        config=config | _common(entries),
        renames=_LLADA_RENAMES,
    )


def _dream(entries: _Entries) -> Architecture:
    entries.expect("hidden_act", "silu", written=True)
    entries.expect("use_sliding_window", False, written=False)
    entries.expect("use_mrope", False, written=False)
    if entries.config.get("rope_scaling") is not None:
        entries.expect("rope_scaling", None, written=True)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    config = {name: entries.number(name) for name in names} | {
        "rms_norm_eps": entries.number("rms_norm_eps", float),
        "tie_word_embeddings": entries.flag("tie_word_embeddings"),
        "use_sliding_window": False,
    }
    return Architecture(
        layout="dream",
        model_class="Qwen2ForCausalLM",
        config_class="Qwen2Config",
        sampler="dream",
        config=config | _common(entries),
    )


def _common(entries: _Entries) -> dict[str, Any]:
    """What both have: token ids, and what makes the model one of diffusion."""
    eos = entries.token("eos_token_id")
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": entries.number("rope_theta", float)},
        "mask_token_id": entries.token("mask_token_id"),
        "eos_token_id": eos,
        "pad_token_id": entries.config.get("pad_token_id", eos),
        "bos_token_id": entries.config.get("bos_token_id"),
        "is_causal": False,
        "use_cache": False,
    }


def _transformers(config: Mapping[str, Any], kind: str, name: str) -> Architecture:
    if config.get("is_causal", True) is not False:
        raise BadRequestError(
            f"{name} is an autoregressive {kind} model; a diffusion language model has "
            '"is_causal": false in its config.json'
        )
    stem = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    return Architecture(
        layout="transformers",
        model_class=f"{stem}ForCausalLM",
        config_class=f"{stem}Config",
        sampler=None,
        config={**config, "use_cache": False},
    )
