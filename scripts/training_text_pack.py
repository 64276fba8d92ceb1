"""One file with the weights of the text model, and the folder that is built from it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from diffctrl.zoo.tasks import TOKENS, tokenizer
from diffctrl.zoo.tasks.vocabulary import EOS, MASK, PAD
from diffctrl.zoo.text import TextSize, text_model

from .training_pack import (
    figures_table,
    fill_tensors,
    history_line,
    read_facts,
    write_folder_files,
    write_tensors,
)

RECOMMENDED = {"gen_length": 64, "steps": 64, "block_length": 64}
MAX_FILE_BYTES = 10_000_000


def write_pack(model: Any, path: Path, facts: dict[str, Any]) -> None:
    """Write the weights as float16, with `facts` and the architecture as JSON metadata.

    Raises:
        ValueError: float16 cannot hold a weight.
    """
    write_tensors(dict(model.named_parameters()), path, facts | {"size": _size_of(model)})


def read_pack(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32 evaluation mode, and the facts, out of a pack."""
    facts = read_facts(path)
    model = text_model(TextSize(**facts["size"]))
    fill_tensors(dict(model.named_parameters()), path)
    return model.eval().requires_grad_(False), facts


def assemble(pack: Path, folder: Path, *, metrics: dict[str, Any] | None = None) -> None:
    """Build the model's folder out of a pack: config, weights, tokenizer, recommended call, card.

    Args:
        pack: file of `write_pack`.
        folder: made if needed; files of the same names are replaced.
        metrics: figures of scripts/evaluate_dlm.py, for `metrics.json` and the card.
    """
    model, facts = read_pack(pack)
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = {
        "kind": "text",
        "sampler": "llada",
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "call": RECOMMENDED,
        "longest": max(facts["lengths"]),
    }
    write_folder_files(
        folder,
        settings=settings,
        facts=facts,
        metrics=metrics,
        card=_card(facts, metrics),
        max_bytes=MAX_FILE_BYTES,
    )


def disassemble(folder: Path, out: Path) -> None:
    """Turn a folder of `assemble` back into the pack that `train --start-from` takes.

    Args:
        folder: of the model, with its `metrics.json`.
        out: gets `pack.safetensors`.
    """
    facts = json.loads((folder / "metrics.json").read_text())["training"]
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    write_pack(model, out / "pack.safetensors", facts)


def _size_of(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "positions": config.max_position_embeddings,
    }


def _card(facts: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    size = facts["size"]
    return f"""---
license: apache-2.0
---
# scenes-lm

A tiny masked-diffusion language model: LLaDA's architecture (Llama without the causal mask) with
{size["layers"]} layers of {size["heads"]} heads and a vocabulary of {len(TOKENS)} words and characters. It
looks facts up in long texts, copies, reverses, sorts, adds, and answers where things are. It exists so that
sparse attention for diffusion language models can be run and measured offline, on a CPU. It knows no
language: a figure measured on it says nothing of LLaDA or Dream.

| you type | it answers |
|---|---|
| `facts brown cat 7 plum. grey fox 2 lemon. get grey fox` | `grey fox 2 lemon` |
| `scene red star left of blue ring. what is right of red star` | `blue ring` |
| `add 123 + 4567` | `4690` |
| `copy k3xq9z0w`, `reverse ...`, `sort ...` | the string, turned round, sorted |

- Text: words of `diffctrl.zoo.tasks.TOKENS`, letters, digits, `,`, `.` and `+`. Facts are adjective, noun,
  digit, food; between them may stand filler ("the of and ..."); up to 16 keys are asked for, with commas
  between. Strings have up to 60 characters, 32 to sort; numbers have up to 5 digits.
- Data: the generator `diffctrl.zoo.tasks` at commit `{facts.get("commit", "unknown")}`; nothing else. One sum
  in 64 was never shown.
- Training: {facts.get("steps")} steps of {facts.get("batch_tokens")} tokens in rows of
  {", ".join(map(str, facts["lengths"]))} tokens, {float(facts.get("minutes", 0.0)):.1f} minutes on
  {facts.get("device")}, optimizer {facts.get("optimizer")}.
  Weights are the running average, in float16.{history_line(facts)}
- Call: the arguments in `diffctrl.json`. Prompts with their answers up to {max(facts["lengths"])} tokens.

{figures_table(metrics)}
Made by `scripts/train_zoo_text.py`, measured by `scripts/evaluate_dlm.py`.
"""
