"""Settings that were chosen for a model by measurement, with what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffctrl.refam.config import RefAMConfig

FOLDER = Path(__file__).resolve().parent / "presets"


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings for a model and where they come from.

    Attributes:
        model: name of an embedded model.
        config: the settings.
        evidence: what `scripts/evaluate_grounding.py --calibrate` wrote: the validation set, the weights, and
            the figures of the chosen settings and of those that were passed over.
    """

    model: str
    config: RefAMConfig
    evidence: Mapping[str, Any]


def preset(model: str) -> Preset | None:
    """The preset of an embedded model, or None."""
    path = FOLDER / f"{model}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Preset(found["model"], RefAMConfig.from_dict(found["settings"]), found["evidence"])


def write_preset(path: Path, model: str, settings: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
    """Save chosen settings. `settings` are those that differ from the defaults."""
    RefAMConfig.from_dict(settings)  # refuses what could not be read back
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"model": model, "settings": dict(settings), "evidence": dict(evidence)}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
