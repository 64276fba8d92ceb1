"""One file with the weights of the text model, and the folder that is built from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffctrl.zoo.tasks import TOKENS, tokenizer
from diffctrl.zoo.tasks.vocabulary import EOS, MASK, PAD
from diffctrl.zoo.text import TextSize, text_model

RECOMMENDED = {"gen_length": 64, "steps": 64, "block_length": 64}
MAX_FILE_BYTES = 10_000_000


def write_pack(model: Any, path: Path, facts: dict[str, Any]) -> None:
    """Write the weights as float16, with `facts` and the architecture as JSON metadata.

    Raises:
        ValueError: float16 cannot hold a weight.
    """
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in model.named_parameters()}
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(f"float16 cannot hold these weights: {bad[:5]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"facts": json.dumps(facts | {"size": _size_of(model)})})


def read_pack(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32 evaluation mode, and the facts, out of a pack."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["facts"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = text_model(TextSize(**facts["size"]))
    own = dict(model.named_parameters())
    if own.keys() != tensors.keys():
        raise ValueError(
            f"{path} holds weights of another architecture: {sorted(own.keys() ^ tensors.keys())[:5]}"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])
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
    weights = sorted(folder.rglob("*.safetensors"))
    too_large = [str(path) for path in weights if path.stat().st_size > MAX_FILE_BYTES]
    if too_large:
        raise ValueError(f"weight files must stay below {MAX_FILE_BYTES} bytes: {too_large}")
    settings = {
        "kind": "text",
        "sampler": "llada",
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "call": RECOMMENDED,
        "longest": max(facts["lengths"]),
    }
    _write_json(folder / "diffctrl.json", settings)
    hashes = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights
    }
    _write_json(folder / "metrics.json", {"training": facts, "evaluation": metrics or {}, "sha256": hashes})
    (folder / "README.md").write_text(_card(facts, metrics or {}), encoding="utf-8")


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


def _card(facts: dict[str, Any], metrics: dict[str, Any]) -> str:
    rows = "\n".join(
        "| {name} | {value:.1f} [{low:.1f}, {high:.1f}] {unit} | {bar} |".format(**row)
        for row in metrics.get("figures", [])
        if row.get("low") is not None and row.get("bar") is not None
    )
    table = f"| figure | value [95 %] | bar |\n|---|---|---|\n{rows}\n" if rows else "Not evaluated yet.\n"
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
  {facts.get("device")}, optimizer {facts.get("optimizer")}. Weights are the running average, in float16.
- Call: the arguments in `diffctrl.json`. Prompts with their answers up to {max(facts["lengths"])} tokens.

{table}
Made by `scripts/train_zoo_text.py`, measured by `scripts/evaluate_dlm.py`.
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
