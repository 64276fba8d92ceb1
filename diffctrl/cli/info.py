"""`diffctrl info`: what a picture, clip, text or mask was made with, or what this installation can do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from diffctrl.cli.output import complaints, prepare_libraries
from diffctrl.cli.tables import as_text, new_table


def info(
    file: Annotated[
        Path | None, typer.Argument(help="A PNG or MP4 of `generate`, or a JSON of `text` or `ground`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the recipe of a file; without a file, embedded models, methods and model families."""
    prepare_libraries()
    with complaints():
        if file is None:
            _print_inventory(as_json)
        else:
            _print_recipe(file, as_json)


def _print_recipe(file: Path, as_json: bool) -> None:
    import json

    from rich.console import Console

    from diffctrl.drawing import files

    if file.suffix.lower() == ".json":
        found = _recipe_in_json(file)
        text, rows = json.dumps(found, ensure_ascii=False), list(_rows_of(found))
    else:
        recipe = files.read_recipe(file)
        text, rows = recipe.to_json(), _recipe_rows(recipe)
    if as_json:
        print(text)
        return
    table = new_table(file.name)
    for name, value in rows:
        table.add_row(name, as_text(value))
    Console().print(table)


def _recipe_in_json(file: Path) -> dict[str, Any]:
    """The recipe of an answer or a grounding.

    Raises:
        BadRequestError: there is no such file, or it carries none.
    """
    import json

    from diffctrl.errors import BadRequestError

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRequestError(f"there is no file {file}") from None
    except (OSError, ValueError):
        raise BadRequestError(f"{file} is not a JSON file that can be read") from None
    recipe = found.get("recipe") if isinstance(found, dict) else None
    if not isinstance(recipe, dict):
        raise BadRequestError(
            f"{file} carries no recipe: neither `diffctrl text --out` nor `diffctrl ground` wrote it"
        )
    return recipe


def _rows_of(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every value of a recipe; tables and lists inside it in one cell each."""
    for name, value in table.items():
        parts = value if isinstance(value, list) else [value]
        lines = [
            ", ".join(f"{key}={each}" for key, each in part.items()) if isinstance(part, dict) else str(part)
            for part in parts
            if part is not None
        ]
        yield name.replace("_", " "), "\n".join(lines) or "-"


def _recipe_rows(recipe: Any) -> list[tuple[str, str]]:
    controls = [
        f"{spec.method}({', '.join(f'{name}={value}' for name, value in spec.settings.items())})"
        for spec in recipe.controls
    ]
    weights = recipe.weights
    size = f"{weights.bytes:,} bytes{', sampled' if weights.sampled else ''}"
    scheduler = ", ".join(f"{k}={v}" for k, v in recipe.scheduler.items() if k != "class")
    return [
        ("prompt", recipe.prompt),
        ("negative", recipe.negative or "-"),
        ("model", recipe.model),
        (
            "weights",
            f"sha256 {weights.sha256} ({size})",
        ),
        ("control", "\n".join(controls) or "none (stock)"),
        ("compared", "with stock, side by side" if recipe.compare else "-"),
        ("seed", str(recipe.seed)),
        ("steps", str(recipe.steps)),
        ("guidance scale", f"{recipe.guidance_scale:g}"),
        ("height x width", f"{recipe.height} x {recipe.width}"),
        *([] if recipe.frames is None else [("frames", f"{recipe.frames}, {recipe.fps} a second")]),
        *([] if recipe.lora is None else [("LoRA", _lora_row(recipe))]),
        ("text length", str(recipe.max_sequence_length or "the model's own")),
        ("scheduler", f"{recipe.scheduler.get('class')}({scheduler})"),
        ("device", f"{recipe.device}, {recipe.hardware}, {recipe.dtype}"),
        ("threads", str(recipe.threads or "-")),
        ("versions", ", ".join(f"{name} {version}" for name, version in recipe.versions.items())),
    ]


def _lora_row(recipe: Any) -> str:
    masked = any(spec.method == "radial" for spec in recipe.controls)
    note = "; radial settings at their defaults were the LoRA's" if masked else ""
    return f"{recipe.lora.name}, sha256 {recipe.lora.sha256}{note}"


def _inventory() -> dict[str, Any]:
    from diffctrl import settings
    from diffctrl.catalogue import FAMILIES, TEXT_FAMILIES
    from diffctrl.length import read
    from diffctrl.methods import METHODS
    from diffctrl.zoo import registry

    return {
        "models": {
            name: {
                "kind": model.kind,
                "pipeline": model.pipeline,
                "description": model.description,
                "here": registry.is_here(name),
            }
            for name, model in registry.EMBEDDED.items()
        },
        "loras": {name: read(path).summary() for name, path in registry.loras().items()},
        "methods": {
            name: {
                "title": method.title,
                "summary": method.summary,
                "command": method.command,
                "options": list(settings.field_types(method.config_class())),
                "families": list(method.families or FAMILIES),
                "paper": method.paper,
                "licence": method.licence,
            }
            for name, method in METHODS.items()
        },
        "families": {
            name: {"title": f.title, "model": f.model} for name, f in (FAMILIES | TEXT_FAMILIES).items()
        },
    }


def _print_inventory(as_json: bool) -> None:
    from rich.console import Console

    found = _inventory()
    if as_json:
        import json

        print(json.dumps(found))
        return
    models = new_table("Embedded models", "name", "kind", "weights", "description")
    for name, model in found["models"].items():
        models.add_row(name, model["kind"], "here" if model["here"] else "missing", model["description"])
    loras = new_table("Embedded LoRAs", "name", "what it was trained for")
    for name, summary in found["loras"].items():
        loras.add_row(name, summary)
    known = new_table("Methods", "name", "command", "what you get", "options", "paper")
    for name, method in found["methods"].items():
        options = ", ".join(method["options"])
        known.add_row(name, method["command"], method["summary"], options, method["paper"])
    families = new_table("Model families", "name", "models", "class")
    for name, family in found["families"].items():
        families.add_row(name, family["title"], family["model"])
    console = Console()
    for table in (models, *([loras] if found["loras"] else []), known, families):
        console.print(table)
