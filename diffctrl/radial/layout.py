"""Where the tokens of an attention sequence lie: frames in raster order, and text before or after them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tokens of one attention sequence.

    Attributes:
        frames, tokens: F frames of S tokens each, in raster order.
        text: text tokens beside the video.
        text_first: whether they come before it.
    """

    frames: int
    tokens: int
    text: int = 0
    text_first: bool = False

    @property
    def offset(self) -> int:
        """Tokens before the video."""
        return self.text if self.text_first else 0

    @property
    def length(self) -> int:
        """Tokens of the sequence, N."""
        return self.frames * self.tokens + self.text

    def text_blocks(self, block: int) -> slice:
        """The blocks that hold text tokens, alone or beside video tokens."""
        start = 0 if self.text_first else self.frames * self.tokens
        return slice(start // block, -(-(start + self.text) // block) if self.text else start // block)


@dataclass(frozen=True, slots=True)
class Strips:
    """The video's tokens cut at every border of a block and of a frame, in order.

    Attributes:
        block: (M,), the block that a strip lies in.
        frame: (M,), its frame.
        start, stop: (M,), its positions in the frame, half-open.
        ordinal: (M,), how many blocks its frame has touched before.
        firsts: index of the first strip of each block.
    """

    block: np.ndarray
    frame: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    ordinal: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, layout: Layout, block: int) -> Strips:
        offset, tokens = layout.offset, layout.tokens
        end = offset + layout.frames * tokens
        frames_start = np.arange(offset, end + 1, tokens)
        blocks_start = np.arange(-(-offset // block) * block, end, block)
        borders = np.unique(np.concatenate([frames_start, blocks_start]))
        first, last = borders[:-1], borders[1:]
        frame, of_block = (first - offset) // tokens, first // block
        origin = offset + frame * tokens
        # Half the memory of the comparisons of all strips with all.
        return cls(
            block=of_block.astype(np.int32),
            frame=frame.astype(np.int32),
            start=(first - origin).astype(np.int32),
            stop=(last - origin).astype(np.int32),
            ordinal=(of_block - origin // block).astype(np.int32),
            firsts=np.flatnonzero(np.diff(of_block, prepend=-1)),
        )
