"""HeadSet: the heads that a search chose, with everything that says how it chose them. JSON, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffctrl.softpag.heads import Head, parse_head, parse_heads

FORMAT = "diffctrl.headset"
SCHEMA = 1
# Larger files are no head sets: a search over 1368 heads and 5 rounds is about 2 MB.
_LARGEST_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The shape of a model as far as its heads go.

    Attributes:
        model_class: the denoiser's class in diffusers.
        stacks: (name, layers, heads of each layer) of every stack that can be perturbed, in flat order.
    """

    model_class: str
    stacks: tuple[tuple[str, int, tuple[int, ...]], ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "class": self.model_class,
            "stacks": [
                {"name": name, "layers": layers, "heads": list(heads)} for name, layers, heads in self.stacks
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signature:
        return cls(
            model_class=str(values["class"]),
            stacks=tuple(
                (str(each["name"]), int(each["layers"]), tuple(int(count) for count in each["heads"]))
                for each in values["stacks"]
            ),
        )

    def __str__(self) -> str:
        stacks = ", ".join(
            f"{name} {layers} x {'/'.join(str(count) for count in sorted(set(heads)))}"
            for name, layers, heads in self.stacks
        )
        return f"{self.model_class}({stacks})"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One chosen head: the round that chose it, its mean score there, its own strength where it has one."""

    head: Head
    round: int = 1
    score: float | None = None
    u: float | None = None

    @property
    def strong(self) -> Head:
        """The head with its own strength, or as it is where the common one rules."""
        return self.head if self.u is None else replace(self.head, u=self.u)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSet:
    """An ordered set of heads. Iterating yields `Head` objects, so that it goes wherever heads go.

    Attributes:
        chosen: in the order of choice.
        signature: of the model; None for a list of unknown origin, which fits every model that has the heads.
        model: {"id", "revision"}.
        perturbation: {"kind", "scope", "u", "w", "s"} of the search.
        sampling: {"steps", "height", "width", "scheduler", "dtype"} and what else the pipeline was called
            with.
        objective: {"name", "version"}.
        pairs: the (prompt, seed) pairs, Q of the paper.
        rounds: per round every candidate's mean and standard error, as plain dictionaries.
        approximations: what made the search cheaper and could have changed its result; empty for none.
        use: {"u", "w"} at which the set is used where nothing else is said, and what was "tried" to choose
            them, on which "pairs"; empty for those of the search.
    """

    chosen: tuple[Chosen, ...]
    signature: Signature | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    perturbation: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[tuple[str, int], ...] = ()
    rounds: tuple[Mapping[str, Any], ...] = ()
    approximations: tuple[str, ...] = ()
    use: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = [each.head for each in self.chosen]
        if len(set(heads)) != len(heads):
            twice = next(head for head in heads if heads.count(head) > 1)
            raise ValueError(f"head {twice} is in the set twice; each head is perturbed once")
        for each in self.chosen:
            if each.u is not None and not 0.0 <= each.u <= 1.0:
                raise ValueError(f"the strength {each.u!r} of head {each.head} is not in [0, 1]")

    @property
    def u(self) -> float | None:
        """The common strength at which the set is used; None where its origin is unknown."""
        return _number(self.use.get("u", self.perturbation.get("u")))

    @property
    def w(self) -> float | None:
        """The guidance scale at which the set is used; None where its origin is unknown."""
        return _number(self.use.get("w", self.perturbation.get("w")))

    @property
    def heads(self) -> tuple[Head, ...]:
        return tuple(each.head for each in self.chosen)

    def __iter__(self) -> Iterator[Head]:
        return iter([each.strong for each in self.chosen])

    def __len__(self) -> int:
        return len(self.chosen)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def __str__(self) -> str:
        return ",".join(str(head) for head in self)

    def first(self, count: int) -> HeadSet:
        """The first `count` heads in the order of choice.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= count <= len(self.chosen):
            raise ValueError(f"first({count}): the set has {len(self.chosen)} heads; ask for 1 to that many")
        return replace(self, chosen=self.chosen[:count])

    def up_to_round(self, last: int) -> HeadSet:
        """The heads of rounds 1 to `last`.

        Raises:
            ValueError: there is no such round.
        """
        known = sorted({each.round for each in self.chosen})
        if last not in known:
            raise ValueError(f"up_to_round({last}): the set has the rounds {', '.join(map(str, known))}")
        kept = tuple(each for each in self.chosen if each.round <= last)
        rounds = tuple(each for each in self.rounds if each.get("round", 0) <= last)
        return replace(self, chosen=kept, rounds=rounds)

    def union(self, other: HeadSet) -> HeadSet:
        """This set's heads, then those of `other` that are not among them; strengths stay as they are.

        What the two searches did is not merged: the result keeps the model, and drops rounds and pairs.

        Raises:
            ValueError: the sets are of models of different shape.
        """
        if self.signature and other.signature and self.signature != other.signature:
            raise ValueError(
                f"union of head sets of two models: {self.signature} and {other.signature}; a head of one is "
                "another head in the other"
            )
        added = tuple(each for each in other.chosen if each.head not in self.heads)
        same = self.model == other.model
        return HeadSet(
            chosen=self.chosen + added,
            signature=self.signature or other.signature,
            model=self.model if same else {},
            perturbation=self.perturbation if self.perturbation == other.perturbation else {},
            use=self.use if self.use == other.use else {},
        )

    __or__ = union

    def weights(self) -> dict[Head, float | None]:
        """Head -> its own strength; None where the processor's common u rules."""
        return {each.head: each.u for each in self.chosen}

    def with_weights(self, weights: Mapping[Head | str, float | None]) -> HeadSet:
        """The same set with a strength of its own for some heads, or the common one again for None.

        Raises:
            ValueError: a head is not in the set, or a strength is not in [0, 1].
        """
        named = {parse_heads([head])[0]: u for head, u in weights.items()}
        strangers = [str(head) for head in named if head not in self.heads]
        if strangers:
            raise ValueError(f"{', '.join(strangers)} not in the set; it has {self}")
        return replace(self, chosen=tuple(replace(c, u=named.get(c.head, c.u)) for c in self.chosen))

    def check(self, signature: Signature) -> HeadSet:
        """Return this set where it belongs to a model of this shape; a processor checks it by itself.

        Args:
            signature: as in `diffctrl.processors.universe.universe_of(pipe).signature`.

        Raises:
            ValueError: the model is of another shape.
        """
        if self.signature is not None and self.signature != signature:
            raise ValueError(
                f"this head set was found on {self.signature}, and the model is {signature}: its heads mean "
                "nothing there; run `diffctrl headhunt` on this model"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "model": {**self.model, "signature": self.signature.to_dict() if self.signature else None},
            "perturbation": dict(self.perturbation),
            "sampling": dict(self.sampling),
            "objective": dict(self.objective),
            "approximations": list(self.approximations),
            "use": dict(self.use),
            "heads": [
                {"head": str(each.head), "round": each.round, "score": each.score, "u": each.u}
                for each in self.chosen
            ],
            "pairs": [{"prompt": prompt, "seed": seed} for prompt, seed in self.pairs],
            "rounds": [dict(each) for each in self.rounds],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadSet:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: it is no head set, or of a schema that this version does not read.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f'this is no head set: "format" must be "{FORMAT}"')
        if values.get("schema") != SCHEMA:
            raise ValueError(f"head set of schema {values.get('schema')!r}; this version reads {SCHEMA}")
        try:
            model = dict(values["model"])
            signature = model.pop("signature")
            return cls(
                chosen=tuple(_chosen(each) for each in values["heads"]),
                signature=None if signature is None else Signature.from_dict(signature),
                model=model,
                perturbation=dict(values["perturbation"]),
                sampling=dict(values["sampling"]),
                objective=dict(values["objective"]),
                pairs=tuple((str(each["prompt"]), int(each["seed"])) for each in values["pairs"]),
                rounds=tuple(dict(each) for each in values["rounds"]),
                approximations=tuple(str(each) for each in values["approximations"]),
                use=dict(values.get("use", {})),  # earlier files have none
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this head set is damaged: {type(error).__name__} {error}") from None

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader sees the whole file or the one before."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        try:
            beside.write_text(text + "\n", encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read a file that `save` wrote, or plain "layer,head" lines as the authors of the method publish.

        Raises:
            ValueError: it is neither.
        """
        path = Path(path)
        if path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"{path.name} has more than {_LARGEST_BYTES} bytes: it is no head set")
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("{"):
            return cls.from_lines(text.splitlines())
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is no JSON: {error}") from None

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> HeadSet:
        """Heads from lines "layer,head" (flat layer index), in order; empty lines and # lines are skipped.

        Raises:
            ValueError: a line is something else.
        """
        heads = []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            layer, comma, head = text.partition(",")
            if not (comma and layer.strip().isdecimal() and head.strip().isdecimal()):
                raise ValueError(f"line {number}: {text[:40]!r} is not layer,head, as in 11,15")
            heads.append(Chosen(Head(int(layer), int(head))))
        if not heads:
            raise ValueError("there is no head in the file")
        return cls(chosen=tuple(heads))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _chosen(values: Mapping[str, Any]) -> Chosen:
    return Chosen(
        parse_head(values["head"]),
        int(values["round"]),
        _number(values.get("score")),
        _number(values.get("u")),
    )
