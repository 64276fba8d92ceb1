"""Models that are functions of their input, and slow samplers that follow the papers line by line."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MASK, PAD, EOS, EOT = 0, 1, 1, 3


class Stub:
    """A model made of (tokens (B, S)) -> logits (B, S, V); notes what it was called with."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self._logits = logits
        self.calls: list[SimpleNamespace] = []

    def __call__(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Any:
        self.calls.append(
            SimpleNamespace(tokens=input_ids.clone(), mask=attention_mask, positions=position_ids)
        )
        return SimpleNamespace(logits=self._logits(input_ids))


def scrambled(vocabulary: int = 12, scale: float = 3.0) -> Stub:
    """Logits that depend on the position and on every token, with nothing equal."""
    table = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(5)) * scale

    def logits(tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        mixed = (tokens * (places + 3)).sum(-1, keepdim=True) + 7 * places[None]
        return table[mixed % 64]

    return Stub(logits)


class Spy:
    """Notes what a sampler tells its control."""

    def __init__(self) -> None:
        self.begun: list[tuple] = []
        self.steps: list[int] = []
        self.told: list[tuple] = []
        self.resets = 0

    def begin(self, prompt_lengths, gen_length, steps, left_padding, *, blocks):
        padding = None if left_padding is None else left_padding.tolist()
        self.begun.append((prompt_lengths.tolist(), gen_length, steps, padding, blocks))

    def set_step(self, step, *, committed, block):
        self.steps.append(step)
        self.told.append((round(committed, 4), block))

    def reset(self):
        self.resets += 1


def slow_llada(
    model: Any,
    prompt: list[int],
    *,
    gen_length: int,
    steps: int,
    block_length: int,
    cfg_scale: float = 0.0,
    logits_eos_inf: bool = False,
    threshold: float | None = None,
) -> list[int]:
    """One row at temperature 0, as section 3.1 of the specification says, with lists and loops."""
    tokens = prompt + [MASK] * gen_length
    blocks = gen_length // block_length
    for block in range(blocks):
        end = len(prompt) + (block + 1) * block_length
        left = steps // blocks
        while any(token == MASK for token in tokens[len(prompt) : end]):
            masked = [i for i in range(len(prompt), end) if tokens[i] == MASK]
            logits = model(input_ids=torch.tensor([tokens])).logits[0]
            if cfg_scale:
                blind = [MASK] * len(prompt) + tokens[len(prompt) :]
                without = model(input_ids=torch.tensor([blind])).logits[0]
                logits = without + (cfg_scale + 1) * (logits - without)
            if logits_eos_inf:
                logits[:, EOS] = -torch.inf
            chance = torch.softmax(logits.double(), -1)
            best = {i: max((v for v in range(logits.shape[1]) if v != MASK), key=lambda v, i=i: logits[i, v])
                    for i in masked}  # fmt: skip
            order = sorted(masked, key=lambda i: -float(chance[i, best[i]]))
            if threshold is None:
                quota = -(-len(masked) // left)  # what is left, spread over the steps that are left
                taken = order[:quota]
            else:
                taken = [i for i in order if chance[i, best[i]] >= threshold] or order[:1]
            for i in taken:
                tokens[i] = int(best[i])
            left -= 1
    return tokens[len(prompt) :]


def slow_dream(
    model: Any, prompt: list[int], *, gen_length: int, steps: int, alg: str, eps: float = 1e-3
) -> list[int]:
    """One row at temperature 0, as section 3.2 of the specification says."""
    tokens = prompt + [MASK] * gen_length
    grid = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        masked = [i for i, token in enumerate(tokens) if token == MASK]
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
        logits = torch.cat([logits[:1], logits[:-1]])
        logits[:, MASK] = -torch.inf
        chance = torch.softmax(logits, -1)
        best = chance.argmax(-1)
        first, second = chance.topk(2, dim=-1).values.T
        sure = {
            "maskgit_plus": first,
            "topk_margin": first - second,
            "entropy": (chance * (chance + 1e-10).log()).sum(-1),
        }[alg]
        last = step == steps - 1
        quota = len(masked) if last else int(len(masked) * (1 - grid[step + 1] / grid[step]))
        for i in sorted(masked, key=lambda i: -float(sure[i]))[:quota]:
            tokens[i] = int(best[i])
    return tokens[len(prompt) :]
