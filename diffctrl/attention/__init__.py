"""The attention engine: block lists, the dispatcher, the kernels."""

from .api import attend
from .lists import BlockLists, DeviceLists
from .rules import Rule
from .stats import EngineStats

__all__ = ["BlockLists", "DeviceLists", "EngineStats", "Rule", "attend"]
