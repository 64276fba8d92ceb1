"""Where prompt, generation and padding lie, in tokens and in blocks, for each batch row.

Axis letters: B batch rows, S tokens of a row with its padding, n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """The blocks of one row: 0 .. split - 1 are the prompt's, split .. count - 1 the generation's.

    A block that holds the border is the prompt's; where that leaves no block, the last one is the
    generation's.
    """

    count: int
    split: int

    @classmethod
    def of(cls, prompt: int, generation: int, block: int) -> RowBlocks:
        """
        >>> RowBlocks.of(8, 4, 2), RowBlocks.of(7, 4, 2), RowBlocks.of(3, 1, 4)
        (RowBlocks(count=6, split=4), RowBlocks(count=6, split=4), RowBlocks(count=1, split=0))
        """
        count = -(-(prompt + generation) // block)
        return cls(count, min(-(-prompt // block), count - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The rows of one run. Block grids begin at each row's first real token.

    So padding is never part of a block with real tokens before it, and a padded row gets the pattern that it
    would get alone. Kernels see the rows in that order too: `order` puts real tokens first.

    Attributes:
        prompts: int64 (B,), real prompt tokens.
        generation: generated tokens, the same in each row.
        starts: int64 (B,), padding before the prompt.
        block: tokens of a block.
        tokens: S; padding after the generation is what is left of it.
    """

    prompts: Tensor
    generation: int
    starts: Tensor
    block: int
    tokens: int
    _cache: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def valid(self) -> Tensor:
        """int64 (B,), real tokens of each row."""
        return self.prompts + self.generation

    @property
    def padded(self) -> bool:
        """Whether some row has padding."""
        return bool((self.valid != self.tokens).any())

    @property
    def shifted(self) -> bool:
        """Whether some row has padding before its first token."""
        return bool((self.starts != 0).any())

    @property
    def blocks(self) -> int:
        """n, of the longest possible row: blocks of S tokens."""
        return -(-self.tokens // self.block)

    def rows(self) -> list[RowBlocks]:
        return [RowBlocks.of(prompt, self.generation, self.block) for prompt in self.prompts.tolist()]

    def mask(self) -> Tensor:
        """bool (B, S): which tokens are real, in the model's order."""
        token = torch.arange(self.tokens)
        start = self.starts.unsqueeze(1)
        return (token >= start) & (token < start + self.valid.unsqueeze(1))

    def order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 (B, S) twice: the tokens with the real ones first, and the way back."""
        found = self._cache.get(device)
        if found is None:
            token, start = torch.arange(self.tokens), self.starts.unsqueeze(1)
            pair = (token + start) % self.tokens, (token - start) % self.tokens
            found = self._cache[device] = (pair[0].to(device), pair[1].to(device))
        return found

    def equals(self, other: Layout) -> bool:
        return (self.generation, self.block, self.tokens) == (
            other.generation,
            other.block,
            other.tokens,
        ) and all(torch.equal(a, b) for a, b in ((self.prompts, other.prompts), (self.starts, other.starts)))

    @classmethod
    def of(
        cls,
        prompts: Tensor,
        generation: int,
        block: int,
        starts: Tensor | None = None,
        tokens: int | None = None,
    ) -> Layout:
        """Checked.

        Args:
            prompts: integer (B,), real prompt tokens of each row, padding not counted.
            generation: tokens to generate.
            block: tokens of a block.
            starts: integer (B,), padding before the prompt; none where it is left out.
            tokens: S; the longest row's end where it is left out.

        Raises:
            ValueError: sizes that cannot be.
        """
        prompts = _lengths("prompt_lengths", prompts)
        starts = torch.zeros_like(prompts) if starts is None else _lengths("left_padding", starts)
        if len(starts) != len(prompts):
            raise ValueError(
                f"left_padding names {len(starts)} rows and prompt_lengths {len(prompts)}: make them equal"
            )
        if generation < 1:
            raise ValueError(f"gen_length={generation} is not a number of tokens; it starts at 1")
        ends = starts + prompts + generation
        longest = int(ends.max())
        if tokens is not None and tokens < longest:
            raise ValueError(
                f"the rows end at token {longest}, but have {tokens}: prompt_lengths counts real "
                "prompt tokens, left_padding the padding before them"
            )
        return cls(prompts, generation, starts, block, longest if tokens is None else tokens)


def _lengths(name: str, tensor: Tensor) -> Tensor:
    tensor = torch.as_tensor(tensor)
    if tensor.ndim != 1 or not len(tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"{name} must be an integer tensor (B,) with at least one row; {tensor.dtype} "
            f"{tuple(tensor.shape)} was given"
        )
    if int(tensor.min()) < 0:
        raise ValueError(f"{name} holds {int(tensor.min())}; lengths start at 0")
    return tensor.detach().to("cpu", torch.int64)
