"""From attention weights to a heat map: which columns are summed, over which blocks, with which weights.

Axis letters: N blocks, T text tokens, I image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffctrl.refam import sinks
from diffctrl.refam.config import RefAMConfig
from diffctrl.refam.tokens import TokenTable


@dataclass(frozen=True, slots=True)
class Weights:
    """Attention weights of one expression and picture, mean over heads, float32.

    Attributes:
        i2t: (N, T, I) of image queries on text keys, softmax over all keys.
        t2i: (N, T, I) of text queries on image keys, or None where it was not asked for.
        text_mass: (N, T) mean over text queries of their weights on each text key, None without text queries.
        blocks: (N,) which of the model's blocks.
        count: blocks of the model.
    """

    i2t: Tensor
    t2i: Tensor | None
    text_mass: Tensor | None
    blocks: tuple[int, ...]
    count: int

    @property
    def depth(self) -> tuple[float, ...]:
        """(N,) relative depth of each block."""
        return tuple(block / max(self.count - 1, 1) for block in self.blocks)

    def only(self, blocks: Sequence[int]) -> Weights:
        """Those of some of the blocks.

        Raises:
            ValueError: one of them is not there.
        """
        if missing := sorted(set(blocks) - set(self.blocks)):
            raise ValueError(f"block {missing[0]} was not read; there are {', '.join(map(str, self.blocks))}")
        places = [self.blocks.index(block) for block in blocks]
        t2i, mass = self.t2i, self.text_mass
        return Weights(
            self.i2t[places],
            None if t2i is None else t2i[places],
            None if mass is None else mass[places],
            tuple(blocks),
            self.count,
        )

    def cpu(self) -> Weights:
        """The same on the CPU."""
        t2i, mass = self.t2i, self.text_mass
        return Weights(
            self.i2t.cpu(),
            None if t2i is None else t2i.cpu(),
            None if mass is None else mass.cpu(),
            self.blocks,
            self.count,
        )


@dataclass(frozen=True, slots=True)
class Scored:
    """What a heat map was made of.

    Attributes:
        heat: (I,) float32, before any spatial bias.
        table: the tokens, with kept columns and votes.
        sinks: indices of the elected sinks.
        flags: what went another way than planned, in words; see `score`.
        per_block: (N, I), the heat of each block.
    """

    heat: Tensor
    table: TokenTable
    sinks: tuple[int, ...]
    flags: dict[str, str]
    per_block: Tensor

    def cpu(self) -> Scored:
        """The same on the CPU."""
        return replace(self, heat=self.heat.cpu(), per_block=self.per_block.cpu())


def kept_columns(
    table: TokenTable, config: RefAMConfig, encoder: str
) -> tuple[tuple[int, ...], dict[str, str]]:
    """The columns of an expression before sinks are looked at, and flags.

    Where nothing with content is left, every token of the expression that is not special.
    """
    flags: dict[str, str] = {}
    if config.stop_words:
        kinds = ("content", "outside") if config.noun_phrase == "off" else ("content",)
        kept = table.columns(*kinds, encoder=encoder)
    else:
        within = ("content", "outside", "stop") if config.noun_phrase == "off" else ("content", "stop")
        kept = table.columns(*within, encoder=encoder)
    if not kept:
        kept = table.columns("content", "outside", "stop", encoder=encoder)
        flags["empty_filter"] = "no word with content was left, so every word of the expression is read"
    return kept, flags


def vote(weights: Weights, config: RefAMConfig) -> tuple[Tensor, Tensor]:
    """((N, T) bool of each block's flags, (T,) bool of the elected sinks)."""
    macro = sinks.importance(weights.text_mass, weights.i2t.mean(dim=-1))
    flagged = sinks.flags(
        macro,
        sinks.evenness(weights.i2t),
        weights.depth,
        tau=config.tau,
        least_even=config.least_even,
        least_depth=config.least_depth,
    )
    return flagged, sinks.elected(flagged)


def score(weights: Weights, table: TokenTable, config: RefAMConfig, *, encoder: str) -> Scored:
    """The heat map of an expression.

    A sink that is no word with content is dropped everywhere. On a word with content it is dropped in the
    blocks that flagged it, and kept where it is the only word; `flags["sink_on_content"]` names it then.

    Args:
        weights: of all text tokens of the table.
        table: of the same tokens.
        config: settings.
        encoder: whose tokens are read.
    """
    kept, flags = kept_columns(table, config, encoder)
    blocks, count = weights.i2t.shape[:2]
    device = weights.i2t.device
    use = torch.tensor([i in kept for i in range(count)], device=device).repeat(blocks, 1)
    flagged = torch.zeros_like(use)
    elected = torch.zeros(count, dtype=torch.bool, device=device)
    if config.sinks != "off":
        flagged, elected = vote(weights, config)
    if config.sinks in ("filter", "suppress"):  # "redirect" moves sinks to magnets and computes nothing
        use, told = _without_sinks(use, flagged, elected, table, kept)
        flags |= told
    source = _source(weights, flagged, elected, config)
    per_block = _combined(source, use, config)
    named = elected.nonzero().flatten().tolist()
    used = use.any(dim=0).tolist()
    return Scored(
        heat=per_block.mean(dim=0),
        table=table.keeping([i for i in kept if used[i]], flagged.sum(dim=0).tolist()),
        sinks=tuple(named),
        flags=flags,
        per_block=per_block,
    )


def _without_sinks(
    use: Tensor, flagged: Tensor, elected: Tensor, table: TokenTable, kept: tuple[int, ...]
) -> tuple[Tensor, dict[str, str]]:
    flags: dict[str, str] = {}
    named = elected.tolist()
    on_content = [i for i in kept if named[i]]
    if not on_content:
        return use, flags
    words = {table.tokens[i].place for i in kept}
    names = ", ".join(dict.fromkeys(table.tokens[i].word for i in on_content))
    if len(words) == 1:
        flags["sink_on_content"] = f"{names} is a sink and the only word with content, and is kept"
        return use, flags
    flags["sink_on_content"] = f"{names}: a sink, left out in the blocks that flagged it"
    use = use.clone()
    use[:, on_content] &= ~flagged[:, on_content]
    return use, flags


def _source(weights: Weights, flagged: Tensor, elected: Tensor, config: RefAMConfig) -> Tensor:
    """(N, T, I) of what is summed."""
    if config.direction == "t2i":
        if weights.t2i is None:
            raise ValueError(
                "direction='t2i' needs the weights of text queries, which this model does not have"
            )
        return weights.t2i
    if config.sinks == "suppress":
        rest = torch.where(elected[None, :, None], 0.0, weights.i2t)
        return rest / rest.sum(dim=1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
    if config.normalise == "text":
        return weights.i2t / weights.i2t.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return weights.i2t


def _combined(source: Tensor, use: Tensor, config: RefAMConfig) -> Tensor:
    """(N, I): the kept columns of each block as one map."""
    mask = use[:, :, None]
    if config.combine == "sum":
        return torch.where(mask, source, 0.0).sum(dim=1)
    mean = source.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(source.dtype).tiny)
    logs = torch.log((source / mean).clamp_min(1e-6))
    number = use.sum(dim=1).clamp_min(1)[:, None]
    return torch.exp(torch.where(mask, logs, 0.0).sum(dim=1) / number)


def token_maps(weights: Weights, config: RefAMConfig) -> Tensor:
    """(T, I) the map of each token, mean over blocks; that of a word is the mean over its pieces."""
    none = torch.zeros(weights.i2t.shape[1], dtype=torch.bool, device=weights.i2t.device)
    return _source(weights, none, none, config).mean(dim=0)


def unsettled(scored: Scored) -> tuple[int, ...]:
    """Sinks that no magnet, stop word or special token took; sinks='redirect' adds a magnet then."""
    harmless = ("magnet", "stop", "special", "pad", "context")
    return tuple(i for i in scored.sinks if scored.table.tokens[i].kind not in harmless)
