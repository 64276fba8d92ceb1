"""Dream's decoding: over the whole answer, on a grid of times."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffctrl.dlm.commit import surest
from diffctrl.dlm.noise import Seeds, categorical, gumbel, row_generators, uniform
from diffctrl.dlm.sampler import (
    Canvas,
    Forward,
    Generation,
    LogitsHook,
    OnStep,
    Sampler,
    StepControl,
    TokensHook,
    beside,
    pieces,
)
from diffctrl.dlm.tokens import Prompts

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
_ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class DreamSampling:
    """How Dream decodes. The defaults are those of its own `diffusion_generate`, but for the length.

    Args:
        gen_length: generated tokens G (`max_new_tokens`).
        steps: denoising steps T.
        alg: which tokens are decided first. "origin": each with the probability that the schedule gives;
            "maskgit_plus": the likeliest; "topk_margin": those with the largest lead over the second token;
            "entropy": those whose distribution is most certain.
        alg_temp: draws the order from softmax(confidence / alg_temp) without replacement; None or 0 sorts.
        temperature: of the tokens; 0 takes the likeliest one.
        top_p: draw from the likeliest tokens of this total probability.
        top_k: draw from this many tokens.
        eps: where the grid of times linspace(1, eps, T + 1) ends.

    Raises:
        ValueError: a value is out of range.
    """

    gen_length: int = 128
    steps: int = 512
    alg: Algorithm = "origin"
    alg_temp: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("gen_length", "steps", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not a number >= 1")
        for name in ("temperature", "alg_temp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is not a finite number >= 0")
        if self.alg not in _ALGORITHMS:
            raise ValueError(f"alg={self.alg!r} is not one of {', '.join(_ALGORITHMS)}")
        if self.alg == "origin" and self.alg_temp:
            raise ValueError("alg_temp has no effect with alg='origin', which has no order; leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps} is not in (0, 1)")


class DreamSampler(Sampler):
    """Decodes with a masked-diffusion model whose logits belong to the next position.

    Dream was made from an autoregressive model: the logits of position i are read at i - 1, those of a row's
    first token at itself. Source: Dream, arXiv 2508.15487, and its `diffusion_generate`. Departures:

    - Each row draws from a generator of its own, and takes its own quota int(M (1 - s / t)); the original
      averages M over the batch.
    - The mask token has probability 0, so that none is left in the answer.
    - Tokens and orders are drawn by inversion and Gumbel's trick, with the same distributions.

    Args:
        sampling: the settings.
        special: token ids.
    """

    sampling: DreamSampling

    def generate(
        self,
        model: Any,
        prompts: Prompts,
        *,
        seeds: Seeds = None,
        control: StepControl | None = None,
        on_step: OnStep | None = None,
        logits_hook: LogitsHook | None = None,
        tokens_hook: TokensHook | None = None,
    ) -> Generation:
        """Fill `gen_length` masks after each prompt.

        Args:
            model, prompts, seeds, control, on_step, tokens_hook: as in `LLaDASampler.generate`.
            logits_hook: (step, tokens, logits (B, S, V)) -> logits, after the shift. All logits are computed
                for it.

        Raises:
            GenerationInterrupted: Ctrl-C; `partial` has what was decoded.
        """
        prompts = beside(prompts, model)
        generators = row_generators(seeds, len(prompts.ids))
        whole = logits_hook is not None or tokens_hook is not None
        # In float32, as the original: int() below then truncates at the same steps.
        grid = torch.linspace(1, self.sampling.eps, self.sampling.steps + 1, dtype=torch.float32)

        def decode(canvas: Canvas) -> Iterator[tuple[int, Tensor, Tensor | None]]:
            forward = Forward(model, canvas, steps=self.sampling.steps, control=control)
            for step in range(self.sampling.steps):
                masked = canvas.masked()
                if not masked.any():
                    return
                logits, read = self._logits(forward, masked, canvas, whole)
                if logits_hook is not None:
                    logits = logits_hook(step, canvas.tokens, logits)
                last = step == self.sampling.steps - 1
                share = torch.tensor(1.0) if last else 1 - grid[step + 1] / grid[step]
                tokens, chosen = self._decide(logits, read, masked, share, canvas, generators)
                yield 0, torch.where(chosen, tokens, canvas.tokens), logits if whole else None

        return self._run(prompts, control, on_step, tokens_hook, decode)

    def _logits(self, forward: Forward, masked: Tensor, canvas: Canvas, whole: bool) -> tuple[Tensor, Tensor]:
        """Logits (B, C, V), and the column of them (B, S) int64 that belongs to each position."""
        columns = torch.arange(masked.shape[1], device=masked.device)
        shifted = torch.maximum(columns[None] - 1, canvas.padding[:, None])
        if not whole:
            first = max(0, int(masked.any(0).nonzero()[0]) - 1)
            return forward(0, columns[first:]), shifted - first
        rows = torch.arange(len(masked), device=masked.device)[:, None]
        shifted = shifted.clamp(max=masked.shape[1] - 1)
        return forward(0, None)[rows, shifted], columns.expand_as(shifted)

    def _decide(
        self,
        logits: Tensor,
        read: Tensor,
        masked: Tensor,
        share: Tensor,
        canvas: Canvas,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """A token (B, S) for each masked position, and which of them are decided (B, S) bool."""
        sampling = self.sampling
        if sampling.alg == "origin":
            chosen = torch.zeros_like(masked)
            for row, columns in pieces(masked):
                chosen[row, columns] = uniform(columns.shape, generators[row], columns.device) < share
            tokens, _ = self._propose(logits, read, chosen, canvas, generators)
            return tokens, chosen
        tokens, confidence = self._propose(logits, read, masked, canvas, generators)
        if sampling.alg_temp:
            for row, columns in pieces(masked):
                noise = uniform(columns.shape, generators[row], columns.device)
                confidence[row, columns] = confidence[row, columns] / sampling.alg_temp + gumbel(noise)
        quota = (masked.sum(-1).float() * share.to(masked.device)).long()  # .long() truncates, as int() does
        return tokens, surest(confidence, masked, quota)

    def _propose(
        self, logits: Tensor, read: Tensor, masked: Tensor, canvas: Canvas, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """A token (B, S) for each masked position, and its confidence (B, S) float64."""
        sampling = self.sampling
        tokens = canvas.tokens.clone()
        confidence = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
        for row, columns in pieces(masked):
            own = logits[row, read[row, columns]].double()
            if sampling.temperature > 0:
                own = own / sampling.temperature
            own[:, self.special.mask] = -torch.inf
            own = keep_top_k(keep_top_p(own, sampling.top_p), sampling.top_k)
            probabilities = torch.softmax(own, dim=-1)
            if sampling.temperature > 0:
                found = categorical(probabilities, uniform(columns.shape, generators[row], columns.device))
            else:
                found = probabilities.argmax(-1)
            tokens[row, columns] = found
            confidence[row, columns] = self._confidence(probabilities, found)
        return tokens, confidence

    def _confidence(self, probabilities: Tensor, found: Tensor) -> Tensor:
        if self.sampling.alg == "topk_margin":
            first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
            return first - second
        if self.sampling.alg == "entropy":
            return (probabilities * (probabilities + 1e-10).log()).sum(-1)
        return probabilities.gather(-1, found[:, None]).squeeze(-1)


def keep_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """Logits (N, V) with -inf outside the likeliest tokens whose probabilities reach `top_p`, the last one
    included."""
    if top_p is None or top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    outside = probabilities.cumsum(-1) - probabilities > top_p
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)


def keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Logits (N, V) with -inf below the `top_k`-th largest; equals of it stay."""
    if top_k is None:
        return logits
    least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)
