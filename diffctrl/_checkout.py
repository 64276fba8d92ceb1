"""Let a plain checkout find `diffctrl.processors`, `.pipelines`, `.scripts` and `.demo`.

These four packages live in folders of the repository's root. A wheel and an editable install map them below
`diffctrl`; a checkout in which nothing is installed, or whose root shadows an installed copy, does not. There
and only there, one meta-path finder answers the four exact names.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_ROOM_NAMES = ("processors", "pipelines", "scripts", "demo")
_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent


class _CheckoutFinder:
    """Finds the rooms of a checkout by exact name; what lies below them is found through their `__path__`."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, room = fullname.partition(".")
        if package != "diffctrl" or room not in _ROOM_NAMES:
            return None
        folder = _ROOT / room
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Append the finder when this is a checkout: the rooms are beside `diffctrl`, not inside it."""
    if (_PACKAGE / "processors").is_dir() or not (_ROOT / "processors" / "__init__.py").is_file():
        return
    if not any(isinstance(finder, _CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CheckoutFinder())
