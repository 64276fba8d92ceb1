"""Plans for context parallelism that split the video and leave the text whole on every device."""

from __future__ import annotations

from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput


def video_plan(
    first: str, rotary: str | None = "rope", *, dims: int = 2, names: tuple[str, ...] = ("hidden_states",)
) -> dict[str, Any]:
    """A plan that splits the video between the first block and the output projection.

    Args:
        first: path of the first block.
        rotary: path of the module that makes (cos, sin) of (S, ...), `dims` axes each.
        names: the first block's arguments that hold the video, (B, S, C).
    """

    def video() -> Any:
        return ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)

    plan: dict[str, Any] = {
        first: {name: video() for name in names},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    if rotary is not None:
        turn = ContextParallelInput(split_dim=0, expected_dims=dims, split_output=True)
        plan[rotary] = {0: turn, 1: turn}
    return plan
