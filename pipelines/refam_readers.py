"""What grounding asks of each stock pipeline: pictures to latents, text to rows, one forward at a noise level.

A reader knows one pipeline class and nothing of maps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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

_TEXTS_AT_ONCE = 64


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

    # --- text -------------------------------------------------------------------------------------------------

    def learn(self, texts: Sequence[str]) -> None:
        """Run the text encoders on what is not known yet, many texts at once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), _TEXTS_AT_ONCE):
            part = new[start : start + _TEXTS_AT_ONCE]
            with torch.no_grad():
                streams, pooled = self._embed(part)
            for index, text in enumerate(part):
                rows = {name: value[index] for name, value in streams.items()}
                self._known[text] = rows, None if pooled is None else pooled[index]

    def forget(self) -> None:
        """Drop the encoded texts."""
        self._known = {}

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
        table = token_table(expression, runs, phrase=config.noun_phrase)
        return TextRows(torch.cat(rows), self._known[caption][1], table, flags)

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

    # --- numbers ----------------------------------------------------------------------------------------------

    def place(self, tensor: Tensor) -> Tensor:
        """On the device and in the dtype of the denoiser."""
        model = self.pipe.transformer
        return tensor.to(device=self.pipe._execution_device, dtype=model.dtype)

    def noised(self, latents: Tensor, config: RefAMConfig, draw: int) -> Tensor:
        """x = (1 - sigma) x0 + sigma noise, (C, ...); a seed gives the same noise on every device.

        The noise of one picture does not depend on what else is in its batch.
        """
        generator = torch.Generator("cpu").manual_seed(config.seed + draw)
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
        return (1 - config.sigma) * latents.float().cpu() + config.sigma * noise


def _main_run(stream: Stream, main: str, embeds: Tensor, *, keep: bool) -> tuple[Piece, Tensor]:
    encoded = encode(stream.tokenizer, main, limit=stream.limit)
    padding = embeds.shape[0] - len(encoded) if keep else 0
    piece = Piece(encoded=encoded, role="expression", encoder=stream.name, padding=padding)
    return piece, embeds if keep else embeds[: len(encoded)]


def _without_begin(encoded: Encoded, begins: int) -> Encoded:
    cut = slice(begins, None)
    return Encoded(
        encoded.text, encoded.ids[cut], encoded.pieces[cut], encoded.spans[cut], encoded.special[cut]
    )


def _mode(posterior: Any) -> Tensor:
    return posterior.latent_dist.mode()


class SD3Reader(Reader):
    """Stable Diffusion 3 and 3.5: CLIP rows, then T5 rows; no mask, so that padding may be left out."""

    def _streams(self) -> tuple[Stream, ...]:
        pipe = self.pipe
        streams = [Stream("clip", pipe.tokenizer, pipe.tokenizer_max_length, begins=1)]
        if pipe.text_encoder_3 is not None:
            self._t5_length = min(256, int(pipe.tokenizer_3.model_max_length))
            streams.append(Stream("t5", pipe.tokenizer_3, self._t5_length))
        return tuple(streams)

    def _size(self) -> tuple[int, int]:
        pipe = self.pipe
        multiple = pipe.vae_scale_factor * pipe.patch_size
        self.longest_side = pipe.transformer.config.pos_embed_max_size * multiple
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return side * side, multiple

    def _embed(self, texts: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        pipe, clip = self.pipe, self.streams[0].limit
        length = self._t5_length if len(self.streams) > 1 else 1
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        streams = {"clip": embeds[:, :clip]}
        if len(self.streams) > 1:
            streams["t5"] = embeds[:, clip:]
        return streams, pooled

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = _mode(vae.encode(pixels[:1].to(device=self.pipe._execution_device, dtype=vae.dtype)))
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)[0]

    def forward(self, latents: Tensor, embeds: Tensor, pooled: Tensor | None, config: RefAMConfig) -> None:
        self.pipe.transformer(
            hidden_states=self.place(latents),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=torch.full((len(latents),), 1000.0 * config.sigma, device=embeds.device),
            return_dict=False,
        )


class FluxReader(Reader):
    """FLUX.1: T5 rows; every text token has the same rotary position, so that rows may be left out or added."""

    def _streams(self) -> tuple[Stream, ...]:
        self._length = min(512, int(self.pipe.tokenizer_2.model_max_length))
        return (Stream("t5", self.pipe.tokenizer_2, self._length),)

    def _size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side * side, 2 * self.pipe.vae_scale_factor

    def _embed(self, texts: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        embeds, pooled, _ = self.pipe.encode_prompt(texts, texts, max_sequence_length=self._length)
        return {"t5": embeds}, pooled

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = _mode(vae.encode(pixels[:1].to(device=self.pipe._execution_device, dtype=vae.dtype)))
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)[0]

    def forward(self, latents: Tensor, embeds: Tensor, pooled: Tensor | None, config: RefAMConfig) -> None:
        pipe, transformer = self.pipe, self.pipe.transformer
        batch, channels, height, width = latents.shape
        device, dtype = embeds.device, embeds.dtype
        sigma = torch.full((batch,), config.sigma, device=device)
        guided = transformer.config.guidance_embeds
        transformer(
            hidden_states=pipe._pack_latents(self.place(latents), batch, channels, height, width),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma.to(dtype),
            guidance=torch.full((batch,), config.guidance, device=device) if guided else None,
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
            return_dict=False,
        )


