"""One process, or several that accelerate started: what a training asks of them, and how they end."""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

# How many processes there are, as torchrun and accelerate say it, and the launchers of MPI.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def count() -> int:
    """How many ranks were launched together, this one included."""
    return max(int(os.environ.get(name, "1")) for name in _SIZES)


def launched() -> bool:
    """Whether this process is one of several ranks."""
    return count() > 1


@dataclass(frozen=True, slots=True)
class OneProcess:
    """What is asked of an `Accelerator`, where there is one process.

    accelerate keeps the device and the settings of its first `Accelerator` as long as the process lives, and
    refuses others: a second training on another device, and an `Accelerator` of the caller's own.
    """

    device: torch.device
    num_processes: ClassVar[int] = 1
    process_index: ClassVar[int] = 0
    is_main_process: ClassVar[bool] = True

    def wait_for_everyone(self) -> None:
        pass

    def no_sync(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()


def accelerator(device: str) -> Any:
    """accelerate's among several processes, which all run on one kind of device; else `OneProcess`."""
    if not launched():
        import torch

        return OneProcess(torch.device(device))
    from accelerate import Accelerator

    leave_group_at_exit()
    return Accelerator(cpu=device == "cpu")


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
