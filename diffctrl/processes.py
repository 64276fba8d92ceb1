"""Several processes that accelerate started: how they end."""

from __future__ import annotations

import atexit


def leave_group_at_exit() -> None:
    """Destroy the process group, where there is one, before this process ends.

    Left to the interpreter's end, threads of the group now and then abort a process that has done its work.
    Not earlier: accelerate keeps its state for the whole process, and a second search needs the group again.
    """
    atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
