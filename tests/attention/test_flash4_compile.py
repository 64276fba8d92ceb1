"""The scheduled form of flash-attn-4 for sm90, compiled without a GPU where the package is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = [name for name in ("flash_attn", "cutlass", "triton") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# In a process of its own: the package reads the arch from the environment, once.
COMPILE = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from diffctrl.attention.kernels import flash4_scheduled

dim, heads, kv_heads, lse = map(int, sys.argv[1:])
with FakeTensorMode():
    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")
    query, key = make(1, 700, heads, dim), make(1, 700, kv_heads, dim)
    rows = make(1, heads, 700, dtype=torch.float32) if lse else None
    lists, schedule = make(6 * heads, 6, dtype=torch.int32), make(3, 132, 8, dtype=torch.int32)
    flash4_scheduled.compiled(query, key, key, query, rows, lists, schedule)
"""


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "lse"), [(128, 3, 3, 1), (128, 4, 2, 0), (64, 3, 3, 1)])
def test_scheduled_form_spills_nothing(dim, heads, kv_heads, lse, tmp_path):
    environment = {
        "FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_KEEP_CUBIN": "1",
        "CUTE_DSL_DUMP_DIR": str(tmp_path), "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", COMPILE, *map(str, (dim, heads, kv_heads, lse))]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    usage = resources(next(tmp_path.glob("*.cubin")))
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 168  # 65536 / 384; warp groups then trade them


def resources(cubin: Path) -> dict[str, int]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