class MochiReader(Reader):
    """Mochi 1: T5 rows under a mask; the pipeline counts noise from the other end."""

    takes_caption = False

    def _streams(self) -> tuple[Stream, ...]:
        self._length = min(256, int(self.pipe.tokenizer.model_max_length))
        return (Stream("t5", self.pipe.tokenizer, self._length),)

    def _size(self) -> tuple[int, int]:
        pipe = self.pipe
        self.frame_step = self.frame_chunk = pipe.vae_temporal_scale_factor
        return pipe.default_height * pipe.default_width, pipe.vae_spatial_scale_factor * pipe.patch_size

    def _embed(self, texts: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        embeds = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self._length
        )[0]
        return {"t5": embeds}, None

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        video = pixels.transpose(0, 1)[None].to(device=self.pipe._execution_device, dtype=vae.dtype)
        latents = _mode(vae.encode(video)).float()
        mean, std = _statistics(vae, latents, 0.0, 1.0)
        return ((latents - mean) * vae.config.scaling_factor / std)[0]

    def forward(self, latents: Tensor, embeds: Tensor, pooled: Tensor | None, config: RefAMConfig) -> None:
        scheduler = self.pipe.scheduler.config
        level = 1 - config.sigma if scheduler.get("invert_sigmas", False) else config.sigma
        batch, length = embeds.shape[:2]
        self.pipe.transformer(
            hidden_states=self.place(latents),
            encoder_hidden_states=embeds,
            timestep=torch.full((batch,), 1000.0 * level, device=embeds.device, dtype=embeds.dtype),
            encoder_attention_mask=torch.ones(batch, length, device=embeds.device, dtype=torch.bool),
            return_dict=False,
        )


class WanReader(Reader):
    """Wan 2.1 and 2.2, text to video: UMT5 rows, read by cross-attention without a mask."""

    takes_caption = False

    def _streams(self) -> tuple[Stream, ...]:
        self._length = min(512, int(self.pipe.tokenizer.model_max_length))
        return (Stream("t5", self.pipe.tokenizer, self._length),)

    def _size(self) -> tuple[int, int]:
        pipe = self.pipe
        self.frame_step = pipe.vae_scale_factor_temporal
        self.frame_chunk = 4  # written into the autoencoder's encode, which drops what is left over
        return 480 * 832, pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]

    def _embed(self, texts: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        embeds = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self._length
        )[0]
        return {"t5": embeds}, None

    def denoiser(self, sigma: float) -> tuple[str, nn.Module]:
        boundary = self.pipe.config.boundary_ratio
        if boundary is not None and sigma < boundary:
            return "transformer_2", self.pipe.transformer_2
        return super().denoiser(sigma)

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        video = pixels.transpose(0, 1)[None].to(device=self.pipe._execution_device, dtype=vae.dtype)
        latents = _mode(vae.encode(video)).float()
        mean, std = _statistics(vae, latents, 0.0, 1.0)
        return ((latents - mean) / std)[0]

    def forward(self, latents: Tensor, embeds: Tensor, pooled: Tensor | None, config: RefAMConfig) -> None:
        _, model = self.denoiser(config.sigma)
        time = torch.full((len(latents),), 1000.0 * config.sigma, device=embeds.device)
        if self.pipe.config.expand_timesteps:  # Wan 2.2 TI2V takes a time for each token
            _, rows, columns = self.pipe.transformer.config.patch_size
            tokens = latents.shape[2] * (latents.shape[3] // rows) * (latents.shape[4] // columns)
            time = time[:, None].expand(-1, tokens)
        model(
            hidden_states=self.place(latents),
            timestep=time,
            encoder_hidden_states=embeds,
            return_dict=False,
        )


def _statistics(vae: Any, latents: Tensor, mean: float, std: float) -> tuple[Any, Any]:
    """The channel means and deviations that the autoencoder's configuration names, or the defaults."""
    found = []
    for name, default in (("latents_mean", mean), ("latents_std", std)):
        values = getattr(vae.config, name, None)
        found.append(default if values is None else torch.tensor(values).to(latents).view(1, -1, 1, 1, 1))
    return found[0], found[1]
