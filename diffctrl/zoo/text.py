"""The embedded text model `scenes-lm`: a masked-diffusion language model of Llama's architecture.

LLaDA is a Llama whose attention is not causal; so is this one, a few thousand times smaller, and it runs
through the same stock class, `LlamaForCausalLM` with `is_causal = False` and no cache.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .tasks.vocabulary import BOS, EOS, PAD, VOCABULARY_SIZE

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSize:
    """The numbers that a smaller model for tests may change; the defaults are the shipped model's.

    Args:
        width: channels of a token.
        layers: transformer layers.
        heads: attention heads.
        key_heads: heads of keys and values, a divisor of `heads`.
        head_dim: channels of a head, even.
        mlp: channels inside the feed-forward part.
        rope_theta: base of the rotary frequencies.
        positions: longest sequence that training shows.
    """

    width: int = 192
    layers: int = 6
    heads: int = 4
    key_heads: int = 4
    head_dim: int = 64
    mlp: int = 512
    rope_theta: float = 500_000.0
    positions: int = 4096


class TextModel(NamedTuple):
    """What an embedded text model consists of.

    Args:
        model: the language model, in evaluation mode.
        tokenizer: puts `<bos>` and `<sep>` around a prompt and pads on the left.
        settings: the folder's `diffctrl.json`; `settings["call"]` has the recommended sampling arguments.
    """

    model: "LlamaForCausalLM"
    tokenizer: "PreTrainedTokenizerFast"
    settings: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: "torch.dtype | None" = None,
        use_safetensors: bool = True,
        local_files_only: bool = True,
    ) -> "TextModel":
        """Load a folder in transformers' layout with a `diffctrl.json` beside it.

        Args:
            folder: with config.json, model.safetensors, tokenizer.json, tokenizer_config.json, diffctrl.json.
            dtype: of the weights; float32 when None. They are stored as float16, which CPUs compute slowly.
            use_safetensors: other weight formats are not read; False is refused.
            local_files_only: nothing is downloaded; False is refused.
        """
        import torch
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

        if not (use_safetensors and local_files_only):
            raise ValueError("an embedded text model is read from local safetensors files only")
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        settings = json.loads((Path(folder) / "diffctrl.json").read_text(encoding="utf-8"))
        return cls(model.eval(), tokenizer, settings)


def text_config(size: TextSize | None = None) -> "LlamaConfig":
    """Configuration of the model: bidirectional, uncached, head tied to the embedding."""
    from transformers import LlamaConfig

    size = size or TextSize()
    config: Any = LlamaConfig  # it takes is_causal, and its annotations do not say so
    return config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.positions,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        is_causal=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def text_model(size: TextSize | None = None) -> "LlamaForCausalLM":
    """The model with start weights drawn from torch's default generator, float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(text_config(size))
