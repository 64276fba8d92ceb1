"""What the packs of weights share: one float16 file with facts, and the model folder built out of it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MAX_FILE_BYTES = 12_000_000


def component_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of one component by prefixed name; tied weights appear once."""
    saved = module.state_dict().keys()
    tensors = dict(module.named_parameters()) | {k: v for k, v in module.named_buffers() if k in saved}
    return {f"{name}.{key}": value.detach() for key, value in tensors.items()}


def components_tensors(components: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """`component_tensors` of several components."""
    return {k: v for name, module in components for k, v in component_tensors(name, module).items()}


def write_tensors(tensors: dict[str, Tensor], path: Path, facts: dict[str, Any]) -> None:
    """Write tensors as float16, with `facts` as JSON metadata.

    Raises:
        ValueError: float16 cannot hold a weight.
    """
    halves = {name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}
    bad = [name for name, value in halves.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(f"float16 cannot hold these weights: {bad[:5]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, path, metadata={"facts": json.dumps(facts)})


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a file of `write_tensors`.

    Raises:
        ValueError: the file carries none.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "facts" not in metadata:
        raise ValueError(f"{path} has no facts of a training; give a pack that a training has written")
    return json.loads(metadata["facts"])


@torch.no_grad()
def fill_tensors(own: dict[str, Tensor], path: Path) -> None:
    """Copy a file of `write_tensors` into existing tensors of the same names and shapes.

    Raises:
        ValueError: it holds weights of another architecture.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
        different = sorted(own.keys() ^ names) or [
            name for name, value in own.items() if list(value.shape) != shapes[name]
        ]
        if different:
            raise ValueError(f"{path} was written for another architecture; it differs in {different[:5]}")
        for name, value in own.items():
            value.copy_(file.get_tensor(name))


def write_folder_files(
    folder: Path,
    *,
    settings: dict[str, Any],
    facts: dict[str, Any],
    metrics: dict[str, Any] | None,
    card: str,
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """What stands beside the weights of a model folder: `diffctrl.json`, `metrics.json` and the card.

    Args:
        folder: with the weights in it.
        settings: of `diffctrl.json`.
        facts: of the training.
        metrics: figures of the evaluation.
        card: text of README.md.
        max_bytes: that no weight file may exceed.

    Raises:
        ValueError: a weight file is too large for the package.
    """
    weights = sorted(folder.rglob("*.safetensors"))
    too_large = [str(path) for path in weights if path.stat().st_size > max_bytes]
    if too_large:
        raise ValueError(f"weight files must stay below {max_bytes} bytes: {too_large}")
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in weights}
    write_json(folder / "diffctrl.json", settings)
    write_json(folder / "metrics.json", {"training": facts, "evaluation": metrics or {}, "sha256": hashes})
    (folder / "README.md").write_text(card, encoding="utf-8")


def figures_table(metrics: dict[str, Any] | None) -> str:
    """The card's table: every figure that has an interval and a bar."""
    rows = "\n".join(
        "| {name} | {value:.1f} [{low:.1f}, {high:.1f}] {unit} | {bar} |".format(
            **row | {"bar": row["bar"] if row.get("holds", True) else f"{row['bar']}: missed"}
        )
        for row in (metrics or {}).get("figures", [])
        if row.get("low") is not None and row.get("bar") is not None
    )
    return f"| figure | value [95 %] | bar |\n|---|---|---|\n{rows}\n" if rows else "Not evaluated yet.\n"


def started_from(pack: Path | None) -> dict[str, Any]:
    """What the facts of a run say of the pack that it started from; empty for random weights."""
    if pack is None:
        return {}
    before = read_facts(pack)
    return {
        "started_from": {name: before.get(name) for name in ("steps", "minutes", "commit", "started_from")}
    }


def history_line(facts: dict[str, Any]) -> str:
    """The card's line about the runs whose weights this one started from; empty where there are none."""
    runs = []
    earlier = facts.get("started_from")
    while earlier:
        runs.append(f"{earlier['steps']} steps in {earlier['minutes']:.1f} minutes")
        earlier = earlier.get("started_from")
    return f"\n  Before it, newest first: {'; '.join(runs)}." if runs else ""


def write_json(path: Path, value: Any) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
