"""The methods that the shared tests run on every family: a new method joins with one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffctrl import CaptureSpec
from diffctrl.processors import (
    CaptureAttnProcessor,
    ControlAttnProcessor,
    NeutralAttnProcessor,
    RadialAttnProcessor,
    RefAMAttnProcessor,
    SoftPAGAttnProcessor,
)


@dataclass(frozen=True)
class MethodCase:
    """One setting of one method.

    Attributes:
        name: of the row.
        make: makes the processor.
        neutral: whether its output must equal the stock model's, bit for bit.
        families: names of the families it runs on; None for all.
    """

    name: str
    make: Callable[[], ControlAttnProcessor]
    neutral: bool = False
    families: tuple[str, ...] | None = None


METHODS: tuple[MethodCase, ...] = (
    MethodCase("neutral", NeutralAttnProcessor, neutral=True),
    MethodCase(
        "capture",
        lambda: CaptureAttnProcessor(
            {"map": CaptureSpec(), "sinks": CaptureSpec(quantity="column_entropy", blocks="each")}
        ),
        neutral=True,
    ),
    MethodCase("refam", RefAMAttnProcessor, neutral=True, families=("sd3", "flux", "mochi", "wan")),
    MethodCase("softpag-u0", lambda: SoftPAGAttnProcessor(u=0.0), neutral=True),
    MethodCase("softpag", lambda: SoftPAGAttnProcessor(u=0.5, w=2.0)),
    MethodCase(
        "radial-dense",
        lambda: RadialAttnProcessor(dense_fraction=1.0),
        neutral=True,
        families=RadialAttnProcessor.families,
    ),
    MethodCase(
        "radial",
        # Bands of a few tokens on every frame but the own one: the tiny models have two or three frames.
        lambda: RadialAttnProcessor(
            block=4, adjacent="decay", sink=False, dense_steps=0, dense_last_steps=0, dense_blocks=0
        ),
        families=RadialAttnProcessor.families,
    ),
)
