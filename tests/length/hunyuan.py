"""A real, very small HunyuanVideoPipeline with random weights, autoencoder and text encoders included."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from diffctrl.zoo.tokenizers import clip_tokenizer, t5_tokenizer
from diffctrl.zoo.video import video_words


def hunyuan() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        )
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
        llama = LlamaModel(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=4,
                num_attention_heads=4,
                vocab_size=1024,
                pad_token_id=0,
            )
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=1024,
                projection_dim=8,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    tokenizer: Any = t5_tokenizer(video_words())
    tokenizer.model_max_length = 512
    tokenizer_2: Any = clip_tokenizer(video_words())
    tokenizer_2.model_max_length = 77
    pipe = HunyuanVideoPipeline(
        text_encoder=llama.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip.eval(),
        tokenizer_2=tokenizer_2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
