"""One file with all weights of the video model, and the pipeline folder that is built from it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffctrl.zoo.video import VIDEO_WEIGHT_NAMES, VideoParts, VideoSize, video_parts, video_pipeline

from .training_loop import say
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
from .training_video_vae import SMOKE_SIZE, load_video_vae

RECOMMENDED = {"num_frames": 33, "num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": 32}
_VAE_FACTS = (
    "smoke",
    "decoder_width",
    "latents_mean",
    "latents_std",
    "psnr_mean_db",
    "psnr_5th_percentile_db",
)


def write_video_pack(parts: VideoParts, path: Path, facts: dict[str, Any]) -> None:
    """Write every component as float16, with `facts` ("smoke", "shift", latents...) as JSON metadata."""
    write_tensors(components_tensors(parts.items()), path, facts)


def read_video_pack(path: Path) -> tuple[VideoParts, dict[str, Any]]:
    """Components in float32 evaluation mode, and the facts, out of a pack."""
    facts = read_facts(path)
    size = SMOKE_SIZE if facts["smoke"] else VideoSize()
    parts = video_parts(replace(size, decoder_width=facts.get("decoder_width")))
    fill_tensors(components_tensors(parts.items()), path)
    for _, module in parts.items():
        module.eval().requires_grad_(False)
    parts.vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    return parts, facts


@dataclass(frozen=True, slots=True, kw_only=True)
class RedecodeOptions:
    """Options of `redecode`; the command line's names.

    Args:
        pack: of a trained model.
        vae: `vae.safetensors` that `vae --decoder` made of the pack's autoencoder, `vae.json` beside it.
        out: the pack that is written.
    """

    pack: Path
    vae: Path
    out: Path


def redecode(options: RedecodeOptions, *, since: float) -> None:
    """Put a decoder that was trained alone into a pack; all else stays.

    Raises:
        SystemExit: its latents are not those that the transformer was trained on.
    """
    parts, facts = read_video_pack(options.pack)
    vae = load_video_vae(options.vae)
    for name in ("encoder", "quant_conv"):
        stock, other = (getattr(each, name).state_dict() for each in (parts.vae, vae))
        if stock.keys() != other.keys() or any(not torch.equal(stock[key], other[key]) for key in stock):
            raise SystemExit(
                f"{options.vae} has another {name} than {options.pack}, so other latents than the "
                "transformer's; train it with: vae --decoder --start-from the pack's autoencoder"
            )
    stage = json.loads(options.vae.with_suffix(".json").read_text())
    vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    parts.vae = vae
    facts |= {name: stage[name] for name in ("decoder_width", "psnr_mean_db", "psnr_5th_percentile_db")}
    facts["decoder"] = {name: stage[name] for name in ("steps", "minutes", "device")}
    write_video_pack(parts, options.out, facts)
    say(f"{options.out}: a decoder of {stage['psnr_mean_db']:.2f} dB", since=since)


def assemble_video(pack: Path, folder: Path, *, metrics: dict[str, Any] | None = None) -> None:
    """Build the diffusers pipeline folder from a pack: weights, tokenizer, scheduler, card.

    Args:
        pack: file of `write_video_pack`.
        folder: made if needed; files of the same names are replaced.
        metrics: figures of scripts/evaluate_zoo_video.py, for `metrics.json` and the card.
    """
    parts, facts = read_video_pack(pack)
    pipeline = video_pipeline(parts, shift=float(facts["shift"]))
    for _, module in parts.items():
        module.half()
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    pixels = (SMOKE_SIZE if facts["smoke"] else VideoSize()).pixels
    call = {"height": pixels, "width": pixels, **RECOMMENDED}
    write_folder_files(
        folder,
        settings={"call": call, "kind": "video", "world": "clips"},
        facts=facts,
        metrics=metrics,
        card=_card(facts, metrics, call),
    )


def disassemble_video(folder: Path, out: Path) -> None:
    """Turn a folder of `assemble_video` back into `pack.safetensors`, `vae.safetensors` and `vae.json`."""
    from diffusers import WanPipeline

    facts = json.loads((folder / "metrics.json").read_text())["training"]
    pipeline: Any = WanPipeline.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    parts = VideoParts(**{name: getattr(pipeline, name) for name in VIDEO_WEIGHT_NAMES})
    write_video_pack(parts, out / "pack.safetensors", facts)
    weights = {name: value.half().contiguous() for name, value in parts.vae.state_dict().items()}
    save_file(weights, out / "vae.safetensors")
    stage = {"steps": facts["vae_steps"], "minutes": facts["vae_minutes"]}
    if "vae_started_from" in facts:
        stage["started_from"] = facts["vae_started_from"]
    write_json(out / "vae.json", {name: facts.get(name) for name in _VAE_FACTS} | stage)


def _card(facts: dict[str, Any], metrics: dict[str, Any] | None, call: dict[str, Any]) -> str:
    own = facts.get("decoder")
    autoencoder = (
        f"{float(facts.get('psnr_mean_db', 0.0)):.1f} dB PSNR on average over unseen clips; "
        f"{facts.get('vae_steps')} steps in {float(facts.get('vae_minutes', 0.0)):.1f} minutes."
        + history_line({"started_from": facts.get("vae_started_from")})
    )
    if own:
        autoencoder += (
            f"\n  Its decoder was trained further alone, {own['minutes']:.1f} minutes on {own['device']}."
        )
    return f"""---
license: apache-2.0
---
# shapes-wan

A tiny Wan pipeline (Wan transformer, causal AutoencoderKLWan, UMT5) that draws clips of one or two moving
shapes from captions of a generated world. It exists so that attention methods for video can be run and
measured offline, on a CPU. It knows no other clips: a figure measured on it says nothing of large models.

- Data: the generator `diffctrl.zoo.clips` at commit `{facts.get("commit", "unknown")}`; nothing else.
  5 % of the (colour, shape, motion) triples were never shown.
- Training: {facts.get("steps")} steps, {float(facts.get("minutes", 0.0)):.1f} minutes on
  {facts.get("device")}, optimizer {facts.get("optimizer")}, noise shift {facts.get("shift")}.
  Weights are the running average, stored as float16.{history_line(facts)}
- Autoencoder: {autoencoder}
- Call: the arguments in `diffctrl.json`; {call["num_frames"]} frames of {call["height"]} px. Longer clips run
  and are not what it was trained on.

{figures_table(metrics)}
Made by `scripts/train_zoo_video.py`, measured by `scripts/evaluate_zoo_video.py`.
"""
