"""What every model family provides: where queries, keys and values come from, and how the output goes back.

A family knows one model architecture and no method. Axis letters: B batch, S tokens, H heads, D head dim.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from diffctrl.families.rotary import normed, normed_and_rotated

SiteKind = Literal["joint", "self", "cross", "text"]


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of tokens of the attention sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call, after the family has projected and before it finishes.

    Attributes:
        query: (B, Sq, H, D).
        key: (B, Sk, Hkv, D).
        value: (B, Sk, Hkv, D).
        attention_mask: what the stock processor hands to its kernel, boolean or additive, broadcastable to
            (B, H, Sq, Sk), or None.
        image: the image or video tokens among the queries.
        text: the text tokens among the queries, or None where the sequence holds none.
        text_order: (B, T), which token of the prompt stands at each place of `text`; None where they stand in
            the prompt's own order.
        added: further branches of the same queries, (query, key, value) each, whose outputs are added after
            every control has acted (Wan's image conditioning).
        parallel: whether the keys are split over devices under context parallelism, as the queries are.
        saved: what `finish` and `dense` need of `project`; nobody else reads it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    image: Span
    text: Span | None
    text_order: Tensor | None = None
    added: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    parallel: bool = True
    saved: Mapping[str, Any] = field(default_factory=dict)

    def with_heads(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The same call with other (B, S, H, D) tensors."""
        return replace(self, query=query, key=key, value=value)


@dataclass(frozen=True, slots=True)
class Route:
    """How one stock processor class is taken apart.

    Attributes:
        project: (attn, inputs) -> Call.
        finish: (attn, call, output (B, Sq, H, D)) -> what the stock processor returns.
        rotary: the stock processor's name for its rotary embedding.
        adapts: whether the stock processor is an adapter's, with weights of its own and an image prompt.
        dense: (attn, call, backend) -> output (B, Sq, H, D), for a stock processor that does not run one
            plain dense attention; None where the engine's dense attention is what it runs.
    """

    project: Callable[[nn.Module, Inputs], Call]
    finish: Callable[[nn.Module, Call, Tensor], Any]
    dense: Callable[[nn.Module, Call, Any], Tensor] | None = None
    rotary: str = "image_rotary_emb"
    adapts: bool = False


def _cannot(*_: Any) -> Any:
    raise RuntimeError("this attention is run by a processor that no control may replace")


# Of attention that keeps the processor of an adapter: no control may act there.
ADAPTER = Route(_cannot, _cannot)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model hands to an attention processor: the union over the stock processors, by their names.

    Two things no stock processor gets: `text_length`, the text tokens of the running forward (in some blocks
    one tensor holds both streams), and `adapter`, the stock processor itself where it has weights of its own.
    """

    hidden_states: Tensor
    encoder_hidden_states: Any = None
    attention_mask: Any = None
    temb: Any = None
    image_rotary_emb: Any = None
    text_length: Any = None
    ip_hidden_states: Any = None
    adapter: Any = None

    def given(self, route: Route) -> dict[str, Any]:
        """The arguments that are not None, as keywords for the stock processor of a route."""
        named = {
            "hidden_states": self.hidden_states,
            "encoder_hidden_states": self.encoder_hidden_states,
            "attention_mask": self.attention_mask,
            "temb": self.temb,
            route.rotary: self.image_rotary_emb,
        }
        if route.adapts:
            named["ip_hidden_states"] = self.ip_hidden_states
        return {name: value for name, value in named.items() if value is not None}


@dataclass(slots=True, eq=False)
class Site:
    """One attention module of a controlled model.

    Attributes:
        name: the module's path in the model.
        kind: "joint" (image and text in one sequence), "self", "cross" (keys are text) or "text" (a text-only
            encoder inside the model, which no method touches).
        stack: the group of layers the index counts in, e.g. "transformer_blocks"; SD3.5's second attention is
            a stack of its own.
        layer: index in the stack.
        heads: query heads.
        level: how often the token grid was halved before this layer (UNets); 0 elsewhere.
        installed: the processor that `apply` put here, or None.
        published: what the controls prepared for this site and the running forward, by method.
        mask: the block lists that this site attends in the running forward, on the device; None for all.
        valid_keys: where `mask` is None and the stock processor masks padded text, the same as block lists,
            which the fast kernels of a GPU can read; else None.
    """

    name: str
    kind: SiteKind
    stack: str
    layer: int
    heads: int
    module: nn.Module
    family: Family
    route: Route
    stock: Any
    level: int = 0
    context: Any = None
    installed: Any = None
    published: dict[str, Any] = field(default_factory=dict)
    mask: Any = None
    valid_keys: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:  # it would publish into the first model's context
        raise TypeError("a model under a control of diffctrl cannot be copied; call `control.remove()` first")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attention module stands, see `Site`. Without a layer, it is the next of its stack."""

    kind: SiteKind
    stack: str
    layer: int | None = None
    level: int = 0


