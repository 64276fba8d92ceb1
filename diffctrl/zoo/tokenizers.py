"""Word-level tokenizers of the embedded image model: one world word is one token, the rest falls to pieces.

Both are made from the world's word list alone. The byte-pair merges are found here rather than by a trainer
of the `tokenizers` package, so that every version of that package gives the same ids.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

MAX_TOKENS = 32
"""Length both tokenizers pad to, special tokens included."""

_END = "</w>"
_CLIP_BOS, _CLIP_EOS = 0, 1
_T5_PAD, _T5_EOS, _T5_UNK = 0, 1, 2
_WORD = re.compile(r"[a-z]+|[^\sa-z0-9]")


def clip_tokenizer(words: Sequence[str]) -> "CLIPTokenizer":
    """Build the CLIP tokenizer of a word list.

    Ids: 0 begin, 1 end (also padding), then the 256 bytes, the 256 word-final bytes, then one id per merge.

    Args:
        words: lower-case words or single punctuation marks.

    Returns:
        A `CLIPTokenizer` that lower-cases, pads to `MAX_TOKENS` and maps every world word to one token.
    """
    from transformers import CLIPTokenizer

    _check_words(words)
    alphabet = sorted(_byte_alphabet())
    merges = _byte_pair_merges(sorted(set(words)))
    pieces = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + _END for letter in alphabet)]
    pieces += ["".join(pair) for pair in merges]
    # Two merges can spell the same piece by different routes; it is one entry of the vocabulary.
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    pairs: Any = merges  # transformers annotates text, and takes pairs
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=MAX_TOKENS)


def t5_tokenizer(words: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Build the T5 tokenizer of a word list: a unigram model of words, then letters and punctuation.

    It is a plain `PreTrainedTokenizerFast`: `T5Tokenizer` rebuilds its backend on load and loses the
    lower-casing.

    Args:
        words: lower-case words or single punctuation marks.

    Returns:
        A fast tokenizer with `<pad>` 0, `</s>` 1 and `<unk>` 2 that lower-cases and appends `</s>`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    _check_words(words)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
    # One whole word must always beat its letters, and unknown text must still be cheaper as letters than
    # <unk>.
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    scores |= dict.fromkeys(sorted(set(words)), -1.0)
    scores |= {letter: -8.0 for letter in letters if letter not in scores}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=_T5_UNK))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", _T5_EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True, slots=True)
class WordTokens:
    """Token id of every world word on both sides: captions become ids without a tokenizer.

    Args:
        clip: (W,) long, CLIP token of each word.
        t5: (W,) long, T5 token of each word.
    """

    clip: torch.Tensor
    t5: torch.Tensor

    @classmethod
    def of(cls, words: Sequence[str]) -> "WordTokens":
        """Read the tables off freshly built tokenizers; raises `ValueError` for a word of several tokens."""
        clip, t5 = clip_tokenizer(words), t5_tokenizer(words)
        clip_rows = [clip(word, add_special_tokens=False).input_ids for word in words]
        t5_rows = [t5(word, add_special_tokens=False).input_ids for word in words]
        for word, *rows in zip(words, clip_rows, t5_rows, strict=True):
            if any(len(row) != 1 for row in rows):
                raise ValueError(
                    f"the word {word!r} is {rows} tokens (CLIP, T5); every world word must be one token"
                )
        return cls(
            clip=torch.tensor([row[0] for row in clip_rows]), t5=torch.tensor([row[0] for row in t5_rows])
        )

    def to(self, device: torch.device | str) -> "WordTokens":
        """The same tables on a device."""
        return WordTokens(clip=self.clip.to(device), t5=self.t5.to(device))

    def clip_ids(self, words: torch.Tensor) -> torch.Tensor:
        """Ids as the CLIP tokenizer pads them: begin, words, end up to the last column.

        Args:
            words: (B, N) long world word ids, -1 after the last word; N <= MAX_TOKENS - 2.

        Returns:
            (B, MAX_TOKENS) long.
        """
        _check_length(words, MAX_TOKENS - 2)
        ids = words.new_full((words.shape[0], MAX_TOKENS), _CLIP_EOS)
        ids[:, 0] = _CLIP_BOS
        # Padding and end are the same id, so a missing word and the closing token need no distinction.
        ids[:, 1 : words.shape[1] + 1] = torch.where(words >= 0, self.clip[words.clamp_min(0)], _CLIP_EOS)
        return ids

    def t5_ids(self, words: torch.Tensor) -> torch.Tensor:
        """Ids as the T5 tokenizer pads them: words, `</s>`, `<pad>` up to the last column.

        Args:
            words: (B, N) long world word ids, -1 after the last word; N <= MAX_TOKENS - 1.

        Returns:
            (B, MAX_TOKENS) long.
        """
        _check_length(words, MAX_TOKENS - 1)
        ids = words.new_full((words.shape[0], MAX_TOKENS), _T5_PAD)
        ids[:, : words.shape[1]] = torch.where(words >= 0, self.t5[words.clamp_min(0)], _T5_PAD)
        length = (words >= 0).sum(dim=1, keepdim=True)
        column = torch.arange(MAX_TOKENS, device=words.device)
        return torch.where(column == length, _T5_EOS, ids)


def _check_words(words: Sequence[str]) -> None:
    for word in words:
        if not _WORD.fullmatch(word):
            raise ValueError(
                f"{word!r} is no world word; accepted: lower-case letters, or one punctuation mark"
            )


def _check_length(words: torch.Tensor, most: int) -> None:
    if words.dim() != 2 or words.shape[1] > most:
        raise ValueError(f"word ids must be (B, N) with N <= {most}, got {tuple(words.shape)}")


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def _byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that leave every word as one piece; ties are broken by spelling."""
    spellings = [[*word[:-1], word[-1] + _END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spellings for pair in zip(pieces, pieces[1:], strict=False)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [_merged(pieces, best) for pieces in spellings]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of one word after one merge, left to right as the tokenizer applies it."""
    out: list[str] = []
    index = 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            out.append("".join(pair))
            index += 2
        else:
            out.append(pieces[index])
            index += 1
    return out
