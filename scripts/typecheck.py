"""Check the types of every room with pyright, and that the check itself would notice an error.

`diffctrl.processors` and its siblings are folders of the repository's root, which no type checker can know.
So `build/typecheck/diffctrl` is made as a tree of links in which they lie where they are imported from, and
`pyproject.toml` points pyright there. A checker that cannot find them prints success all the same; therefore
a file with known errors is checked first.

The tree also holds torch, with one line changed: torch declares every dynamic attribute of a module as
`Tensor | Module`, which makes `attn.to_q(states)` an error everywhere. Here such an attribute is `Any`.

Run it as `python -m diffctrl.scripts.typecheck`.
"""

from __future__ import annotations

import importlib.util
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
_MODULE_FILE = Path("nn/modules/module.py")
_MODULE_GETATTR = 'def __getattr__(self, name: str) -> Union[Tensor, "Module"]:'
_RELAXED = "def __getattr__(self, name: str) -> Any:"
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


def relax_torch(tree: Path) -> None:
    """Link the installed torch into the tree, where its dynamic module attributes are `Any`."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed; the types cannot be checked without it")
    installed, target = Path(spec.origin).parent, tree / "torch"
    changed = installed / _MODULE_FILE
    source = changed.read_text(encoding="utf-8")
    if _MODULE_GETATTR not in source:
        raise SystemExit(
            f"{_MODULE_FILE} of this torch does not have the line that is changed; see typecheck.py"
        )
    for folder in reversed(changed.relative_to(installed).parents):
        (target / folder).mkdir(parents=True)
        for entry in (installed / folder).iterdir():
            if entry.name != "__pycache__" and not changed.is_relative_to(entry):
                (target / folder / entry.name).symlink_to(entry, entry.is_dir())
    (target / _MODULE_FILE).write_text(source.replace(_MODULE_GETATTR, _RELAXED), encoding="utf-8")


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
    relax_torch(build_tree())
    if missed := check_seeded():
        print("the check is blind: pyright did not catch\n  " + "\n  ".join(missed))
        return 1
    report = pyright()
    for found in report["generalDiagnostics"]:
        start = found["range"]["start"]
        where = f"{os.path.relpath(found['file'], ROOT)}:{start['line'] + 1}:{start['character'] + 1}"
        if found["severity"] == "error":
            print(f"{where}: {found['message'].splitlines()[0]} ({found.get('rule', '-')})")
    summary, expected = report["summary"], source_files()
    print(f"pyright: {summary['filesAnalyzed']} files, {summary['errorCount']} errors; seeded errors caught")
    if summary["filesAnalyzed"] < expected:
        print(f"only {summary['filesAnalyzed']} of {expected} files were checked")
        return 1
    return 1 if summary["errorCount"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
