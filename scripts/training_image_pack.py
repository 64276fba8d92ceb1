"""One file with all weights of the image model, and the pipeline folder that is built from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffctrl.zoo.models import WEIGHT_NAMES, ImageParts, ImageSize, image_parts, image_pipeline

from .training_image_vae import SMOKE_SIZE

RECOMMENDED = {"num_inference_steps": 28, "guidance_scale": 3.0, "max_sequence_length": 32}
MAX_FILE_BYTES = 12_000_000


def component_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of one component by prefixed name; tied weights appear once."""
    saved = module.state_dict().keys()
    tensors = dict(module.named_parameters()) | {k: v for k, v in module.named_buffers() if k in saved}
    return {f"{name}.{key}": value.detach() for key, value in tensors.items()}


def write_pack(parts: ImageParts, path: Path, facts: dict[str, Any]) -> None:
    """Write every component as float16, with `facts` as JSON metadata.

    Args:
        parts: the components; the averaged weights, after training.
        path: the `.safetensors` file.
        facts: what the card reports; must hold "smoke", "shift", "scaling_factor" and "shift_factor".
    """
    tensors = {}
    for name, module in parts.items():
        for key, value in component_tensors(name, module).items():
            tensors[key] = value.half().cpu().contiguous()
    bad = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(f"float16 cannot hold these weights: {bad[:5]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})


def read_pack(path: Path) -> tuple[ImageParts, dict[str, Any]]:
    """Components in float32 evaluation mode, and the facts, out of a pack."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["facts"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    parts = image_parts(SMOKE_SIZE if facts["smoke"] else ImageSize())
    for name, module in parts.items():
        own = component_tensors(name, module)
        missing = [key for key in own if key not in tensors]
        if missing:
            raise ValueError(
                f"{path} lacks the weights {missing[:5]}; it was written for another architecture"
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors.pop(key))
        module.eval().requires_grad_(False)
    if tensors:
        raise ValueError(f"{path} has weights of no component: {list(tensors)[:5]}")
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
    _write_json(folder / "diffctrl.json", {"call": call, "kind": "image", "world": "shapes and characters"})
    weights = sorted(folder.rglob("*.safetensors"))
    too_large = [str(path) for path in weights if path.stat().st_size > MAX_FILE_BYTES]
    if too_large:
        raise ValueError(f"weight files must stay below {MAX_FILE_BYTES} bytes: {too_large}")
    hashes = {str(path.relative_to(folder)): file_hash(path) for path in weights}
    _write_json(folder / "metrics.json", {"training": facts, "evaluation": metrics or {}, "sha256": hashes})
    (folder / "README.md").write_text(_card(facts, metrics or {}, call))


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
    _write_json(out / "vae.json", {name: facts[name] for name in kept} | stage)


def _card(facts: dict[str, Any], metrics: dict[str, Any], call: dict[str, Any]) -> str:
    figures = metrics.get("figures", [])
    rows = "\n".join(
        "| {name} | {value:.1f} [{low:.1f}, {high:.1f}] {unit} | {bar} |".format(**row)
        for row in figures
        if row.get("low") is not None and row.get("bar") is not None
    )
    runs = []
    earlier = facts.get("started_from")
    while earlier:
        runs.append(f"{earlier['steps']} steps in {earlier['minutes']:.1f} minutes")
        earlier = earlier.get("started_from")
    history = f"\n  Before it, newest first: {'; '.join(runs)}." if runs else ""
    table = f"| figure | value [95 %] | bar |\n|---|---|---|\n{rows}\n" if rows else "Not evaluated yet.\n"
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
  Weights are the running average, stored as float16.{history}
- Autoencoder: {float(facts.get("psnr_mean_db", 0.0)):.1f} dB PSNR on average over unseen scenes.
- Call: the arguments in `diffctrl.json`, {call["height"]} px, {call["num_inference_steps"]} steps, guidance
  {call["guidance_scale"]}. Other sizes run and are less reliable; captions are at most 30 known words.

{table}
Made by `scripts/train_zoo_image.py`, measured by `scripts/evaluate_zoo.py`.
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
