"""The log of a training: one line of CSV for each step, none twice after a restart."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Self

_COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "seconds")


class Log:
    """A CSV file that goes on after `step` steps; what a killed run wrote beyond them is taken back.

    Args:
        path: of the file.
        step: of the checkpoint that the training goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows: list[list[str]] = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
        unfinished = path.with_name(f".{path.name}.part")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
        os.replace(unfinished, path)
        self._file = path.open("a", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.writer(self._file)

    def add(self, step: int, loss: float, rate: float, norm: float, seconds: float) -> None:
        """One step, at once on disk."""
        self._writer.writerow([step, f"{loss:.6g}", f"{rate:.6g}", f"{norm:.6g}", f"{seconds:.4g}"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
