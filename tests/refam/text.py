"""A tokenizer that cuts as T5's does: white space, then "▁" before each word, `</s>` at the end."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diffctrl.refam import Encoded, encode

# "a" and "." have no piece of their own with a "▁", as in T5's vocabulary.
_WORDS = (
    "largest orange gold with the pink purple red cube left circle above green cross on in man black vest "
    "one "
    "no two to cup of plate lamp and it right square fish"
)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in _WORDS.split()]
    pieces += [("fish", -1.0), (".", -1.0), (",", -1.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


TOKENIZER = t5_tokenizer()


def cut(text: str) -> Encoded:
    return encode(TOKENIZER, text)
