"""What `evaluate_dlm.py` asks of a language model: prompts with known answers, and ways to attend."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import diffctrl
from diffctrl.dlm import (
    DreamSampler,
    DreamSampling,
    LLaDASampler,
    LLaDASampling,
    Prompts,
    Sampler,
    SpecialTokens,
    decode,
)
from diffctrl.processors import SparseDAttnProcessor
from diffctrl.sparsed import SparseDConfig
from diffctrl.zoo.judge import wilson
from diffctrl.zoo.tasks import TASKS, Draw, Examples, sample

from .evaluation_text_patterns import FixedPatternAttnProcessor

_SEED = 77_000
_FACTS_AT_QUERY = {"passkey": (1, 1), "one fact": (None, 1), "four facts": (None, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Prompts of one kind.

    Args:
        name: of the kind, with the length where it matters.
        prompts: token ids of each.
        answers: the text that is right, by prompt; a tuple where several texts must all occur.
        gen_length: tokens to generate, and denoising steps.
        judge: (answer of the model, what is right) -> whether it is.
    """

    name: str
    prompts: list[list[int]]
    answers: list[Any]
    gen_length: int
    judge: Callable[[str, Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to attend.

    Args:
        name: in the table.
        processor: what is applied, None for the stock model.
        early: whether its pattern holds from the second step on.
    """

    name: str
    processor: Any = None
    early: bool = False


@dataclass(slots=True, kw_only=True)
class Reading:
    """What one variant did on one suite.

    Args:
        right: by prompt.
        density: share of the (query, key) pairs that the patterns keep, mean over batches; 1 where dense.
        mass: share of the dense attention in them.
        sparse_steps, steps: how many of the steps were sparse.
        patterns: by layer, of the last batch.
        answers: the texts.
    """

    right: list[bool]
    density: float
    mass: float
    sparse_steps: int
    steps: int
    patterns: dict[int, Any]
    answers: list[str]


def same_text(answer: str, right: str) -> bool:
    """Exact match; spaces at the ends do not count."""
    return answer.strip() == right.strip()


def lookup_suites(tokenizer: Any, lengths: Sequence[int], count: int, gen_length: int = 24) -> list[Suite]:
    """Facts in texts of `lengths` tokens with their answers: in filler, one asked for, four asked for."""
    found = []
    for length in lengths:
        for place, (name, (facts, queries)) in enumerate(_FACTS_AT_QUERY.items()):
            examples = sample(
                {"facts": count},
                tokens=length,
                draw=Draw("cpu", _SEED + 10 * length + place),
                split="test",
                facts=facts,
                queries=queries,
                generation=gen_length,
            )
            found.append(_suite(f"{name}, {length} tokens", tokenizer, examples, gen_length))
    return found


def short_suites(tokenizer: Any, count: int, gen_length: int = 64) -> list[Suite]:
    """Copying, reversing, sorting, sums that training never showed, and scenes."""
    found = []
    for place, name in enumerate(TASKS[1:]):
        examples = sample({name: count}, tokens=128, draw=Draw("cpu", _SEED + place), split="test")
        found.append(_suite(name, tokenizer, examples, gen_length))
    return found


def _suite(name: str, tokenizer: Any, examples: Examples, gen_length: int) -> Suite:
    prompts, answers = [], []
    rows = zip(examples.ids.tolist(), examples.start.tolist(), examples.length.tolist(), strict=True)
    for ids, start, length in rows:
        prompts.append(ids[:start])
        answers.append(tokenizer.decode(ids[start : start + length], skip_special_tokens=True))
    return Suite(name=name, prompts=prompts, answers=answers, gen_length=gen_length, judge=same_text)


def variants(config: SparseDConfig) -> list[Variant]:
    """Dense, SparseD, and fixed patterns that keep as many blocks of each row in the same steps.

    The last two keep their pattern from the second step on, as those methods are used by themselves.
    """
    return [
        Variant(name="dense"),
        Variant(name="SparseD", processor=SparseDAttnProcessor(config)),
        Variant(name="sliding window", processor=FixedPatternAttnProcessor("window", config)),
        Variant(name="StreamingLLM", processor=FixedPatternAttnProcessor("streaming", config)),
        Variant(
            name="sliding window, no dense steps",
            processor=FixedPatternAttnProcessor("window", config, skip=0.0),
            early=True,
        ),
        Variant(
            name="StreamingLLM, no dense steps",
            processor=FixedPatternAttnProcessor("streaming", config, skip=0.0),
            early=True,
        ),
    ]


def greedy_sampler(kind: str, special: SpecialTokens, gen_length: int) -> Sampler:
    """The surest tokens first, one in each step, and no noise; `kind` is "llada" or "dream"."""
    if kind == "dream":
        return DreamSampler(
            DreamSampling(gen_length=gen_length, steps=gen_length, alg="maskgit_plus"), special
        )
    return LLaDASampler(
        LLaDASampling(gen_length=gen_length, steps=gen_length, block_length=gen_length), special
    )


def read(
    model: Any, tokenizer: Any, sampler: Any, suite: Suite, variant: Variant, *, batch_tokens: int
) -> Reading:
    """Generate every answer of a suite with one variant, and judge it.

    Args:
        model: of transformers, bidirectional.
        tokenizer: its tokenizer.
        sampler: of `greedy_sampler`, for the suite's `gen_length`.
        suite: the prompts.
        variant: how to attend; applied here and taken off again.
        batch_tokens: tokens of a batch, prompts and answers together.
    """
    applied: Any = (
        nullcontext(None) if variant.processor is None else diffctrl.apply(model, variant.processor)
    )
    right: list[bool] = []
    texts: list[str] = []
    measured: list[dict[str, Any]] = []
    patterns: dict[int, Any] = {}
    with applied as control:
        for rows in _batches(suite, batch_tokens):
            prompts = Prompts.of([suite.prompts[row] for row in rows], sampler.special.pad)
            generation = sampler.generate(model, prompts, control=control)
            for row, ids in zip(rows, generation.answers(), strict=True):
                texts.append(decode(tokenizer, ids, sampler.special))
                right.append(suite.judge(texts[-1], suite.answers[row]))
            if control is not None:
                (stats,) = control.stats().values()
                if stats["stays_dense"] is not None:
                    raise RuntimeError(f"{variant.name} stayed dense on {suite.name}: {stats['stays_dense']}")
                measured.append(stats)
                patterns = dict(control.controller.patterns)
    return Reading(
        right=right,
        density=_mean([stats["pattern_density"] for stats in measured], 1.0),
        mass=_mean([stats["retained_mass"] for stats in measured], 1.0),
        sparse_steps=measured[-1]["steps"]["sparse"] if measured else 0,
        steps=suite.gen_length,
        patterns=patterns,
        answers=texts,
    )


def _batches(suite: Suite, batch_tokens: int) -> Iterator[list[int]]:
    """Rows in their order, so many that the longest of them times their number stays below the limit."""
    rows: list[int] = []
    longest = 0
    for row, prompt in enumerate(suite.prompts):
        longest = max(longest, len(prompt) + suite.gen_length)
        if rows and longest * (len(rows) + 1) > batch_tokens:
            yield rows
            rows, longest = [], len(prompt) + suite.gen_length
        rows.append(row)
    if rows:
        yield rows


def share(right: list[bool]) -> tuple[float, float, float]:
    """Per cent of right answers and its 95 % Wilson interval."""
    low, high = wilson(sum(right), len(right))
    return 100.0 * sum(right) / len(right), 100.0 * low, 100.0 * high


def difference(first: list[bool], second: list[bool]) -> tuple[float, float, float]:
    """Points by which `first` is better than `second` on the same prompts, and their 95 % interval.

    The interval is that of paired proportions with Agresti and Min's correction (2005), which adds half a
    prompt to each of the four cells: without it, no disagreement would mean no uncertainty.

    >>> difference([True] * 99 + [False], [True] * 99 + [False])[0]
    0.0
    """
    total = len(first)
    gained = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    up, down, size = gained + 0.5, lost + 0.5, total + 2.0
    middle = (up - down) / size
    half = 1.96 * (up + down - (up - down) ** 2 / size) ** 0.5 / size
    value = 100.0 * (gained - lost) / total
    return value, 100.0 * (middle - half), 100.0 * (middle + half)


def _mean(values: list[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty
