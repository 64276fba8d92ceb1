"""Whether a model can read a prompt: counted with its tokenizers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError

_WORD = re.compile(r"[^\W\d_]+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class _Count:
    """Tokens of a prompt for one tokenizer, special tokens included."""

    tokenizer: str
    tokens: int
    limit: int


def check(
    source: ModelSource, prompt: str, max_sequence_length: int | None, *, what: str = "prompt"
) -> list[str]:
    """Warnings about a prompt that the model reads in part or does not know.

    A text encoder that cuts a prompt which another one reads whole is worth a warning; a prompt that none of
    them reads whole is refused.

    Raises:
        BadRequestError: the prompt is longer than every tokenizer's limit.
    """
    counts = _counts(source, prompt, max_sequence_length)
    if counts and all(count.tokens > count.limit for count in counts):
        best = max(counts, key=lambda count: count.limit)
        raise BadRequestError(
            f"the {what} is too long for {source.name}: {best.tokens} tokens, of {best.limit} at most"
        )
    warnings = [
        f"{count.tokenizer} of {source.name} reads {count.limit} of the {what}'s {count.tokens} tokens"
        for count in counts
        if count.tokens > count.limit
    ]
    clips = source.kind.frame_rule is not None
    if source.embedded and (unknown := unknown_words(prompt, clips=clips)):
        words = ", ".join(map(repr, unknown))
        warnings.append(f"{source.name} never saw {words} in training and cannot draw it")
    return warnings


def unread(source: ModelSource, prompts: Sequence[str], max_sequence_length: int | None) -> int:
    """How many of these prompts no text encoder of the model reads whole."""
    readers = list(_tokenizers(source, max_sequence_length))
    if not readers:
        return 0
    return sum(all(len(read(one).input_ids) > limit for _, read, limit in readers) for one in prompts)


def unknown_words(prompt: str, *, clips: bool = False) -> list[str]:
    """The words of a prompt that are not in the embedded models' world (of clips), in order, once each."""
    if clips:
        from diffctrl.zoo.clips import WORDS
    else:
        from diffctrl.zoo.worlds import WORDS

    words = (match.group().lower() for match in _WORD.finditer(prompt))
    return list(dict.fromkeys(word for word in words if word not in WORDS))


def _counts(source: ModelSource, prompt: str, max_sequence_length: int | None) -> list[_Count]:
    return [
        _Count(name, len(tokenizer(prompt).input_ids), limit)
        for name, tokenizer, limit in _tokenizers(source, max_sequence_length)
    ]


def _tokenizers(source: ModelSource, max_sequence_length: int | None) -> Iterator[tuple[str, Any, int]]:
    """Name, tokenizer and limit of each."""
    import transformers

    for component, class_name in source.components().items():
        if not component.startswith("tokenizer"):
            continue
        where = str(source.folder) if source.folder is not None else source.name
        try:
            tokenizer = getattr(transformers, class_name).from_pretrained(
                where, subfolder=component, local_files_only=not source.asks_hub
            )
        except (OSError, ValueError) as error:
            raise BadRequestError(f"{source.name}: its {component} cannot be loaded ({error})") from None
        limit = int(tokenizer.model_max_length)
        if component == source.kind.long_tokenizer and max_sequence_length is not None:
            limit = max_sequence_length
        yield component, tokenizer, limit
