"""LLaDA's decoding: block by block, a fixed number of the surest tokens in each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffctrl.dlm.commit import split_evenly, surest
from diffctrl.dlm.noise import Seeds, gumbel, row_generators, uniform
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

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LLaDASampling:
    """How LLaDA decodes. The defaults are those of its own `generate`.

    Args:
        gen_length: generated tokens G.
        steps: denoising steps T over all blocks; each block takes T / (G / block_length) of them.
        block_length: tokens decoded together, left to right; 32 is usual for instruct models.
        temperature: tau of the Gumbel noise; 0 takes the likeliest token.
        cfg_scale: w of l_u + (w + 1) (l_c - l_u), where the unconditional row has masks for its prompt; 0 is
            off. It is one less than the guidance scale of image pipelines.
        remasking: "low_confidence" decides the surest tokens first, "random" any.
        threshold: in (0, 1]: decide every token of the block whose probability reaches it, at least the best
            one (Fast-dLLM, arXiv 2505.22618: 0.9). A block then ends as soon as it is decided. None decides a
            fixed number per step.
        logits_eos_inf: never write the end of text.
        confidence_eos_eot_inf: decide the ends of text and turn last. LLaDA's code means to, but writes the
            -inf into logits after the tokens were chosen, where it counts for the end of text only, and only
            at temperature 0; here it is the confidence.

    Raises:
        ValueError: a value is out of range, or the blocks do not divide the length and the steps.
    """

    gen_length: int = 128
    steps: int = 128
    block_length: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self) -> None:
        for name in ("gen_length", "steps", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a number >= 1")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is not a finite number >= 0")
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking={self.remasking!r} is not one of low_confidence, random")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is not in (0, 1]")
        if self.threshold is not None and self.remasking == "random":
            raise ValueError("a threshold needs remasking='low_confidence': random confidences mean nothing")
        if self.gen_length % self.block_length:
            raise ValueError(
                f"gen_length={self.gen_length} is not a multiple of block_length={self.block_length}"
            )
        if self.steps % self.blocks:
            near = max(1, round(self.steps / self.blocks)) * self.blocks
            raise ValueError(
                f"steps={self.steps} is not a multiple of the {self.blocks} blocks; the nearest is {near}"
            )

    @property
    def blocks(self) -> int:
        """How many blocks the answer has."""
        return self.gen_length // self.block_length


class LLaDASampler(Sampler):
    """Decodes with a masked-diffusion model whose logits belong to their own positions.

    Source: LLaDA, arXiv 2502.09992, and its `generate`; threshold decoding from Fast-dLLM. Departures:

    - Each row draws from a generator of its own, and takes its own quota.
    - The mask token is never chosen, so that none is left in the answer. Probabilities still count it.
    - Mask tokens inside the prompt are blanks: they are decoded with the first block and count in its quota.
      The original lets them compete without counting them, and leaves as many masks in the answer.
    - Steps that would decide nothing are left out: a block of 32 tokens takes 32 steps at most.

    Args:
        sampling: the settings.
        special: token ids; `eos` and `eot` are needed by the options that name them.

    Raises:
        ValueError: an option needs an id that `special` lacks.
    """

    sampling: LLaDASampling

    def __init__(self, sampling: LLaDASampling, special: Any) -> None:
        if special.eos is None and (sampling.logits_eos_inf or sampling.confidence_eos_eot_inf):
            raise ValueError("logits_eos_inf and confidence_eos_eot_inf need the id of the end of text")
        super().__init__(sampling, special)

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
            model: `model(input_ids=, attention_mask=, position_ids=).logits`, bidirectional. The mask and the
                positions are None where no row is padded.
            prompts: the batch.
            seeds: as in `row_generators`; without effect at temperature 0 with low_confidence.
            control: follows the steps.
            on_step: called after each step; returning True ends the generation there.
            logits_hook: (step, tokens, logits (B, S, V)) -> logits, after guidance. All
                logits are computed for it.
            tokens_hook: (step, tokens, logits) -> tokens, after each step, and once before with step None.

        Raises:
            GenerationInterrupted: Ctrl-C; `partial` has what was decoded.
        """
        prompts = beside(prompts, model)
        generators = row_generators(seeds, len(prompts.ids))
        whole = logits_hook is not None or tokens_hook is not None

        def decode(canvas: Canvas) -> Iterator[tuple[int, Tensor, Tensor | None]]:
            per_block = self._steps_per_block(canvas)
            forward = Forward(
                model,
                canvas,
                steps=per_block * self.sampling.blocks,
                blocks=self.sampling.blocks,
                cfg_scale=self.sampling.cfg_scale,
                control=control,
            )
            for block in range(self.sampling.blocks):
                end = canvas.start + (block + 1) * self.sampling.block_length
                masked = canvas.masked(end)
                if not masked.any():
                    continue
                quotas = split_evenly(masked.sum(-1), per_block)
                # The block's first column, or that of a blank in the prompt.
                first = 0 if whole else int(masked.any(0).nonzero()[0])
                columns = None if whole else torch.arange(first, end, device=masked.device)
                index, limit = 0, per_block + int(masked.sum())
                while masked.any():
                    if index == limit:
                        raise RuntimeError(
                            f"block {block} cannot be decoded: the tokens hook keeps masking it"
                        )
                    step = canvas.forwards
                    logits = forward(block, columns)
                    if logits_hook is not None:
                        logits = logits_hook(step, canvas.tokens, logits)
                    tokens, confidence = self._propose(logits, first, masked, canvas, generators)
                    # What a tokens hook masked again is decided at the latest in the block's last step.
                    last = index >= per_block - 1
                    chosen = self._choose(confidence, masked, masked.sum(-1) if last else quotas[:, index])
                    yield block, torch.where(chosen, tokens, canvas.tokens), logits if whole else None
                    masked = canvas.masked(end)
                    index += 1

        return self._run(prompts, control, on_step, tokens_hook, decode)

    def _steps_per_block(self, canvas: Canvas) -> int:
        """As asked for, but no more than can decide something; with a threshold, the largest number."""
        if self.sampling.threshold is None:
            return min(self.sampling.steps // self.sampling.blocks, self.sampling.block_length)
        most = int(canvas.masked().sum(-1).max())
        return -(-most // self.sampling.blocks)

    def _choose(self, confidence: Tensor, masked: Tensor, quota: Tensor) -> Tensor:
        if self.sampling.threshold is None:
            return surest(confidence, masked, quota)
        best = surest(confidence, masked, torch.ones_like(quota))
        return best | (masked & (confidence >= self.sampling.threshold))

    def _propose(
        self,
        logits: Tensor,
        offset: int,
        masked: Tensor,
        canvas: Canvas,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """A token (B, S) for each masked position, and its confidence (B, S) float64."""
        sampling, special = self.sampling, self.special
        tokens = canvas.tokens.clone()
        confidence = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
        for row, columns in pieces(masked):
            own = logits[row, columns - offset].double()
            if sampling.logits_eos_inf:
                own[:, special.eos] = -torch.inf
            scores = own.clone()
            scores[:, special.mask] = -torch.inf
            if sampling.temperature > 0:
                noise = uniform(scores.shape, generators[row], scores.device)
                scores += sampling.temperature * gumbel(noise)
            found = scores.argmax(-1)
            if sampling.remasking == "random":
                sure = uniform(found.shape, generators[row], found.device)
            else:
                sure = torch.softmax(own, dim=-1).gather(-1, found[:, None]).squeeze(-1)
            if sampling.confidence_eos_eot_inf:
                sure = sure.masked_fill(torch.isin(found, found.new_tensor(special.ends)), -torch.inf)
            tokens[row, columns], confidence[row, columns] = found, sure
        return tokens, confidence
