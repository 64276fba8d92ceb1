"""The attention engine: block lists, `attend`, and a chain of kernels that each pass a test before their use.

Importing this package imports torch and nothing else: diffusers, triton, flash_attn and xformers load when a
call wants them.
"""

from .api import attend, engine_chooses, gives_lse
from .chain import KernelReport, Selection, kernel_report, select_kernel
from .lists import BlockLists, DeviceLists
from .lse import logsumexp_of, merge
from .rules import Rule
from .stats import EngineStats
from .ulysses import Shard

__all__ = [
    "BlockLists",
    "DeviceLists",
    "EngineStats",
    "KernelReport",
    "Rule",
    "Selection",
    "Shard",
    "attend",
    "engine_chooses",
    "gives_lse",
    "kernel_report",
    "logsumexp_of",
    "merge",
    "select_kernel",
]
