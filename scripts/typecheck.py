"""Check the types of every room with pyright, and that the check itself would notice an error.

`diffctrl.processors` and its siblings are folders of the repository's root, which no type checker can know.
So `build/typecheck/diffctrl` is made as a tree of links in which they lie where they are imported from, and
`pyproject.toml` points pyright there. A checker that cannot find them prints success all the same; therefore
a file with known errors is checked first.

Run it as `python -m diffctrl.scripts.typecheck`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
ROOMS = ("processors", "pipelines", "scripts", "demo")
# One error per line, each in a different room, with the rule that must catch it.
SEEDED = (
    ("from diffctrl.processors import SoftPAGConfig; SoftPAGConfig().nowhere", "reportAttributeAccessIssue"),
    ("from diffctrl.pipelines.base import joined_signature; joined_signature(1, 2)", "reportArgumentType"),
    ("from diffctrl.scripts.typecheck import build_tree; build_tree(1)", "reportCallIssue"),
    ("from diffctrl.softpag import parse_head; parse_head(3)", "reportArgumentType"),
)  # fmt: skip


def build_tree() -> Path:
    """Make the link tree anew, and return its folder."""
    tree = BUILD / "typecheck"
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "diffctrl"
    package.mkdir(parents=True)
    entries = [path for path in (ROOT / "diffctrl").iterdir() if path.name != "__pycache__"]
    for entry in [*entries, *(ROOT / room for room in ROOMS)]:
        (package / entry.name).symlink_to(os.path.relpath(entry, package), entry.is_dir())
    return tree


def pyright(*paths: str) -> dict[str, Any]:
    """Pyright's JSON report on these paths, or on the folders that pyproject.toml names."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"pyright did not run: {done.stderr.strip() or done.stdout.strip()}") from None


def check_seeded() -> list[str]:
    """The seeded errors that pyright did not catch."""
    seed = BUILD / "typecheck_seed.py"
    seed.write_text("\n".join(line for line, _ in SEEDED) + "\n")
    try:
        found = {
            (report["range"]["start"]["line"], report.get("rule"))
            for report in pyright(str(seed))["generalDiagnostics"]
        }
    finally:
        seed.unlink()
    return [f"{line}  ({rule})" for row, (line, rule) in enumerate(SEEDED) if (row, rule) not in found]


def source_files() -> int:
    """Python files in the checked folders."""
    return sum(len(list((ROOT / room).rglob("*.py"))) for room in ("diffctrl", *ROOMS))


def main() -> int:
    build_tree()
    if missed := check_seeded():
        print("the check is blind: pyright did not catch\n  " + "\n  ".join(missed))
        return 1
    report = pyright()
    for found in report["generalDiagnostics"]:
        start = found["range"]["start"]
        where = f"{os.path.relpath(found['file'], ROOT)}:{start['line'] + 1}:{start['character'] + 1}"
        print(f"{where}: {found['severity']}: {found['message'].splitlines()[0]} ({found.get('rule', '-')})")
    summary, expected = report["summary"], source_files()
    print(f"pyright: {summary['filesAnalyzed']} files, {summary['errorCount']} errors; seeded errors caught")
    if summary["filesAnalyzed"] < expected:
        print(f"only {summary['filesAnalyzed']} of {expected} files were checked")
        return 1
    return 1 if summary["errorCount"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
