"""From queries and keys of one layer to its pattern: which builder runs, what it needs, what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffctrl.attention import EngineStats, attend
from diffctrl.attention.chain import note_fallback
from diffctrl.sparsed import fused
from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.layout import Layout
from diffctrl.sparsed.patterns import Pattern, block_lists, full_lists
from diffctrl.sparsed.pooling import chunked_scores, mean_scores, sampled_scores
from diffctrl.sparsed.selection import group_mean, retained_mass, select, stacked

DEFAULT_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Builder:
    """How block scores are computed for one kind of call.

    Attributes:
        name: "fused", "chunked", "sampled" or "mean".
        config: the settings.
        scale: what scores are multiplied with while blocks are ranked.
    """

    name: str
    config: SparseDConfig
    scale: float

    @classmethod
    def of(
        cls, config: SparseDConfig, query: Tensor, key: Tensor, scale: float, stats: EngineStats | None
    ) -> Builder:
        """The builder for these tensors.

        Args:
            query: (B, S, H, D). key: (B, S, Hkv, D).
            scale: of the attention itself.
            stats: where a fallback from the fused kernel is counted.

        Raises:
            ValueError: builder="fused" cannot take them.
        """
        if config.score_scale == "authors":
            scale = 1.0 / math.sqrt(query.shape[2])
        name = config.builder
        if name in ("exact", "fused"):
            reason = fused.refused(query, key, config.block_size)
            if reason is None:
                name = "fused"
            elif name == "fused":
                raise ValueError(f"builder='fused' {reason}; builder='exact' takes chunks in torch there")
            else:
                name = "chunked"
                if query.device.type != "cpu":
                    note_fallback(
                        f"block scores in chunks instead of the fused kernel, which {reason}", stats
                    )
        return cls(name, config, scale)

    def wants_lse(self, attention_scale: float) -> bool:
        """Whether the log-sum-exp of the dense attention is of use."""
        return self.name == "fused" and self.scale == attention_scale

    def build(self, query: Tensor, key: Tensor, layout: Layout, lse: Tensor | None = None) -> Pattern:
        """The pattern of one layer.

        Args:
            query: (B, S, H, D), after rotary embedding, the real tokens of each row first.
            key: (B, S, Hkv, D), likewise.
            layout: of the rows.
            lse: float32 (B, H, S), of dense attention over the real keys with this scale, in the same order;
                computed where it is needed and missing.
        """
        valid = layout.valid.tolist()
        groups = query.shape[2] // key.shape[2]
        shared = self.config.share == "kv_group" and groups > 1
        scores = self._scores(query, key, valid, valid, lse, layout)
        kept, mass = [], []
        for b, row in enumerate(layout.rows()):
            own = None
            if self.config.mode == "authors":
                first = row.split * layout.block
                part = slice(b, b + 1)
                own = self._scores(
                    query[part], key[part, first : valid[b]], valid[part], [valid[b] - first], None, None
                )[0]
            ranked, own_ranked = scores[b], own
            if shared:
                ranked = group_mean(ranked, groups)
                own_ranked = None if own is None else group_mean(own, groups)
            found = select(ranked, row, self.config, own_ranked)
            if shared:
                found = type(found)(*(t.repeat_interleave(groups, 0) for t in (found.counts, found.indices)))
            mass.append(retained_mass(scores[b], found))
            kept.append(found)
        counts, indices = stacked(kept, layout.blocks)
        return Pattern(block_lists(counts, indices, layout), torch.stack(mass).cpu(), self.name)

    def _scores(
        self, query: Tensor, key: Tensor, query_valid: list[int], key_valid: list[int], lse: Tensor | None,
        layout: Layout | None,
    ) -> Tensor:  # fmt: skip
        sizes = query_valid, key_valid, self.scale, self.config.block_size
        if self.name == "fused":
            if lse is None:
                lse = self._lse(query, key, layout)
            return fused.fused_scores(query, key, *sizes, lse)
        if self.name == "sampled":
            return sampled_scores(query, key, *sizes, self.config.sampled_rows or DEFAULT_SAMPLES)
        estimate: Callable[..., Tensor] = mean_scores if self.name == "mean" else chunked_scores
        return estimate(query, key, *sizes)

    def _lse(self, query: Tensor, key: Tensor, layout: Layout | None) -> Tensor:
        """By the engine's dense kernel, whose output is not used: for other scales and other sets of keys."""
        lists = full_lists(layout) if layout is not None and layout.padded else None
        return attend(query, key, key, mask=lists, scale=self.scale, return_lse=True)[1]
