"""The readers of the pipelines that can ground, one class each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffctrl.pipelines.refam_readers import Reader, Stream
from diffctrl.refam import RefAMConfig


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
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        streams = {"clip": embeds[:, :clip]}
        if len(self.streams) > 1:
            streams["t5"] = embeds[:, clip:]
        return streams, pooled

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = _mode(vae.encode(pixels[:1].to(device=self.device, dtype=vae.dtype)))
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
    """FLUX.1: T5 rows; every text token has the same rotary position, so that rows may be left out or
    added."""

    _grid: tuple[Any, ...] | None = None

    def _streams(self) -> tuple[Stream, ...]:
        self._length = min(512, int(self.pipe.tokenizer_2.model_max_length))
        return (Stream("t5", self.pipe.tokenizer_2, self._length),)

    def _size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side * side, 2 * self.pipe.vae_scale_factor

    def _embed(self, texts: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            texts, texts, device=self.device, max_sequence_length=self._length
        )
        return {"t5": embeds}, pooled

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = _mode(vae.encode(pixels[:1].to(device=self.device, dtype=vae.dtype)))
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)[0]

    def forward(self, latents: Tensor, embeds: Tensor, pooled: Tensor | None, config: RefAMConfig) -> None:
        pipe, transformer = self.pipe, self.pipe.transformer
        batch, channels, height, width = latents.shape
        device, dtype = embeds.device, embeds.dtype
        sigma = torch.full((batch,), config.sigma, device=device)
        guided = transformer.config.guidance_embeds
        grid = height // 2, width // 2, device, dtype
        if self._grid != grid:  # kept: they come from the host and are read again, which waits for the card
            self._grid, self._ids = grid, pipe._prepare_latent_image_ids(batch, *grid)
        transformer(
            hidden_states=pipe._pack_latents(self.place(latents), batch, channels, height, width),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma.to(dtype),
            guidance=torch.full((batch,), config.guidance, device=device) if guided else None,
            img_ids=self._ids,
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
            texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._length,
        )[0]
        return {"t5": embeds}, None

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        video = pixels.transpose(0, 1)[None].to(device=self.device, dtype=vae.dtype)
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
            texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._length,
        )[0]
        return {"t5": embeds}, None

    def denoiser(self, sigma: float) -> tuple[str, nn.Module]:
        boundary = self.pipe.config.boundary_ratio
        if boundary is not None and sigma < boundary:
            return "transformer_2", self.pipe.transformer_2
        return super().denoiser(sigma)

    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        video = pixels.transpose(0, 1)[None].to(device=self.device, dtype=vae.dtype)
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
