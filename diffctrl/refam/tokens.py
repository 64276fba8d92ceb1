"""From an expression to tokens: which piece belongs to which word, and which columns a map is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffctrl.refam.words import STOP_WORDS, NounPhrase, Word, find_word, is_stop, noun_phrase, split_words

# content: says which object; outside: content of the expression beyond its noun phrase (the plate in "the cup
# left of the plate"); stop: words without content and punctuation; special: begin, end; pad: padding; magnet:
# all of a magnet, its end token too; context: of a caption before the expression.
Kind = Literal["content", "outside", "stop", "special", "pad", "magnet", "context"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as a tokenizer cuts it.

    Attributes:
        text: what was cut.
        ids: one id per piece.
        pieces: as the vocabulary spells them.
        spans: (start, stop) in characters of the text; (0, 0) for what is not of the text.
        special: whether a piece is one of the tokenizer's own.
    """

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, text: str, *, limit: int | None = None) -> Encoded:
    """Cut a text, special tokens included, without padding.

    Raises:
        ValueError: the text has more tokens than the limit; nothing is cut off.
        TypeError: the tokenizer knows no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no character offsets, which tell the tokens of a word; "
            f"load the "
            "tokenizer with a tokenizer.json (the fast class)"
        )
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False)
    ids = tuple(found["input_ids"])
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"{text!r} is {len(ids)} tokens for {type(tokenizer).__name__}, of {limit} at most; words "
            f"beyond it "
            "would have no map. Shorten the expression"
        )
    return Encoded(
        text=text,
        ids=ids,
        pieces=tuple(tokenizer.convert_ids_to_tokens(list(ids))),
        spans=tuple(tuple(span) for span in found["offset_mapping"]),
        special=tuple(bool(flag) for flag in found["special_tokens_mask"]),
    )


def word_of_each(encoded: Encoded, words: Sequence[Word]) -> tuple[int | None, ...]:
    """The word that each piece overlaps most, None for special pieces and those of no word.

    Spans are cut to what is not white space; word ids of tokenizers are not used, as for some of them "left."
    is one word.
    """
    owners: list[int | None] = []
    for (start, stop), special in zip(encoded.spans, encoded.special, strict=True):
        covered = encoded.text[start:stop]
        start += len(covered) - len(covered.lstrip())
        stop -= len(covered) - len(covered.rstrip())
        overlaps = [min(stop, word.stop) - max(start, word.start) for word in words]
        best = max(range(len(words)), key=overlaps.__getitem__, default=None)
        owners.append(None if special or best is None or overlaps[best] <= 0 else best)
    return tuple(owners)


@dataclass(frozen=True, slots=True)
class Token:
    """One text token of the attention.

    Attributes:
        index: among the text tokens, in the order of the attention.
        piece: as the vocabulary spells it.
        word: the word it belongs to, "" for none; of a magnet, the magnet.
        place: index of that word in the expression, None for others.
        kind: see `Kind`.
        encoder: of models that read a text twice, "clip" or "t5".
        kept: whether its column is in the sum.
        votes: blocks that flagged it as a sink.
    """

    index: int
    piece: str
    word: str
    place: int | None
    kind: Kind
    encoder: str
    kept: bool = False
    votes: int = 0


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All text tokens of a forward and the words of the expression."""

    expression: str
    words: tuple[Word, ...]
    tokens: tuple[Token, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def columns(self, *kinds: Kind, encoder: str | None = None) -> tuple[int, ...]:
        """Indices of the tokens of these kinds."""
        return tuple(
            token.index
            for token in self.tokens
            if token.kind in kinds and (encoder is None or token.encoder == encoder)
        )

    def of_word(
        self, word: str, *, encoder: str, occurrence: int = 0, pieces: str = "all"
    ) -> tuple[int, ...]:
        """Indices of the pieces of a word, all of them or the "first".

        Raises:
            ValueError: the expression has no such word.
        """
        place = find_word(self.words, word, occurrence)
        found = tuple(t.index for t in self.tokens if t.place == place and t.encoder == encoder)
        return found[:1] if pieces == "first" else found

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the columns that are summed."""
        return tuple(token.index for token in self.tokens if token.kept)

    def keeping(self, kept: Sequence[int], votes: Sequence[int]) -> TokenTable:
        """The table with these columns kept and these votes."""
        chosen = set(kept)
        return replace(
            self,
            tokens=tuple(replace(t, kept=t.index in chosen, votes=int(votes[t.index])) for t in self.tokens),
        )

    def counts(self) -> Mapping[str, int]:
        """Tokens of each kind."""
        return Counter(token.kind for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of text rows of one encoder, before the table numbers them.

    Attributes:
        encoded: what the rows are.
        role: "expression", or a whole magnet.
        padding: rows of padding after them.
        after: what text after the expression in its own run is: magnets joined to it, or context.
    """

    encoded: Encoded
    role: Literal["expression", "magnet"]
    encoder: str
    padding: int = 0
    after: Literal["magnet", "context"] = "magnet"


def token_table(
    expression: str,
    runs: Sequence[Piece],
    *,
    stop_words: frozenset[str] = STOP_WORDS,
    phrase: NounPhrase = "rules",
) -> TokenTable:
    """Number and classify the text rows of a forward.

    Args:
        expression: the referring expression.
        runs: the rows in the order of the attention. The expression's run may hold more text than the
            expression, before or after it (a caption as prefix, magnets joined to the string): what lies
            outside of the expression's own characters is context or magnet.
        stop_words: see `words.is_stop`.
        phrase: the noun-phrase filter.
    """
    words = split_words(expression)
    inside = noun_phrase(words, expression, phrase)
    stops = frozenset(index for index in range(len(words)) if is_stop(words, index, stop_words))
    tokens: list[Token] = []
    for run in runs:
        tokens += _rows(run, expression, words, inside, stops, len(tokens))
    return TokenTable(expression, words, tuple(tokens))


def _rows(
    run: Piece,
    expression: str,
    words: tuple[Word, ...],
    inside: frozenset[int],
    stops: frozenset[int],
    first: int,
) -> list[Token]:
    encoded, rows = run.encoded, []
    begin = encoded.text.rfind(expression) if run.role == "expression" else 0
    moved = [_moved(word, begin) for word in words]
    end = begin + len(expression)
    owners = word_of_each(encoded, moved) if run.role == "expression" else (None,) * len(encoded)
    for piece, span, special, owner in zip(
        encoded.pieces, encoded.spans, encoded.special, owners, strict=True
    ):
        word, kind = "", "special"
        if run.role == "magnet":
            word, kind = encoded.text, "magnet"
        elif owner is not None:
            word = words[owner].text
            kind = "stop" if owner in stops else "content" if owner in inside else "outside"
        elif not special and span[0] >= end:
            word, kind = encoded.text[span[0] : span[1]].strip(), run.after
        elif not special and span[1] <= begin:
            word, kind = encoded.text[span[0] : span[1]].strip(), "context"
        elif not special:
            kind = "stop"  # white space inside of the expression
        rows.append(Token(first + len(rows), piece, word, owner, kind, run.encoder))
    rows += [Token(first + len(rows) + i, "<pad>", "", None, "pad", run.encoder) for i in range(run.padding)]
    return rows


def _moved(word: Word, by: int) -> Word:
    """The word in a text that has `by` more characters before it."""
    return Word(word.text, word.start + by, word.stop + by, word.occurrence)
