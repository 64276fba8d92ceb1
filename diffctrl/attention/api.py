"""`attend`: the one entry to attention."""

from __future__ import annotations

from typing import Literal

import torch

from .lists import BlockLists, DeviceLists
from .stats import EngineStats


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: BlockLists | DeviceLists | None = None,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    precision: Literal["native"] = "native",
    return_lse: bool = False,
    backend: str | None = None,
    kernel: str | None = None,
    stats: EngineStats | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """query (B, Sq, H, D), key/value (B, Sk, Hkv, D) -> out (B, Sq, H, D) [, lse fp32 (B, H, Sq)]."""
    raise NotImplementedError
