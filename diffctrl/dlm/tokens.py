"""Prompts as token ids, special tokens, and ids as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffctrl.errors import BadRequestError

# A chat: [{"role": "user", "content": "..."}, ...].
Chat = Sequence[Mapping[str, str]]
# Shown for a token that is still masked.
BLANK = "░"
# How chat models end a turn; the first that the tokenizer knows counts.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids that decoding must know.

    Attributes:
        mask: of a position that is not decided yet.
        pad: at the left of shorter prompts; never attended, and not `mask`.
        eos: ends a text, or None.
        eot: ends a turn of a chat, or None.

    Raises:
        ValueError: `pad` is `mask`, so that padding would be decoded.
    """

    mask: int
    pad: int
    eos: int | None = None
    eot: int | None = None

    def __post_init__(self) -> None:
        if self.pad == self.mask:
            raise ValueError(f"the pad token {self.pad} is the mask token; padding would be decoded as text")

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids after which an answer is cut."""
        return tuple(each for each in (self.eos, self.eot) if each is not None)

    @classmethod
    def find(
        cls, tokenizer: Any, config: Any = None, settings: Mapping[str, Any] | None = None
    ) -> SpecialTokens:
        """The ids as `settings` say, else the model's config, else the tokenizer.

        Args:
            tokenizer: of transformers, or None.
            config: of the model; LLaDA and Dream write their ids there.
            settings: entries of a diffctrl.json: `mask_token_id`, `pad_token_id`, `eos_token_id`,
                `eot_token_id`.

        Raises:
            ValueError: none of them names a mask token, or the padding is the mask.
        """

        def named(key: str) -> int | None:
            for value in (
                (settings or {}).get(key),
                getattr(config, key, None),
                getattr(tokenizer, key, None),
            ):
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int):
                    return value
            return None

        mask, eos, pad = named("mask_token_id"), named("eos_token_id"), named("pad_token_id")
        if mask is None:
            raise ValueError(
                "neither the model's config nor its tokenizer names a mask token; write mask_token_id into "
                "the folder's diffctrl.json"
            )
        eot = named("eot_token_id")
        if eot is None and tokenizer is not None:
            known = tokenizer.get_vocab()
            eot = next((known[text] for text in _END_OF_TURN if text in known), None)
        if pad is None or (pad == mask and eos is not None):
            pad = eos if eos is not None else (0 if mask != 0 else 1)
        return cls(mask=mask, pad=pad, eos=eos, eot=eot)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A batch of prompts, shorter ones padded at the left.

    Attributes:
        ids: (B, P) int64.
        lengths: (B,) int64, real tokens of each row.
    """

    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]] | Tensor, pad: int) -> Prompts:
        """A batch from rows of ids, which may differ in length; a tensor (B, P) has no padding.

        Raises:
            ValueError: there is no row.

        >>> Prompts.of([[5, 6, 7], [8]], pad=0).ids.tolist()
        [[5, 6, 7], [0, 0, 8]]
        """
        if isinstance(rows, Tensor):
            if rows.ndim != 2 or rows.dtype != torch.int64 or not len(rows):
                raise ValueError(
                    f"prompts are (B, P) int64 with at least one row; got {tuple(rows.shape)} {rows.dtype}"
                )
            return cls(rows, torch.full((len(rows),), rows.shape[1], device=rows.device))
        listed = [torch.tensor(list(row), dtype=torch.int64) for row in rows]
        if not listed:
            raise ValueError("there is no prompt; pass at least one")
        longest = max(map(len, listed))
        ids = torch.full((len(listed), longest), pad)
        for row, tokens in zip(ids, listed, strict=True):
            row[longest - len(tokens) :] = tokens
        return cls(ids, torch.tensor([len(tokens) for tokens in listed]))

    @property
    def padding(self) -> Tensor:
        """(B,) int64: pad tokens at the left of each row."""
        return self.ids.shape[1] - self.lengths

    @property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return bool((self.padding > 0).any())

    def to(self, device: torch.device | str) -> Prompts:
        """The same batch on a device."""
        return Prompts(self.ids.to(device), self.lengths.to(device))


def as_batch(prompt: str | Chat | Sequence[str | Chat]) -> list[str | Chat]:
    """One prompt or several, each a text or a chat, as a list.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(prompt, str):
        return [prompt]
    listed = list(prompt) if isinstance(prompt, Sequence) else []
    if listed and all(isinstance(each, Mapping) for each in listed):
        return [listed]  # type: ignore[list-item]
    if listed and all(isinstance(each, str) or _is_chat(each) for each in listed):
        return listed  # type: ignore[return-value]
    raise ValueError(
        "a prompt is a text, a chat ([{'role': 'user', 'content': ...}, ...]), or a list of either; got "
        f"{type(prompt).__name__}"
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def encode(tokenizer: Any, prompts: Sequence[str | Chat], *, chat: bool | None = None) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        tokenizer: of transformers.
        prompts: texts and chats.
        chat: whether a text becomes the user's turn of a chat; None where the tokenizer has a chat template.

    Raises:
        BadRequestError: a chat is asked for, and the tokenizer has no template.
    """
    template = bool(getattr(tokenizer, "chat_template", None))
    chat = template if chat is None else chat
    rows = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and chat else prompt
        if isinstance(turns, str):
            rows.append(list(tokenizer(turns).input_ids))
            continue
        if not template:
            raise BadRequestError(
                "this model's tokenizer has no chat template; pass the prompt as plain text"
            )
        rows.append(
            list(
                tokenizer.apply_chat_template(
                    list(turns), add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        )
    return rows


def decode(tokenizer: Any, ids: Sequence[int], special: SpecialTokens, stop: Sequence[str] = ()) -> str:
    """The text of an answer: up to its first end token, then up to the first of the stop words.

    Called when everything is decoded: positions are not committed in order, and a stop word seen early could
    still get words before it. Tokens that are still masked, in the answer of an interrupted run, show as
    blanks.

    Args:
        ids: the generated tokens.
        stop: texts that end the answer and do not belong to it.
    """
    kept = list(ids)
    end = next((place for place, token in enumerate(kept) if token in special.ends), len(kept))
    pieces: list[str] = []
    run: list[int] = []
    for token in [*kept[:end], None]:
        if token is not None and token != special.mask:
            run.append(token)
            continue
        if run:
            pieces.append(tokenizer.decode(run, skip_special_tokens=True))
            run = []
        if token is not None:
            pieces.append(BLANK)
    text = "".join(pieces)
    places = [text.find(word) for word in stop if word and word in text]
    return text[: min(places)] if places else text
