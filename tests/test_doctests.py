"""The examples in docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _with_examples():
    """Names of the modules that have an example, without importing the others."""
    for package, folder in (
        ("diffctrl", "diffctrl"),
        ("diffctrl.processors", "processors"),
        ("diffctrl.pipelines", "pipelines"),
        ("diffctrl.scripts", "scripts"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join((package, *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(_with_examples()))
def test_examples(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted
    assert not failed
