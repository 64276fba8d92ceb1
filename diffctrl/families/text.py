"""Diffusion language models: transformers' architectures, run in both directions.

Where their attention lies, and what a step costs. Knows no method, and no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from diffctrl.catalogue import TEXT_FAMILIES


@dataclass(frozen=True, slots=True)
class TextFamily:
    """One architecture.

    Attributes:
        name: as in `diffctrl.catalogue.TEXT_FAMILIES`.
        module: where transformers defines it.
        models: class names of its models, with and without a language head.
        attention: class name of its attention.
    """

    name: str
    module: str
    models: tuple[str, ...]
    attention: str

    @property
    def title(self) -> str:
        return TEXT_FAMILIES[self.name].title

    def classes(self, *names: str) -> tuple[type, ...]:
        """The classes of these names; imports transformers' module."""
        module = import_module(self.module)
        return tuple(getattr(module, name) for name in names)


_FAMILIES = (
    TextFamily(
        "llada",
        "transformers.models.llama.modeling_llama",
        ("LlamaForCausalLM", "LlamaModel"),
        "LlamaAttention",
    ),
    TextFamily(
        "dream",
        "transformers.models.qwen2.modeling_qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        "Qwen2Attention",
    ),
)


@dataclass(frozen=True, slots=True, eq=False)
class TextSite:
    """One attention module of a language model.

    Attributes:
        name: of the module.
        module: itself.
        layer: its index.
    """

    name: str
    module: nn.Module
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class TextModel:
    """A language model as a control sees it.

    Attributes:
        name: of its class.
        family: its architecture.
        model: with or without a language head.
        base: the part without it.
        sites: its attention modules, by layer.
        heads, kv_heads, head_dim: of each.
        linear_weights: weights that each token is multiplied with, embedding and language head left out.
    """

    name: str
    family: TextFamily
    model: Any
    base: Any
    sites: tuple[TextSite, ...]
    heads: int
    kv_heads: int
    head_dim: int
    linear_weights: int

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device


def is_text_model(target: Any) -> bool:
    """Whether this is a model of transformers; imports nothing."""
    return isinstance(target, nn.Module) and any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(target).__mro__
    )


def text_model(model: Any) -> TextModel:
    """What is known of a language model.

    Raises:
        TypeError: its class is not among the supported ones; it is compared exactly, remote code of the same
            name is another class.
        ValueError: it is causal, keeps keys and values between calls, or has sliding windows.
    """
    family = _family(model)
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_causal", True):
        raise ValueError(
            f"this {name} is causal: a diffusion language model attends in both directions. Set "
            "model.config.is_causal = False before applying, if it was trained so"
        )
    if config.use_cache:
        raise ValueError(
            f"this {name} keeps keys and values between calls (config.use_cache = True), but a diffusion "
            "language "
            "model recomputes all tokens in each step. Set model.config.use_cache = False"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"this {name} has layers with a sliding window (config.layer_types); only full attention is "
            "supported"
        )
    base = getattr(model, model.base_model_prefix, model)
    (attention,) = family.classes(family.attention)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    sites = [
        TextSite(f"{prefix}{place}", module, int(module.layer_idx))
        for place, module in base.named_modules()
        if type(module) is attention
    ]
    if not sites:
        raise TypeError(f"this {name} has no {family.attention}; it is not what {family.title} is")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = sum(m.in_features * m.out_features for m in base.modules() if isinstance(m, nn.Linear))
    return TextModel(
        name,
        family,
        model,
        base,
        tuple(sorted(sites, key=lambda site: site.layer)),
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        linear,
    )


def _family(model: Any) -> TextFamily:
    for family in _FAMILIES:
        if type(model).__module__ == family.module and type(model) in family.classes(*family.models):
            return family
    accepted = ", ".join(name for family in _FAMILIES for name in family.models)
    raise TypeError(
        f"diffctrl does not know the language model {type(model).__module__}.{type(model).__name__}; it "
        "supports "
        f"{accepted} of transformers. Checkpoints of LLaDA, Dream and DiffuCoder load into these without "
        "remote "
        "code: see diffctrl.dlm"
    )
