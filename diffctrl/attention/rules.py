"""Element rules of partial blocks: a closed set, so that every kernel can implement all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RULES = ("causal", "frame_bands", "frame_window", "kv_validity")


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """Which (query, key) pairs of a partial block are attended.

    kind and its tensors (all on the CPU at construction):
      "causal": tensors = (offset,), int32 of shape (1,): key k is attended by query q if k <= q + offset.
      "frame_bands": tensors = (frame, place, widths, sink), of one sequence that attends itself: int32 of
        shapes (S,), (S,), (F + 1,) and bool (1,). Frames d apart attend each other where the places differ by
        at most widths[d]; a frame of -1 (text) attends all and is attended by all, with `sink` frame 0 too.
      "frame_window": tensors = (q_frame, k_frame, window), int32 of shapes (Sq,), (Sk,), (1,): the frames of
        query and key are at most `window` apart.
      "kv_validity": tensors = (valid,), bool (B, Sk) or (1, Sk): key k of row b is attended if valid[b, k].
    Numbers are tensors, so that a compiled kernel never bakes one in.
    """

    kind: str
    tensors: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise ValueError(f"Rule kind {self.kind!r} is not known; accepted are {', '.join(RULES)}.")
        expected = {"causal": 1, "frame_bands": 4, "frame_window": 3, "kv_validity": 1}[self.kind]
        if len(self.tensors) != expected:
            raise ValueError(f"Rule {self.kind!r} takes {expected} tensors, {len(self.tensors)} were given.")

    def to(self, device: torch.device | str) -> Rule:
        return Rule(self.kind, tuple(t.to(device) for t in self.tensors))

    def allowed(self, b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Bool tensor of the broadcast shape of the index tensors b, q, k."""
        if self.kind == "causal":
            return k <= q + self.tensors[0][0]
        if self.kind == "frame_bands":
            frame, place, widths, sink = self.tensors
            of_q, of_k = frame[q], frame[k]
            band = (place[q] - place[k]).abs() <= widths[(of_q - of_k).abs()]
            return band | (of_q < 0) | (of_k < 0) | (sink[0] & (of_k == 0))
        if self.kind == "frame_window":
            q_frame, k_frame, window = self.tensors
            return (q_frame[q] - k_frame[k]).abs() <= window[0]
        valid = self.tensors[0]
        return valid[b % valid.shape[0], k]

    def same_as(self, other: Rule) -> bool:
        return self.kind == other.kind and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True)
        )
