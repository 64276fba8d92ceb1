"""The model families by name, readable without importing torch. A test compares it with the classes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """What `diffctrl info` prints of a family.

    Attributes:
        title: the models, for people.
        model: the denoiser's class in diffusers.
    """

    title: str
    model: str


TEXT_FAMILIES: dict[str, FamilyEntry] = {
    "llada": FamilyEntry("LLaDA, LLaDA-1.5 (Llama run in both directions)", "LlamaForCausalLM"),
    "dream": FamilyEntry("Dream, DiffuCoder (Qwen2 run in both directions)", "Qwen2ForCausalLM"),
}

FAMILIES: dict[str, FamilyEntry] = {
    "sd3": FamilyEntry("Stable Diffusion 3 / 3.5", "SD3Transformer2DModel"),
    "flux": FamilyEntry("FLUX.1", "FluxTransformer2DModel"),
    "unet": FamilyEntry("Stable Diffusion / SDXL (UNet)", "UNet2DConditionModel"),
    "wan": FamilyEntry("Wan 2.1 / 2.2", "WanTransformer3DModel"),
    "wan_vace": FamilyEntry("Wan VACE", "WanVACETransformer3DModel"),
    "hunyuan_video": FamilyEntry("HunyuanVideo", "HunyuanVideoTransformer3DModel"),
    "hunyuan_video15": FamilyEntry("HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel"),
    "mochi": FamilyEntry("Mochi 1", "MochiTransformer3DModel"),
    "cogvideox": FamilyEntry("CogVideoX", "CogVideoXTransformer3DModel"),
    "ltx": FamilyEntry("LTX-Video", "LTXVideoTransformer3DModel"),
}
