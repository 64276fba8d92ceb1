"""Which processes are one of several, and that those of accelerate leave their group before they end."""

import os
import socket
import subprocess
import sys

import pytest

from diffctrl import processes

# What is registered first runs last.
_CODE = """
import atexit, torch.distributed as distributed
atexit.register(lambda: print("at the end:", distributed.is_initialized()))
from accelerate import PartialState
PartialState(cpu=True)
from diffctrl.processes import leave_group_at_exit
{call}
print("before:", distributed.is_initialized())
"""


@pytest.mark.parametrize("leaves", [True, False])
def test_the_group_is_gone_before_the_process_ends(leaves):
    """Without the call it is still there, and its threads now and then abort the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    code = _CODE.format(call="leave_group_at_exit()" if leaves else "")
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["before: True", f"at the end: {not leaves}"], done.stderr


@pytest.mark.parametrize("said", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("number", [None, 1, 2])
def test_several_processes_are_known_by_what_their_launcher_says(monkeypatch, said, number):
    for name in processes._SIZES:
        monkeypatch.delenv(name, raising=False)
    if number is not None:
        monkeypatch.setenv(said, str(number))
    assert processes.launched() == (number == 2)
