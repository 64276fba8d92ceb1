"""`import diffctrl` is quick and light; a checkout works with nothing installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffctrl

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "gradio",
    "xformers",
    "peft",
    "accelerate",
    "av",
    "triton",
    "flash_attn",
    "ray",
)


def _python(code, cwd, path=None):
    """Run code in a fresh interpreter that sees nothing of this one's paths; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick():
    # Processor time of the import alone, without the interpreter's start; the bar is 0.3 s.
    code = "import time; t = time.process_time(); import diffctrl; print(time.process_time() - t)"
    assert float(_python(code, ROOT)) < 0.3


def test_import_is_light():
    code = f"import sys, diffctrl; print([name for name in {HEAVY} if name in sys.modules])"
    assert _python(code, ROOT) == "[]"


def test_using_it_needs_no_extra():
    code = (
        "import sys, diffctrl, diffctrl.processors, diffctrl.pipelines; diffctrl.apply\n"
        "print([name for name in ('gradio', 'xformers', 'flash_attn', 'ray') if name in sys.modules])"
    )
    assert _python(code, ROOT) == "[]"


@pytest.mark.parametrize("room", ["processors", "pipelines", "scripts", "demo", "zoo.registry", "cli"])
def test_a_plain_checkout_finds_its_rooms(room, tmp_path):
    # Found, not imported: the processors alone import diffusers, which takes seconds.
    code = (
        f"import importlib.util, diffctrl; spec = importlib.util.find_spec('diffctrl.{room}')\n"
        "print(spec.name, spec.origin)"
    )
    for found in (_python(code, ROOT), _python(code, tmp_path, path=ROOT)):
        name, origin = found.split(maxsplit=1)
        assert name == f"diffctrl.{room}"
        assert Path(origin).is_relative_to(ROOT)


def test_a_second_checkout_has_rooms_of_its_own(tmp_path):
    """Whichever checkout is installed."""
    (tmp_path / "diffctrl").mkdir()
    (tmp_path / "processors").mkdir()
    for name in ("__init__.py", "_checkout.py"):
        shutil.copy(ROOT / "diffctrl" / name, tmp_path / "diffctrl")
    (tmp_path / "processors" / "__init__.py").touch()
    code = (
        "import importlib.util, diffctrl\n"
        "print(diffctrl.__file__, importlib.util.find_spec('diffctrl.processors').origin)"
    )
    for found in _python(code, tmp_path, path=tmp_path).split():
        assert Path(found).is_relative_to(tmp_path)


def test_a_checkout_exposes_no_other_folder(tmp_path):
    code = "import diffctrl\ntry: import diffctrl.tests\nexcept ModuleNotFoundError: print('not there')"
    assert _python(code, tmp_path, path=ROOT) == "not there"


@pytest.mark.parametrize("name", diffctrl.__all__)
def test_public_names_exist(name):
    assert getattr(diffctrl, name) is not None


def test_public_names_are_the_agreed_ones():
    assert set(diffctrl.__all__) == {
        "CaptureSpec",
        "ControlHandle",
        "apply",
        "attach",
        "capture",
        "set_attn_processor",
        "summary",
    }
    with pytest.raises(AttributeError, match="aply"):
        _ = diffctrl.aply
