"""The append-only log of finished jobs: what was scored once is never computed again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from diffctrl.softpag.headhunt.jobs import Job


class JobLog:
    """A folder of JSONL files, one per writing process; reading takes all of them.

    Each line is one job: its key, what it was (for people), and its values, null for NaN. A batch is written
    in one call and flushed to the disk, so that `kill -9` costs the batches in flight. The torn last line
    that it may leave is skipped, and closed off by the next writer of that file.
    """

    def __init__(self, folder: str | Path | None, writer: str = "0") -> None:
        """None keeps everything in memory, for searches that need no resume."""
        self._folder = None if folder is None else Path(folder)
        self._name = f"jobs-{writer}.jsonl"
        self._file: IO[bytes] | None = None
        self._values: dict[str, tuple[float, ...]] = {}
        self.loaded = 0
        self.torn = 0
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("jobs-*.jsonl")):
                self._read(path)
        self.loaded = len(self._values)

    def __enter__(self) -> JobLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def get(self, key: str) -> tuple[float, ...] | None:
        """The values of a finished job, one per part of the objective."""
        return self._values.get(key)

    def add(self, entries: Iterable[tuple[str, Job, tuple[float, ...]]], *, written: bool = True) -> None:
        """Record finished jobs; keys that are known already are left as they are.

        Args:
            entries: (key, job, values) each.
            written: False for what another process has written to its own file.
        """
        lines = []
        for key, job, values in entries:
            if key in self._values:
                continue
            self._values[key] = values
            lines.append(json.dumps(_line(key, job, values), ensure_ascii=True).encode() + b"\n")
        if self._folder is None or not lines or not written:
            return
        if self._file is None:
            self._file = self._open(self._folder / self._name)
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    @staticmethod
    def _open(path: Path) -> IO[bytes]:
        file = path.open("ab+")
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a killed writer left half a line
                file.write(b"\n")
        return file

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                key, values = str(entry["key"]), tuple(_number(value) for value in entry["values"])
            except (ValueError, KeyError, TypeError):
                self.torn += 1
                continue
            self._values.setdefault(key, values)


def _line(key: str, job: Job, values: tuple[float, ...]) -> dict[str, Any]:
    return {
        "key": key,
        "round": job.round,
        "selected": [str(head) for head in job.selected],
        "head": None if job.head is None else str(job.head),
        "prompt": job.pair.prompt,
        "seed": job.pair.seed,
        "values": [value if math.isfinite(value) else None for value in values],
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
