"""Settings of SoftPAG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from diffctrl.softpag import library
from diffctrl.softpag.heads import Head, parse_heads
from diffctrl.softpag.headset import HeadSet

Kind = Literal[
    "identity",
    "uniform",
    "mean_query",
    "blur_query",
    "argmax",
    "temperature",
    "zero",
    "skip_attention",
    "skip_block",
    "token_shuffle",
]
Scope = Literal["joint", "image_rows", "image_block", "image_block_logit"]
Path = Literal["linear", "spherical"]
QueryMean = Literal["all", "img", "txt"]
Difference = Literal["plain", "apg", "tangential"]
Mode = Literal["batched", "sequential", "prefix"]

_CHOICES: dict[str, Any] = {
    "kind": Kind,
    "scope": Scope,
    "path": Path,
    "difference": Difference,
    "mode": Mode,
}
# Where neither the settings nor a head set say something else.
DEFAULT_U, DEFAULT_W = 0.5, 3.0
# Options that belong to one value of another option.
_BELONGS = {
    "query_mean": ("kind", "mean_query"),
    "sigma": ("kind", "blur_query"),
    "temperature": ("kind", "temperature"),
    "apg_parallel": ("difference", "apg"),
    "apg_norm": ("difference", "apg"),
    "apg_momentum": ("difference", "apg"),
}
# These have no attention map: they change what a layer as a whole gets or gives.
LAYER_KINDS = ("skip_attention", "skip_block", "token_shuffle")
_NEEDED = {"blur_query": ("sigma", "4"), "temperature": ("temperature", "0.5")}


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPAGConfig:
    """Which heads are perturbed, how and how strongly, and how far the sample is pushed away from the result.

    Args:
        heads: the heads, as in 'L3H1,L4' or an iterable; 'L3H1=0.7,L4' or a mapping gives some a strength of
            their own. A `HeadSet`, or the name of one that is shipped for the model at hand ('quality',
            'style:soft'). None takes the shipped set 'quality' where the model has one, else every head of
            the layer at 3/8 of the depth (layer 9 of 24 in the paper's sweeps over u); in a UNet, of the
            middle block, as PAG does.
        u: perturbation strength in [0, 1]: A' = (1 - u) A + u T. 0 is the stock model, 1 the target itself.
            None takes what the head set was found with, or 0.5 without one.
        w: guidance scale >= 0 in e + s (c - e) + w (c - p); 0 turns the guidance off. None takes what the
            head set was found with, or 3 without one.
        kind: the target map T. "identity" (SoftPAG; PAG at u = 1), "uniform" over valid keys, "mean_query"
            (every query is their mean), "blur_query" (image queries blurred over the grid), "argmax" (the
            strongest key alone), "temperature" (scores divided by `temperature`), "zero" (no output at all;
            its rows are no distributions). Three act on whole layers: "skip_attention" (what attention adds
            is scaled by 1 - u), "skip_block" (so is what the block adds; SLG, STG), "token_shuffle" (the
            share u of the block's image tokens change places; TPG, arXiv 2506.10036).
        scope: "joint" perturbs text and image queries (the paper's rule), "image_rows" image queries only.
            Two more for "identity": "image_block" moves each image query's mass on the image to itself and
            leaves its mass on the text; "image_block_logit" leaves it the text and itself to choose from.
        path: how u leads from A to T. "spherical" (identity only) goes along the arc of square roots.
        query_mean: for kind "mean_query", the mean over "all", "img" or "txt" queries; "all" by default.
        sigma: for kind "blur_query", the blur's standard deviation in tokens, > 0.
        temperature: for kind "temperature", > 0: below 1 sharper maps, above 1 flatter ones.
        difference: what c - p passes through. "apg" splits it along c and scales the two parts,
            "tangential" first drops from p what the pair (c, p) does not share.
        apg_parallel: for "apg", how much of the part along c stays; 0 by default.
        apg_norm: for "apg", the norm that the difference may have in each picture; no limit by default.
        apg_momentum: for "apg", the share of the earlier steps' differences that is added; 0 by default.
        rescale: in [0, 1]: how far the guided prediction's deviation is brought back to that of c.
        mode: "batched" runs the perturbed twin in the same batch, "sequential" as a second forward of the
            conditional rows (least memory), "prefix" as that from the first perturbed block on.
        start_fraction, stop_fraction: the half-open part of the schedule that is guided, by noise level: a
            run that starts late (picture to picture) meets the later part of it.

    Raises:
        ValueError: a value is out of range, or options contradict each other.
    """

    heads: tuple[Head, ...] | HeadSet | str | None = None
    u: float | None = None
    w: float | None = None
    kind: Kind = "identity"
    scope: Scope = "joint"
    path: Path = "linear"
    query_mean: QueryMean | None = None
    sigma: float | None = None
    temperature: float | None = None
    difference: Difference = "plain"
    apg_parallel: float | None = None
    apg_norm: float | None = None
    apg_momentum: float | None = None
    rescale: float = 0.0
    mode: Mode = "batched"
    start_fraction: float = 0.0
    stop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.heads is not None:
            heads: Any = self.heads
            if isinstance(heads, Mapping):
                heads = tuple(heads.items())
            if isinstance(heads, str) and library.is_name(heads):
                library.check_name(heads.strip())
                object.__setattr__(self, "heads", heads.strip())
            elif not isinstance(heads, HeadSet):
                object.__setattr__(self, "heads", parse_heads(heads))
            if not self.heads:
                raise ValueError(
                    "heads is empty, and nothing would be perturbed; name at least one head, e.g. 'L3H1', or "
                    "leave it out (a search that found no head gives an empty set)"
                )
        if self.u is not None and not 0.0 <= self.u <= 1.0:
            raise ValueError(f"u={self.u!r} is not in [0, 1]; 0 is the stock model, 1 is full PAG")
        if self.w is not None and not (math.isfinite(self.w) and self.w >= 0.0):
            raise ValueError(f"w={self.w!r} is not a finite number >= 0")
        for name, accepted in _CHOICES.items():
            _check_choice(name, getattr(self, name), get_args(accepted))
        self._check_target()
        self._check_difference()
        if not 0.0 <= self.start_fraction < self.stop_fraction <= 1.0:
            raise ValueError(
                f"the window [{self.start_fraction!r}, {self.stop_fraction!r}) is not inside [0, 1) or "
                "is empty"
            )

    def _check_target(self) -> None:
        for name, (option, value) in _BELONGS.items():
            if getattr(self, name) is not None and getattr(self, option) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to {option}={value!r}, but {option} is "
                    f"{getattr(self, option)!r}; leave {name} out, or set {option}={value!r}"
                )
        needed, example = _NEEDED.get(self.kind, (None, None))
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"kind={self.kind!r} needs {needed}, a number > 0, e.g. {needed}={example}")
        for name in ("sigma", "temperature", "apg_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name}={value!r} is not a finite number > 0")
        if self.temperature == 1.0:
            raise ValueError("temperature=1.0 is the map itself, so that nothing would be perturbed")
        if self.query_mean is not None:
            _check_choice("query_mean", self.query_mean, get_args(QueryMean))
        block = self.scope in ("image_block", "image_block_logit")
        if self.kind != "identity" and (block or self.path != "linear"):
            given = f"scope={self.scope!r}" if block else f"path={self.path!r}"
            raise ValueError(f"{given} is defined for kind='identity' alone, not for kind={self.kind!r}")
        if self.kind in LAYER_KINDS:
            if isinstance(self.heads, str):
                raise ValueError(f"kind={self.kind!r} acts on whole layers, and {self.heads!r} names heads")
            named = [head for head in self.heads or () if head.head is not None]
            if named:
                raise ValueError(
                    f"kind={self.kind!r} acts on whole layers; write L{named[0].layer} instead of {named[0]}"
                )
        if block and self.path != "linear":
            raise ValueError(f"path={self.path!r} and scope={self.scope!r} cannot be combined: the arc leads "
                             "to the identity of the whole row")  # fmt: skip

    def _check_difference(self) -> None:
        for name in ("apg_parallel", "apg_momentum"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value!r} is not a finite number")
        if self.apg_momentum is not None and not -1.0 < self.apg_momentum < 1.0:
            raise ValueError(f"apg_momentum={self.apg_momentum!r} is not in (-1, 1): it would grow each step")
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"rescale={self.rescale!r} is not in [0, 1]; 0 leaves the prediction as it is")

    @property
    def rests(self) -> bool:
        """Whether these settings change nothing."""
        heads = () if self.heads is None or isinstance(self.heads, str) else self.heads
        own = [head.u for head in heads]  # a shipped set has the common strength
        strongest = max((self.strength if u is None else u for u in own), default=self.strength)
        return strongest == 0 or self.scale == 0

    @property
    def covers_all(self) -> bool:
        """Whether every step is guided, so that the schedule need not be known."""
        return self.start_fraction == 0 and self.stop_fraction == 1

    def covers(self, fraction: float) -> bool:
        """Whether the step at this share of the schedule is guided."""
        return self.start_fraction <= fraction < self.stop_fraction

    @property
    def strength(self) -> float:
        """u as it is used."""
        return DEFAULT_U if self.u is None else self.u

    @property
    def scale(self) -> float:
        """w as it is used."""
        return DEFAULT_W if self.w is None else self.w

    def with_set(self, found: HeadSet) -> SoftPAGConfig:
        """The same settings with the heads of a set, and its u and w where they say none."""
        u = found.u if self.u is None else self.u
        w = found.w if self.w is None else self.w
        return replace(self, heads=tuple(found), u=u, w=w)

    @property
    def needs_map(self) -> bool:
        """Whether the target is made from the attention scores, so that a second attention is computed."""
        computed = self.kind not in ("identity", "uniform", "zero", *LAYER_KINDS)
        return computed or self.path != "linear" or self.scope in ("image_block", "image_block_logit")


def _check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(map(str, accepted))}")
