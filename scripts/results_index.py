"""Write docs/results/README.md from the JSON files beside it.

Run it as `python -m diffctrl.scripts.results_index`; `--check` fails where the page is not up to date.

A topic of more than `FOLDED_FROM` figures shows those with a bar, and folds the others away.

Each file is `{"topic", "command", "date", "commit", "device", "versions", "seeds", "figures": [{"name",
"value", "low", "high", "unit", "bar", "compare", "holds", "note"}]}`; `low` and `high` are a 95 % interval.
"not_reached", written by hand, says what a run that was cut short has no figures of.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
_TOP = {"topic", "command", "date", "commit", "device", "versions", "seeds", "figures"}
_FIGURE = {"name", "value"}
_FIGURE_OPTIONAL = {"low", "high", "unit", "bar", "compare", "holds", "note"}

FOLDED_FROM = 40

_HEAD = """# Results

Written by `python -m diffctrl.scripts.results_index` from the JSON files in this folder; do not edit by hand.
Intervals are 95 %. A bar that was missed stays here, marked **no**. Figures of the embedded models say
nothing about FLUX, SD3.5 or Wan.
"""


def read(path: Path) -> dict[str, Any]:
    """One results file.

    Raises:
        ValueError: it does not follow the schema; says where.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if missing := sorted(_TOP - result.keys()):
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    for figure in result["figures"]:
        name = figure.get("name", "a figure without a name")
        if missing := sorted(_FIGURE - figure.keys()):
            raise ValueError(f"{path.name}: {name} lacks {', '.join(missing)}")
        if unknown := sorted(figure.keys() - _FIGURE - _FIGURE_OPTIONAL):
            raise ValueError(f"{path.name}: {name} has unknown entries {', '.join(unknown)}")
        if figure.get("bar") is not None:
            _check_bar(path.name, figure)
    return result


def _check_bar(file: str, figure: dict[str, Any]) -> None:
    compare, value, bar = figure.get("compare"), figure["value"], figure["bar"]
    if compare not in (">=", "<="):
        raise ValueError(f"{file}: {figure['name']} has a bar and compare={compare!r}; accepted: >=, <=")
    holds = value >= bar if compare == ">=" else value <= bar
    if figure.get("holds") is not holds:
        said = figure.get("holds")
        raise ValueError(
            f"{file}: {figure['name']} says holds={said}, but {value} {compare} {bar} is {holds}"
        )


def page(results: list[dict[str, Any]]) -> str:
    """The whole page, topics in alphabetical order."""
    parts = [_HEAD, *(_section(result) for result in sorted(results, key=lambda r: r["topic"]))]
    if not results:
        parts.append("There are no results yet.\n")
    return "\n".join(parts)


def _section(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"## {result['topic']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}, commit {result['commit']}, {_device(result['device'])}; {versions}; "
        f"seeds: {_plain(result['seeds'])}.",
        "",
    ]
    if "not_reached" in result:
        lines += [f"Not reached by this run: {result['not_reached']}.", ""]
    figures = result["figures"]
    if len(figures) <= FOLDED_FROM:
        return "\n".join([*lines, *_table(figures)])
    barred = [figure for figure in figures if figure.get("bar") is not None]
    others = [figure for figure in figures if figure.get("bar") is None]
    if barred:
        lines += _table(barred)
    summary = f"<summary>{len(others)} figures without a bar</summary>"
    return "\n".join([*lines, "<details>", summary, "", *_table(others), "</details>", ""])


def _table(figures: list[dict[str, Any]]) -> list[str]:
    head = ("| figure | value | 95 % interval | bar | holds | note |", "|---|---|---|---|---|---|")
    return [*head, *(_row(figure) for figure in figures), ""]


def _row(figure: dict[str, Any]) -> str:
    unit = f" {figure['unit']}" if figure.get("unit") else ""
    low, high, bar = figure.get("low"), figure.get("high"), figure.get("bar")
    interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
    wanted = "" if bar is None else f"{figure['compare']} {_number(bar)}"
    holds = {True: "yes", False: "**no**", None: ""}[figure.get("holds")]
    cells = (
        figure["name"],
        _number(figure["value"]) + unit,
        interval,
        wanted,
        holds,
        figure.get("note") or "",
    )
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _device(device: Any) -> str:
    return _plain(device.get("name", device)) if isinstance(device, dict) else str(device)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/results/README.md from docs/results/*.json.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the page is out of date"
    )
    options = parser.parse_args(arguments)
    text = page([read(path) for path in sorted(options.folder.glob("*.json"))])
    target = options.folder / "README.md"
    if options.check:
        current = target.read_text(encoding="utf-8") if target.is_file() else ""
        print(f"{target}: {'up to date' if current == text else 'out of date'}")
        return 0 if current == text else 1
    target.write_text(text, encoding="utf-8")
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
