"""Whether an embedded model's files are the ones that were shipped."""

from __future__ import annotations

import hashlib
import json

from diffctrl.zoo import registry


def problem(name: str) -> str | None:
    """What is wrong with an embedded model's weight files, or None; each is compared with its SHA-256."""
    try:
        folder = registry.path(name)
        recorded = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["sha256"]
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
        if found != sorted(recorded):
            return f"the weight files are {', '.join(found)}; recorded are {', '.join(sorted(recorded))}"
        for relative, digest in recorded.items():
            if hashlib.sha256((folder / relative).read_bytes()).hexdigest() != digest:
                return f"{relative} is not the file that was shipped; reinstall diffctrl"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None
