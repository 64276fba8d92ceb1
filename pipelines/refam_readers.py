"""What grounding asks of each stock pipeline: pictures to latents, text to rows, one forward at a noise
level.

A reader knows one pipeline class and nothing of maps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffctrl.control.prefix import has_diffusers_hooks
from diffctrl.refam import (
    Encoded,
    Piece,
    RefAMConfig,
    TokenTable,
    choose_magnets,
    encode,
    split_words,
    token_table,
)
from diffctrl.refam.words import NounPhrase


@dataclass(frozen=True, slots=True)
class Stream:
    """One text encoder whose rows reach the attention.

    Attributes:
        name: "clip" or "t5".
        tokenizer: of transformers.
        limit: tokens at most, special ones included.
        begins: special tokens before a text, which a magnet is cut off.
    """

    name: str
    tokenizer: Any
    limit: int
    begins: int = 0


@dataclass(frozen=True, slots=True)
class TextRows:
    """An expression as the model reads it.

    Attributes:
        embeds: (T, C).
        pooled: (P,), or None where the model takes none.
        table: of the T tokens.
        flags: what went another way than planned, in words.
    """

    embeds: Tensor
    pooled: Tensor | None
    table: TokenTable
    flags: Mapping[str, str]


class Reader(ABC):
    """Base of the readers.

    Attributes:
        streams: the text encoders in the order of the attention.
        area: pixels that the model was trained on.
        multiple: that both sides must be a multiple of.
        longest_side: in pixels, or None for no limit.
        frame_step: frames of a latent frame after the first one; 0 where the model knows pictures alone.
        frame_chunk: frames that the autoencoder takes at a time after the first one.
        device: of the denoiser's inputs.
    """

    longest_side: int | None = None
    frame_step: int = 0
    frame_chunk: int = 1
    takes_caption: ClassVar[bool] = True

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.streams: tuple[Stream, ...] = self._streams()
        self.area, self.multiple = self._size()
        self._known: dict[str, tuple[dict[str, Tensor], Tensor | None]] = {}
        self.settle()

    def settle(self) -> None:
        """Look up where the models run, once a call: the pipeline's own answer is a walk over all modules.

        It is asked for only where weights wait elsewhere than they run.
        """
        pipe = self.pipe
        self.device: torch.device = next(pipe.transformer.parameters()).device
        self._beside: torch.cuda.Stream | None = None
        if self.device.type in ("cpu", "meta") or pipe.hf_device_map:
            self.device = pipe._execution_device
        elif self.device.type == "cuda":
            self._beside = _stream(self.device)
            self._beside.wait_stream(torch.cuda.current_stream(self.device))
        vars(self).pop("dtype", None)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's inputs; a walk too, and not needed until the autoencoder runs."""
        return self.pipe.transformer.dtype

    @abstractmethod
    def _streams(self) -> tuple[Stream, ...]: ...

    @abstractmethod
    def _size(self) -> tuple[int, int]:
        """(area, multiple) in pixels."""

    @abstractmethod
    def _embed(self, texts: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        """((N, L, C) by stream, (N, P) pooled or None), padded as the model is used to."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents without a batch axis, from (F, 3, H, W) in [-1, 1]; posterior mean."""

    @abstractmethod
    def forward(self, latents: Tensor, embeds: Tensor, pooled: Tensor | None, config: RefAMConfig) -> None:
        """Run the denoiser once.

        Args:
            latents: (B, ...), noised, in the encoder's layout.
            embeds: (B, T, C).
            pooled: (B, P) or None.
            config: the noise level and the guidance.
        """

    def denoiser(self, sigma: float) -> tuple[str, nn.Module]:
        """(component name, module) of the model that is used at this noise level."""
        return "transformer", self.pipe.transformer

    def encoder(self, wanted: str) -> str:
        """The stream that maps are read of.

        Raises:
            ValueError: the model has no such text encoder, or it is not loaded.
        """
        names = [stream.name for stream in self.streams]
        if wanted == "auto":
            return "t5" if "t5" in names else names[0]
        if wanted not in names:
            raise ValueError(
                f"encoder={wanted!r}: this {type(self.pipe).__name__} reads text with {', '.join(names)}"
            )
        return wanted

    # --- text -----------------------------------------------------------------------------------------------

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On a GPU, what is inside runs beside what it was given since `settle`; what follows waits for both.

        Text encoders are many small kernels, slow to launch, the autoencoder is few large ones.
        Memory that is made inside is used again only by a later call, which waits for this one.
        """
        if self._beside is None:
            yield
            return
        try:
            with torch.cuda.stream(self._beside):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)

    def learn(self, texts: Sequence[str]) -> None:
        """Run the text encoders on what is not known yet.

        One text at a time: in a batch the last bits would depend on the other texts.
        """
        for text in dict.fromkeys(texts):
            if text not in self._known:
                with torch.no_grad():
                    streams, pooled = self._embed([text])
                rows = {name: value[0] for name, value in streams.items()}
                self._known[text] = rows, None if pooled is None else pooled[0]

    def forget(self, keep: Sequence[str] = ()) -> None:
        """Drop the encoded texts: padded, each takes megabytes in a large model."""
        self._known = {text: rows for text, rows in self._known.items() if text in keep}

    def texts(self, expression: str, config: RefAMConfig, more: Sequence[str] = ()) -> list[str]:
        """Every text that `rows` of the same arguments will read."""
        main, magnets = self._parts(expression, config, more)
        return [main, *magnets, config.caption or expression]

    def rows(self, expression: str, config: RefAMConfig, more: Sequence[str] = ()) -> TextRows:
        """The text rows of an expression with its magnets.

        Args:
            expression: single spaces between words.
            config: settings.
            more: further magnets.

        Raises:
            ValueError: the expression is too long for the text encoder that is read.
        """
        main, magnets = self._parts(expression, config, more)
        caption = config.caption or expression
        self.learn([main, *magnets, caption])
        read = self.encoder(config.encoder)
        runs: list[Piece] = []
        rows: list[Tensor] = []
        flags: dict[str, str] = {}
        for stream in self.streams:
            length = len(encode(stream.tokenizer, main))
            if length > stream.limit and stream.name != read:
                flags["cut"] = f"{stream.name} reads {stream.limit} of the {length} tokens"
                continue  # its cut rows would only be context; the stream that is read has all
            embeds = self._known[main][0][stream.name]
            piece, kept = _main_run(stream, main, embeds, keep=config.padding == "keep")
            runs.append(piece)
            rows.append(kept)
            for magnet in magnets:
                encoded = encode(stream.tokenizer, magnet, limit=stream.limit)
                whole = self._known[magnet][0][stream.name]
                runs.append(
                    Piece(encoded=_without_begin(encoded, stream.begins), role="magnet", encoder=stream.name)
                )
                rows.append(whole[stream.begins : len(encoded)])
        if config.caption and not self.takes_caption and not config.caption_as_prefix:
            flags["caption"] = "this model has no pooled text vector, so the caption had no effect"
        table = token_table(expression, runs, phrase=phrase_rule(config))
        return TextRows(torch.cat(rows), self._known[caption][1], table, flags)

    def prompt_table(self, prompt: str, expression: str, config: RefAMConfig, length: int) -> TokenTable:
        """The table of a whole prompt as the stock pipeline pads it, for maps while it draws.

        Args:
            prompt, expression: the expression is a part of the prompt.
            config: settings.
            length: text rows of the forward.

        Raises:
            ValueError: the prompt is too long for a text encoder.
        """
        runs, left = [], length
        for stream in self.streams:
            encoded = encode(stream.tokenizer, prompt)
            rows = left if stream is self.streams[-1] else stream.limit
            left -= rows
            if len(encoded) > rows:
                raise ValueError(f"the prompt is {len(encoded)} tokens for {stream.name}, of {rows} at most")
            runs.append(
                Piece(
                    encoded=encoded,
                    role="expression",
                    encoder=stream.name,
                    padding=rows - len(encoded),
                    after="context",
                )
            )
        return token_table(expression, runs, phrase=phrase_rule(config))

    def _parts(
        self, expression: str, config: RefAMConfig, more: Sequence[str]
    ) -> tuple[str, tuple[str, ...]]:
        """(the text that holds the expression, magnets that are encoded by themselves)."""
        magnets = choose_magnets((*config.active_magnets, *more), split_words(expression))
        main = expression
        if config.caption_as_prefix and config.caption:
            main = f"{config.caption} {main}"
        if config.magnet_encoding == "joint":
            return " ".join([main, *magnets]), ()
        return main, magnets

    # --- numbers --------------------------------------------------------------------------------------------

    def place(self, tensor: Tensor) -> Tensor:
        """On the device and in the dtype of the denoiser."""
        return tensor.to(device=self.device, dtype=self.dtype)

    def noised(self, latents: Tensor, config: RefAMConfig, draw: int) -> Tensor:
        """x = (1 - sigma) x0 + sigma noise, (C, ...); a seed gives the same noise on every device.

        The noise of one picture does not depend on what else is in its batch.
        """
        generator = torch.Generator("cpu").manual_seed(config.seed + draw)
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
        if latents.is_cuda:  # the host goes on at once
            noise = noise.pin_memory().to(latents.device, non_blocking=True)
        return (1 - config.sigma) * latents.float() + config.sigma * noise.to(latents.device)


def is_offloaded(model: Any) -> bool:
    """Whether hooks move parts of a model about, which a forward that breaks off would leave half moved."""
    return any("_hf_hook" in vars(module) or has_diffusers_hooks(module) for module in model.modules())


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """A card's stream for the text encoders, whose kernels go between those of the autoencoder."""
    return torch.cuda.Stream(device, priority=-1)


def phrase_rule(config: RefAMConfig) -> NounPhrase:
    """How the words of a table are told apart, also where the filter is off: one table serves both."""
    return "rules" if config.noun_phrase == "off" else config.noun_phrase


def _main_run(stream: Stream, main: str, embeds: Tensor, *, keep: bool) -> tuple[Piece, Tensor]:
    encoded = encode(stream.tokenizer, main, limit=stream.limit)
    padding = embeds.shape[0] - len(encoded) if keep else 0
    piece = Piece(encoded=encoded, role="expression", encoder=stream.name, padding=padding)
    return piece, embeds if keep else embeds[: len(encoded)].clone()  # a view would hold the padding


def _without_begin(encoded: Encoded, begins: int) -> Encoded:
    cut = slice(begins, None)
    return Encoded(
        encoded.text, encoded.ids[cut], encoded.pieces[cut], encoded.spans[cut], encoded.special[cut]
    )