@dataclass(frozen=True, slots=True)
class ForwardInfo:
    """What a family reads off one forward call of its model.

    Attributes:
        batch: rows of the call.
        grid: (frames, rows, columns) of image tokens before any downsampling inside the model, or None where
            the call does not say (never guessed from the token count).
        text_length: text tokens of the call, padding included; None without text. Joint sites have them in
            their sequence, cross sites as keys.
        text_valid: valid text tokens of each row, or None where the call does not tell valid from padding.
        timestep: in the scheduler's units.
        device: of the call's image tensor.
    """

    batch: int
    grid: tuple[int, int, int] | None
    text_length: int | None
    text_valid: tuple[int, ...] | None
    timestep: Any
    device: torch.device


class Family(ABC):
    """One model architecture of diffusers."""

    name: ClassVar[str]
    title: ClassVar[str]
    # Forward arguments whose first axis is the batch (nested lists, tuples and dicts are followed).
    batched: ClassVar[tuple[str, ...]]
    # Forward arguments that hold several rows for each batch row, one after another.
    grouped: ClassVar[tuple[str, ...]] = ()
    # How this family's stock pipelines run classifier-free guidance: one batch of [uncond | cond], or two
    # calls.
    cfg: ClassVar[Literal["batched", "separate"]]
    # Stacks whose layers the flat layer index counts, in order.
    stacks: ClassVar[tuple[str, ...]]
    # Lists of blocks in the order in which they run, where a block gets the output of the one before and what
    # is the same for all; () where blocks get more (a UNet's skip connections).
    chains: ClassVar[tuple[str, ...]] = ()
    # Arguments of a block that its outputs go on from, in the order of the outputs.
    block_streams: ClassVar[tuple[str, ...]] = ("hidden_states",)
    # Whether the stock pipelines know their guidance scale before the forward that it is used after.
    scale_known: ClassVar[bool] = True
    # Where the text tokens of a joint sequence lie.
    text_side: ClassVar[Literal["first", "last"] | None] = None

    @abstractmethod
    def model_class(self) -> type[nn.Module]:
        """The diffusers class that this family drives, by identity."""

    @abstractmethod
    def routes(self) -> Mapping[tuple[type, type], Route]:
        """(attention module class, stock processor class) -> route. Looked up by the exact classes."""

    def adapters(self) -> frozenset[type]:
        """Processors of adapters that may stay on cross-attention, where they are left as they are."""
        return frozenset()

    @abstractmethod
    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        """Where the attention module with this path stands."""

    @abstractmethod
    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        """Read grid, text layout and batch off the bound arguments of one forward call."""

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        """A plan for `model.enable_parallelism` that splits the video and leaves text whole on every device.

        Raises:
            TypeError: the model cannot be split by a plan.
        """
        plan = getattr(model, "_cp_plan", None)
        if plan is None:
            raise TypeError(f"{self.title} has no plan for context parallelism, in diffusers or here")
        return dict(plan)

    def auxiliary(self, call: Mapping[str, Any]) -> bool:
        """Whether a pipeline makes this call for a guidance of its own, besides cond and uncond."""
        return False

    def bind(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The forward call's arguments by name."""
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self", None)
        for parameter in bound.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return arguments

    def attention_modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Every module that carries an attention processor (Mochi's have no `get_processor`)."""
        for name, module in model.named_modules():
            if getattr(module, "processor", None) is not None and hasattr(module, "heads"):
                yield name, module

    def sites(self, model: nn.Module) -> list[Site]:
        """One site per attention module, in model order.

        Raises:
            TypeError: an attention module carries a processor that this family does not know.
        """
        routes = self.routes()
        found = []
        counts: dict[tuple[str, str], int] = {}
        for name, module in self.attention_modules(model):
            stock = module.processor
            route = routes.get((type(module), type(stock)))
            place = self.place(model, name, module)
            if route is None and place.kind == "cross" and type(stock) in self.adapters():
                route = ADAPTER
            if route is None:
                known = sorted({processor.__name__ for _, processor in routes})
                raise TypeError(
                    f"{name} of {type(model).__name__} runs the processor {type(stock).__name__}, which the "
                    f"family '{self.name}' cannot take apart; it knows {', '.join(known)}. Restore the stock "
                    f"processors first (e.g. `model.set_default_attn_processor()` or unload the adapter)."
                )
            counted = counts.get((place.kind, place.stack), 0)
            counts[place.kind, place.stack] = counted + 1
            layer = counted if place.layer is None else place.layer
            where = place.kind, place.stack, layer
            found.append(Site(name, *where, module.heads, module, self, route, stock, place.level))
        return found

    def site_grid(self, grid: tuple[int, int, int], site: Site) -> tuple[int, int, int]:
        """The token grid that this site sees; a stride-2 convolution with padding 1 rounds up."""
        frames, rows, columns = grid
        for _ in range(site.level):
            rows, columns = -(-rows // 2), -(-columns // 2)
        return frames, rows, columns

    def key_lengths(self, info: ForwardInfo, site: Site) -> tuple[int, ...] | None:
        """How many keys each batch row of a joint site attends, from the first on, where that is known.

        Joint sequences end with the text, whose padding comes last.
        """
        if site.kind != "joint" or self.text_side != "last" or info.text_valid is None or info.grid is None:
            return None
        return tuple(math.prod(info.grid) + valid for valid in info.text_valid)

    def flat_layer(self, sites: list[Site], site: Site) -> int:
        """Layer index over all counted stacks (FLUX: double blocks first, then single blocks)."""
        offset = 0
        for stack in self.stacks:
            if stack == site.stack:
                return offset + site.layer
            offset += 1 + max((s.layer for s in sites if s.stack == stack), default=-1)
        raise KeyError(f"stack {site.stack!r} of family '{self.name}' is not counted: {self.stacks}")


def split_name(name: str) -> tuple[str, int, str]:
    """'transformer_blocks.3.attn' -> ('transformer_blocks', 3, 'attn')."""
    stack, index, rest = name.split(".", 2)
    return stack, int(index), rest


def to_heads(attn: nn.Module, states: Tensor) -> Tensor:
    """(B, S, H * D) -> (B, S, H, D)."""
    return states.unflatten(-1, (attn.heads, -1))


def projections(
    attn: nn.Module, states: Tensor, *tables: Tensor, stop: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries, keys and values of the main stream: (B, S, C) -> three (B, S, H, D).

    Tables cos and sin, (1, stop, H or 1, D), turn positions into the queries and keys before `stop`, or all.
    """
    query, key, value = (to_heads(attn, layer(states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    query, key = (
        normed_and_rotated(norm, part, *tables, stop=stop)
        for norm, part in ((attn.norm_q, query), (attn.norm_k, key))
    )
    return query, key, value


def text_projections(attn: nn.Module, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the text stream of a joint block, which has layers of its own."""
    layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    query, key, value = (to_heads(attn, layer(text)) for layer in layers)
    return normed(attn.norm_added_q, query), normed(attn.norm_added_k, key), value


def output_layer(attn: nn.Module, states: Tensor) -> Tensor:
    """The projection and the dropout after attention."""
    return attn.to_out[1](attn.to_out[0](states))


_READ = WeakIdKeyDictionary()


def read_once(tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """`read(tensor)`, remembered while the tensor lives unchanged.

    Reading numbers off a GPU tensor waits for the GPU; pipelines hand the same mask to every step.
    """
    if tensor.is_inference():  # has no version: nobody knows whether it was written to since
        return read(tensor)
    version, known = tensor._version, _READ.get(tensor)
    if known is None or known[0] != version:
        known = _READ[tensor] = (version, read(tensor))
    return known[1]


def lattice(positions: Tensor) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of (S, 3) positions, None where they are no full grid in row-major order."""
    axes = [axis.unique() for axis in positions.unbind(dim=-1)]
    sizes = tuple(len(axis) for axis in axes)
    if len(sizes) != 3 or sizes[0] * sizes[1] * sizes[2] != len(positions):
        return None
    return sizes if torch.equal(torch.cartesian_prod(*axes), positions) else None


def row_lengths(mask: Tensor) -> tuple[int, ...]:
    """Valid tokens of each row of a (B, T) 0/1 or boolean mask."""
    return read_once(mask, lambda tensor: tuple(tensor.to(torch.int64).sum(dim=1).tolist()))
