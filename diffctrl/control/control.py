"""What a control is: the part of a method that acts between a family and the engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from diffctrl.attention import BlockLists
from diffctrl.control.context import Context
from diffctrl.families.base import ADAPTER, Call, Family, Site


class Guidance(Protocol):
    """A method that steers with a perturbed twin of the conditional rows.

    Attributes:
        mode: "batched" runs the twin in the same batch, "sequential" in a forward of its own afterwards,
            "prefix" as that, from the first perturbed block on.
        rescales: whether `finish` changes the guided prediction, which the hooks must then know.
        remembers: whether `delta` keeps something from step to step.
    """

    @property
    def mode(self) -> str: ...

    @property
    def rescales(self) -> bool: ...

    @property
    def remembers(self) -> bool: ...

    def active(self, context: Context) -> bool:
        """Whether this step is guided; outside, no twin is run."""
        ...

    def delta(
        self, context: Context, cond: Tensor, perturbed: Tensor, memory: MutableMapping[str, Any]
    ) -> Tensor:
        """What is added to the predictions, from the two predictions of the same shape; float32.

        `memory` lasts for one run and belongs to the guidance, which may write to it.
        """
        ...

    def finish(self, prediction: Tensor, cond: Tensor) -> Tensor:
        """The guided prediction after what is done to it as a whole, float32; called where it `rescales`."""
        ...


@dataclass(frozen=True, slots=True)
class Published:
    """What a control prepared for one forward, outside of compiled code.

    Attributes:
        key: what it was made for; a control returns the previous object while this would be the same.
        sites: what each site reads, by site name. Sites that are not named rest. Compiled blocks of one kind
            share a graph where their sites get values of one form, so that tensors belong here and numbers do
            not.
        masks: the block lists of each site, by site name; sites that are not named attend all.
    """

    key: Any
    sites: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, BlockLists] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contributions:
    """What a control changes, so that two of them can be checked before anything is installed.

    Attributes:
        reorders: the order of the tokens.
        masks: which blocks are attended.
        precision: the kernel's precision.
        output: the attention output.
        guides: the prediction, with perturbed twins.
        whole: it computes with the scores of all queries and keys in the model's own order.
        blocks: what the blocks around the attention get or give.
        tells_rows: it treats conditional rows otherwise than unconditional ones.
        reads_tokens: it looks up queries and keys by their place in the model's own order.
    """

    reorders: bool = False
    masks: bool = False
    precision: bool = False
    output: bool = False
    guides: bool = False
    whole: bool = False
    blocks: bool = False
    tells_rows: bool = False
    reads_tokens: bool = False


class Control:
    """Base of every method's processor. All hooks are optional; none may write to `self` or to an input."""

    method: ClassVar[str]
    contributes: Contributions = Contributions()
    families: ClassVar[tuple[str, ...] | None] = None  # None: every family

    @property
    def guidance(self) -> Guidance | None:
        """The twin guidance of this control, or None."""
        return None

    def check(self, sites: Sequence[Site]) -> None:
        """Raise where this control cannot work on a model with these sites; called before installing."""

    def on(self, sites: Sequence[Site]) -> Control:
        """This control with those settings said that it reads off a model with these sites, for a record."""
        return self

    def acts_on(self, site: Site) -> bool:
        """Whether this method concerns attention of this kind; at other sites the stock processor runs."""
        return site.kind in ("joint", "self")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that `apply` puts this control on; the others keep their stock processor object."""
        return [site for site in sites if self.acts_on(site)]

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        """Build what the sites need for this forward, outside compiled code. `previous` is what it last
        returned.

        Returning None means that the control rests in this forward.
        """
        return None

    def transform_inputs(self, site: Site, call: Call) -> Call:
        """Change queries, keys and values."""
        return call

    def wants_lse(self, site: Site) -> bool:
        """Whether `observe` can use the log-sum-exp of the queries in the running forward."""
        return False

    def observe(self, site: Site, call: Call, lse: Tensor | None) -> None:
        """Look at what the kernel was given, after every control has changed it; changes nothing.

        lse: (B, H, Sq) where it was wanted and the kernel gave it without a change of its output, else None.
        """

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        """Change the attention output (B, S, H, D), before heads are merged and projected."""
        return output

    def transform_result(self, site: Site, call: Call, result: Any) -> Any:
        """Change what the attention module returns to its block: a tensor (B, S, C), or a tuple of them."""
        return result

    def enter_block(self, site: Site, states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Change what the block of a selected site gets; for controls that say so in `contributes.blocks`.

        Args:
            states: its streams (B, S, C) by the names of the block's arguments.
        """
        return states

    def leave_block(
        self, site: Site, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Change what the block gives, knowing what it got; as `enter_block`."""
        return after

    def describe(self) -> str:
        """One line for `diffctrl.summary`."""
        return self.method


def check_control(control: Control, family: Family, sites: Sequence[Site]) -> None:
    """Refuse a control that cannot work on a model.

    Raises:
        TypeError: the family is not among those that the control supports.
        ValueError: the control's settings do not fit the model.
    """
    if control.families is not None and family.name not in control.families:
        raise TypeError(
            f"{control.method} does not support {family.title}; it supports {', '.join(control.families)}"
        )
    for site in control.select(sites):
        if site.route is ADAPTER:
            raise TypeError(
                f"{control.method} acts on {site.name}, which runs {type(site.stock).__name__}; unload the "
                "adapter, or use a method that leaves cross-attention alone"
            )
    control.check(sites)


def check_composition(controls: Sequence[Control]) -> None:
    """Refuse lists of controls whose contributions cannot be combined.

    Raises:
        ValueError: with the two names and the reason.
    """
    reasons = {
        "reorders": "both reorder tokens, and the second would see the first one's order",
        "precision": "both choose the kernel's precision",
        "guides": "both append a perturbed twin of the conditional rows to the batch",
    }
    for first, second in itertools.combinations(controls, 2):
        if first.method == second.method:
            raise ValueError(
                f"{first.method} and {second.method} cannot be combined: one control per method; put both "
                "settings into one processor"
            )
        for name, reason in reasons.items():
            if getattr(first.contributes, name) and getattr(second.contributes, name):
                raise ValueError(f"{first.method} and {second.method} cannot be combined: {reason}")
        for one, other in ((first, second), (second, first)):
            if one.contributes.whole and (other.contributes.masks or other.contributes.reorders):
                does = "leaves pairs of tokens out" if other.contributes.masks else "reorders tokens"
                raise ValueError(
                    f"{one.method} and {other.method} cannot be combined with these settings: "
                    f"{one.describe()} computes with the whole attention map, and {other.method} {does}"
                )
            if one.contributes.reads_tokens and other.contributes.reorders:
                raise ValueError(
                    f"{one.method} and {other.method} cannot be combined: {one.method} looks tokens up by "
                    f"their place, and {other.method} reorders them"
                )
