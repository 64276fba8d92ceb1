"""One file with all weights of the image model, and the pipeline folder that is built from it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffctrl.zoo.models import WEIGHT_NAMES, ImageParts, ImageSize, image_parts, image_pipeline

from .training_image_vae import SMOKE_SIZE
from .training_pack import (
    components_tensors,
    figures_table,
    fill_tensors,
    history_line,
    read_facts,
    write_folder_files,
    write_json,
    write_tensors,
)

RECOMMENDED = {"num_inference_steps": 28, "guidance_scale": 3.0, "max_sequence_length": 32}


def write_pack(parts: ImageParts, path: Path, facts: dict[str, Any]) -> None:
    """Write every component as float16, with `facts` as JSON metadata.

    Args:
        parts: the components; the averaged weights, after training.
        path: the `.safetensors` file.
        facts: what the card reports; must hold "smoke", "shift", "scaling_factor" and "shift_factor".
    """
    write_tensors(components_tensors(parts.items()), path, facts)


def read_pack(path: Path) -> tuple[ImageParts, dict[str, Any]]:
    """Components in float32 evaluation mode, and the facts, out of a pack."""
    facts = read_facts(path)
    parts = image_parts(SMOKE_SIZE if facts["smoke"] else ImageSize())
    fill_tensors(components_tensors(parts.items()), path)
    for _, module in parts.items():
        module.eval().requires_grad_(False)
    parts.vae.register_to_config(scaling_factor=facts["scaling_factor"], shift_factor=facts["shift_factor"])
    return parts, facts


def assemble(pack: Path, folder: Path, *, metrics: dict[str, Any] | None = None) -> None:
    """Build the diffusers pipeline folder from a pack: weights, tokenizers, scheduler, card.

    Args:
        pack: file of `write_pack`.
        folder: made if needed; files of the same names are replaced.
        metrics: figures of the evaluation, for `metrics.json` and the card.
    """
    parts, facts = read_pack(pack)
    pipeline = image_pipeline(parts, shift=float(facts["shift"]))
    for _, module in parts.items():
        module.half()
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    pixels = pipeline.vae.config.sample_size
    call = {"height": pixels, "width": pixels, **RECOMMENDED}
    write_folder_files(
        folder,
        settings={"call": call, "kind": "image", "world": "shapes and characters"},
        facts=facts,
        metrics=metrics,
        card=_card(facts, metrics, call),
    )


def disassemble(folder: Path, out: Path) -> None:
    """Turn a pipeline folder of `assemble` back into what training continues from.

    Args:
        folder: the pipeline folder, with its `metrics.json`.
        out: gets `pack.safetensors` (for `sd3 --start-from`) and `vae.safetensors` with `vae.json` (for
            `sd3 --vae`).
    """
    from diffusers import StableDiffusion3Pipeline

    facts = json.loads((folder / "metrics.json").read_text())["training"]
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    parts = ImageParts(**{name: getattr(pipeline, name) for name in WEIGHT_NAMES})
    write_pack(parts, out / "pack.safetensors", facts)
    weights = {name: value.half().contiguous() for name, value in parts.vae.state_dict().items()}
    save_file(weights, out / "vae.safetensors")
    kept = ("smoke", "scaling_factor", "shift_factor", "psnr_mean_db", "psnr_5th_percentile_db")
    stage = {"steps": facts["vae_steps"], "minutes": facts["vae_minutes"]}
    write_json(out / "vae.json", {name: facts[name] for name in kept} | stage)


def _card(facts: dict[str, Any], metrics: dict[str, Any] | None, call: dict[str, Any]) -> str:
    return f"""---
license: apache-2.0
---
# shapes-sd3

A tiny Stable Diffusion 3 pipeline (SD3 transformer, AutoencoderKL, two CLIP encoders, T5) that draws shapes
and characters from captions of a generated world. It exists so that attention methods can be run and
measured offline, on a CPU. It knows no other pictures: a figure measured on it says nothing of large ones.

- Data: the generator `diffctrl.zoo.worlds` at commit `{facts.get("commit", "unknown")}`; nothing else.
  Captions name only part of a scene; 5 % of the (colour, shape, pattern) triples were never shown.
- Training: {facts.get("steps")} steps of {facts.get("batch")}, {float(facts.get("minutes", 0.0)):.1f} minutes
  on {facts.get("device")}, optimizer {facts.get("optimizer")}, noise shift {facts.get("shift")}.
  Weights are the running average, stored as float16.{history_line(facts)}
- Autoencoder: {float(facts.get("psnr_mean_db", 0.0)):.1f} dB PSNR on average over unseen scenes.
- Call: the arguments in `diffctrl.json`, {call["height"]} px, {call["num_inference_steps"]} steps, guidance
  {call["guidance_scale"]}. Other sizes run and are less reliable; captions are at most 30 known words.

{figures_table(metrics)}
Made by `scripts/train_zoo_image.py`, measured by `scripts/evaluate_zoo.py`.
"""
