"""What the training of a length LoRA needs of a pipeline: latents, embeddings of captions, velocities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffctrl.errors import BadRequestError


class VelocityModel(ABC):
    """A flow-matching video pipeline in training: x_t = (1 - t) x_0 + t e, and e - x_0 is to be predicted.

    Args:
        pipe: the stock pipeline.
        max_sequence_length: tokens that captions are padded to; None for the pipeline's own.
    """

    # Components that make latents and embeddings, and are not needed afterwards.
    encoders: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self._length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def shift(self) -> float:
        """How far the scheduler leans to high noise."""
        return shift_of(self.pipe.scheduler.config)

    @property
    def scale(self) -> float:
        """Timesteps of the transformer per unit of noise level."""
        return float(self.pipe.scheduler.config.num_train_timesteps)

    @abstractmethod
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, C, F, h, w) float32 of clips (B, T, 3, H, W) in [-1, 1]: what the transformer is trained on."""

    @abstractmethod
    def embeddings(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        """What the transformer gets of captions, by the names of its arguments; first axis B."""

    def trimmed(self, text: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings without the padding that none of the rows needs."""
        return text

    def call(self, model: Any, noisy: Tensor, level: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The prediction of e - x_0.

        Args:
            model: the transformer, or what it was wrapped in for several processes.
            noisy: (B, C, F, h, w) float32.
            level: (B,) float32 noise levels in [0, 1].
            text: of `embeddings`.

        Returns:
            (B, C, F, h, w).
        """
        dtype = self.transformer.dtype
        arguments = {name: x.to(dtype) if x.is_floating_point() else x for name, x in text.items()}
        arguments |= self.constants(len(noisy), noisy.device, dtype)
        return model(
            hidden_states=noisy.to(dtype),
            timestep=level * self.scale,
            return_dict=False,
            **arguments,
        )[0]

    def constants(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Further arguments, the same for all clips."""
        return {}


class WanVelocity(VelocityModel):
    """Wan 2.1 and Wan 2.2 5B, text to video."""

    encoders = ("vae", "text_encoder")

    def latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean = vae.encode(pixels.transpose(1, 2).to(vae.device, vae.dtype)).latent_dist.mode().float()
        shift, scale = (
            torch.tensor(values, device=mean.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (mean - shift) / scale

    def embeddings(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=device, **self._length
        )
        return {"encoder_hidden_states": embeds}


class HunyuanVelocity(VelocityModel):
    """HunyuanVideo, whose guidance was distilled into an argument; it gets the pipeline's default scale."""

    encoders = ("vae", "text_encoder", "text_encoder_2")
    GUIDANCE = 6.0

    def latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        vae.enable_tiling()  # whole clips of this size do not fit
        mean = vae.encode(pixels.transpose(1, 2).to(vae.device, vae.dtype)).latent_dist.mode().float()
        return mean * vae.config.scaling_factor

    def embeddings(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, pooled, mask = self.pipe.encode_prompt(captions, device=device, **self._length)
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "pooled_projections": pooled,
        }

    def trimmed(self, text: dict[str, Tensor]) -> dict[str, Tensor]:
        longest = int(text["encoder_attention_mask"].sum(1).max())
        padded = ("encoder_hidden_states", "encoder_attention_mask")
        return text | {name: text[name][:, :longest] for name in padded}

    def constants(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.transformer.config.guidance_embeds:
            return {}
        return {"guidance": torch.full((batch,), 1000.0 * self.GUIDANCE, device=device, dtype=dtype)}


def shift_of(config: Any) -> float:
    """The shift of a scheduler's configuration.

    Raises:
        BadRequestError: it depends on the size of the clip, or the scheduler is none of flow matching.
    """
    if config.get("use_dynamic_shifting"):
        raise BadRequestError(
            "the scheduler of this model shifts noise by the clip's size; a training needs one shift"
        )
    name = config.get("_class_name", "")
    if "shift" in config and "FlowMatch" in name:
        return float(config["shift"])
    if config.get("use_flow_sigmas"):
        return float(config.get("flow_shift", 1.0))
    raise BadRequestError(f"the scheduler {name} is none of flow matching, which the objective is made for")
