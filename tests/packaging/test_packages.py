"""What the wheel holds: every package of the mapped folders, and one version."""

import tomllib
from pathlib import Path

import diffctrl

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def _found():
    """Package name of every __init__.py below a mapped folder."""
    names = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            names.add(".".join((package, *parts)))
    return names


def test_every_package_is_listed():
    # An unlisted one works in a checkout and silently vanishes from the wheel.
    assert sorted(_found()) == sorted(SETUPTOOLS["packages"])


def test_every_folder_with_modules_is_a_package():
    for folder in SETUPTOOLS["package-dir"].values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} has no __init__.py"


def test_every_root_package_is_mapped_by_its_name():
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert package in ("diffctrl", f"diffctrl.{folder}")


def test_version_is_written_once_and_again():
    assert diffctrl.__version__ == PROJECT["project"]["version"]


def test_typed_marker_and_weights_are_package_data():
    data = SETUPTOOLS["package-data"]
    assert "py.typed" in data["diffctrl"]
    assert (ROOT / "diffctrl" / "py.typed").is_file()
    assert "weights/**/*" in data["diffctrl.zoo"]


def test_licence_is_the_apache_licence():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
