"""Triton kernels without a GPU: compiled for a card that is absent, or interpreted.

Spilled registers and serialised tensor-core instructions make a kernel slow and say nothing; both can be read
from a compilation for a card that is not there. The interpreter must be on before triton is imported, so such
tests run in a process of their own: `run_interpreted` starts it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WITH_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not WITH_TRITON, reason="triton is not installed")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")


def assembled(
    function: Any, types: Mapping[str, str], constants: Mapping[str, Any], *,
    arch: int, warps: int, stages: int, folder: Path,
) -> tuple[Any, str]:  # fmt: skip
    """(compiled kernel, what ptxas -v says).

    Args:
        types: of the arguments in Triton's notation ("*bf16"); those that are not named are i32. Pointers are
            taken as aligned to 16 bytes.
        constants: the arguments that are constexpr.
        arch: 90 for an H100.
    """
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    kinds = dict(types) | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in names}
    source = ASTSource(
        function,
        signature,
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = folder / "kernel.ptx"
    text.write_text(kernel.asm["ptx"])
    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    command = [str(ptxas), "-v", f"-arch=sm_{arch}{'a' if arch == 90 else ''}", "-o", os.devnull, str(text)]
    return kernel, subprocess.run(command, capture_output=True, text=True, check=True).stderr


def spilled(report: str) -> int:
    """Bytes of registers that did not fit, as ptxas says."""
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", report))


def run_interpreted(file: str) -> None:
    """Run the tests of a file in a process whose triton interprets; they must pass, and some must run."""
    pytest.importorskip("triton.runtime.interpreter")
    path = Path(file).resolve()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-3000:]
