"""Generated exercises of the embedded text model, as batches of token ids on any device.

Every exercise is `<bos> prompt <sep> answer <eos> <eos> ...` of exactly S tokens: the tail of `<eos>` fills
what is left, so rows of one batch need no padding. Only tensor operations, so that a GPU makes its own
batches.

Axes: B exercises, S tokens of a row, N facts of a row, Q queries of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import vocabulary as v

LONGEST_STRING = 60
"""Characters or words of the longest string to copy or reverse."""

LONGEST_SORT = 32
MOST_DIGITS = 5
MOST_QUERIES = 16
FACT_TOKENS = 5
"""Tokens of a fact, and of an answer to a question for one: adjective, noun, digit, food, mark."""
LONGEST_TAIL = 128
"""`<eos>` tokens after the answers of looked-up facts, at most."""

_KEYS = len(v.ADJECTIVES) * len(v.NOUNS)
_KEY_PRIME = 2687  # the largest prime that is no larger than the number of keys
_STRING_OF_NO_WORD = 9  # no word is as long, so that a string of characters is never read as a word
_HELD_OUT = 64  # one sum in so many is never trained on
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch of exercises.

    Args:
        ids: (B, S) int64, the whole rows with their answers.
        start: (B,) int64, position of the first answer token.
        length: (B,) int64, tokens of the answer without its `<eos>`.
        task: (B,) int64, index into `TASKS`.
    """

    ids: Tensor
    start: Tensor
    length: Tensor
    task: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Tensor | slice) -> "Examples":
        """The rows at `index`."""
        return Examples(self.ids[index], self.start[index], self.length[index], self.task[index])

    def masked(self) -> Tensor:
        """(B, S) int64: the rows with `<mask>` from the answer's first token on, as a sampler starts."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return torch.where(place >= self.start[:, None], v.MASK, self.ids)


class Draw:
    """Uniform random numbers on one device, from an own generator or from the device's default one.

    Args:
        device: of every tensor.
        seed: of an own generator; None uses the default generator.
    """

    def __init__(self, device: torch.device | str, seed: int | None = None) -> None:
        self.device = torch.device(device)
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(*shape, device=self.device, generator=self._generator)

    def integers(self, low: int | Tensor, high: int | Tensor, *shape: int) -> Tensor:
        """int64 in low .. high, both included; the bounds broadcast against `shape`."""
        span = high - low + 1
        drawn = low + (self.uniform(*shape) * span).long()
        return torch.minimum(drawn, torch.as_tensor(high, device=self.device))  # float32 may round up to 1

    def pick(self, words: tuple[str, ...], *shape: int) -> Tensor:
        """Ids of uniformly drawn words."""
        table = torch.tensor(v.ids_of(words), device=self.device)
        return table[self.integers(0, len(words) - 1, *shape)]


def sample(
    counts: dict[str, int],
    *,
    tokens: int,
    draw: Draw,
    split: str = "train",
    facts: int | None = None,
    queries: int | None = None,
    generation: int | None = None,
) -> Examples:
    """Draw exercises, shuffled.

    Args:
        counts: rows by task.
        tokens: S, the length of every row.
        draw: source of randomness; its device gets the batch.
        split: "train", or "test" for sums that training never shows. The other tasks have so many exercises
            that another seed is enough.
        facts: facts in each row of the "facts" task; None draws from one to as many as fit.
        queries: queries in such a row; None draws from 1 to `MOST_QUERIES`.
        generation: tokens of such a row from the answer's first on, the `<eos>` included; None draws.

    Raises:
        ValueError: unknown task or split, rows too short for a task.
    """
    if unknown := set(counts) - set(TASKS):
        raise ValueError(f"unknown tasks {sorted(unknown)}; there are {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    parts = []
    for name, count in counts.items():
        if not count:
            continue
        if tokens < SHORTEST[name]:
            raise ValueError(f"task {name!r} needs rows of at least {SHORTEST[name]} tokens, got {tokens}")
        if name == "facts":
            prompt, answer = _facts(count, tokens, draw, facts, queries, generation)
        else:
            prompt, answer = _SHORT_TASKS[name](count, tokens, draw, split)
        parts.append(_assembled(prompt, answer, tokens, TASKS.index(name)))
    order = draw.uniform(sum(len(part) for part in parts)).argsort()
    fields = ("ids", "start", "length", "task")
    return Examples(*(torch.cat([getattr(part, name) for part in parts])[order] for name in fields))


# --- facts --------------------------------------------------------------------------------------------------


def _facts(
    count: int, tokens: int, draw: Draw, facts: int | None, queries: int | None, generation: int | None
) -> tuple[Tensor, Tensor]:
    """`facts big cat 7 plum. the of shy owl 2 fig. get shy owl` and `shy owl 2 fig`.

    A row takes 5 N + 8 Q + 3 tokens and its filler and tail of `<eos>`. A quarter of the rows ask one
    question; half of them hold as many facts as fit, the other half any number on a logarithmic scale, so
    that one fact in long filler (a passkey) is among them.
    """
    fixed = 3
    fitting = (tokens - fixed) // 13
    if generation is not None:
        fitting = min(generation // 5, (tokens - fixed - generation) // 8)
    most_queries = min(MOST_QUERIES, fitting, facts or MOST_QUERIES)
    asked = draw.integers(1, most_queries, count)
    asked = torch.where(draw.uniform(count) < 0.25, torch.ones_like(asked), asked)
    if queries is not None:
        if not 1 <= queries <= most_queries:
            raise ValueError(f"queries must be 1 to {most_queries} here, got {queries}")
        asked = torch.full_like(asked, queries)
    least = asked if facts is None else torch.full_like(asked, facts)
    spare = tokens - fixed - 8 * asked - 5 * least
    longest_tail = spare.clamp(0, min(tokens // 2, LONGEST_TAIL))
    tail = (longest_tail * draw.uniform(count).square()).long()  # short ones more often
    if generation is not None:
        tail = generation - 5 * asked
    room = tokens - fixed - 8 * asked - tail  # tokens of facts and filler together
    if facts is not None and bool((room < 5 * facts).any()):
        raise ValueError(f"{facts} facts do not fit into {tokens} tokens with their queries and answers")
    known = room // 5
    if facts is None:
        logarithmic = (asked * (known.float() / asked) ** draw.uniform(count)).round().long()
        known = torch.where(draw.uniform(count) < 0.5, known, torch.minimum(logarithmic, known))
        known = known.clamp_max(_KEY_PRIME)
    else:
        known = torch.full_like(known, facts)
    entries = _fact_tokens(count, tokens // 5, draw)
    body = _scattered(entries, known, room, tokens, draw)
    scores = draw.uniform(count, tokens // 5)
    scores = scores.masked_fill(torch.arange(tokens // 5, device=draw.device) >= known[:, None], 2.0)
    chosen = scores.topk(most_queries, dim=1, largest=False).indices
    answers = entries.gather(1, chosen[:, :, None].expand(-1, -1, 5)).clone()
    answers[:, :, 4] = v.ID[","]
    unasked = torch.arange(most_queries, device=draw.device) >= asked[:, None]
    answers[unasked] = -1
    last = (asked - 1)[:, None, None]
    answers.scatter_(1, last.expand(-1, -1, 5), _without_comma(answers.gather(1, last.expand(-1, -1, 5))))
    asking = answers[:, :, [0, 1, 4]].flatten(1)
    lead = torch.full((count, 1), v.ID["facts"], device=draw.device)
    get = torch.full((count, 1), v.ID["get"], device=draw.device)
    return torch.cat([lead, body, get, asking], dim=1), answers.flatten(1)


def _without_comma(entry: Tensor) -> Tensor:
    entry = entry.clone()
    entry[:, :, 4] = -1
    return entry


def _fact_tokens(count: int, facts: int, draw: Draw) -> Tensor:
    """(count, facts, 5): adjective, noun, digit, food, full stop; no two facts of a row have one key.

    The keys of a row are an arithmetic progression modulo a prime over a fixed scrambled order of all keys.
    """
    facts = min(facts, _KEY_PRIME)
    step = draw.integers(1, _KEY_PRIME - 1, count)[:, None]
    first = draw.integers(0, _KEY_PRIME - 1, count)[:, None]
    scrambled = torch.randperm(_KEYS, generator=torch.Generator().manual_seed(0)).to(draw.device)
    key = scrambled[(first + step * torch.arange(facts, device=draw.device)) % _KEY_PRIME]
    adjectives = torch.tensor(v.ids_of(v.ADJECTIVES), device=draw.device)
    nouns = torch.tensor(v.ids_of(v.NOUNS), device=draw.device)
    return torch.stack(
        [
            adjectives[key // len(v.NOUNS)],
            nouns[key % len(v.NOUNS)],
            draw.pick(v.DIGITS, count, facts),
            draw.pick(v.FOODS, count, facts),
            torch.full_like(key, v.ID["."]),
        ],
        dim=2,
    )


def _scattered(entries: Tensor, known: Tensor, room: Tensor, tokens: int, draw: Draw) -> Tensor:
    """(B, tokens): the first `known` facts of each row in `room` tokens, filler between; -1 after them."""
    count = len(entries)
    units = known + room - 5 * known  # a fact or one filler word
    scores = draw.uniform(count, tokens)
    scores = scores.masked_fill(torch.arange(tokens, device=draw.device) >= units[:, None], 2.0)
    limit = scores.sort(dim=1).values.gather(1, (known - 1)[:, None])
    is_fact = scores <= limit
    ends = torch.where(is_fact, 5, 1).cumsum(dim=1)
    place = torch.arange(tokens, device=draw.device).expand(count, -1).contiguous()
    unit = torch.searchsorted(ends, place, right=True).clamp_max(tokens - 1)
    inside = is_fact.gather(1, unit)
    offset = place - (ends.gather(1, unit) - 5)
    ordinal = (is_fact.long().cumsum(dim=1) - 1).gather(1, unit).clamp(0, entries.shape[1] - 1)
    index = ordinal * 5 + offset.clamp(0, 4)
    body = torch.where(inside, entries.flatten(1).gather(1, index), draw.pick(v.FILLER, count, tokens))
    return body.masked_fill(place >= room[:, None], -1)


# --- short tasks --------------------------------------------------------------------------------------------


def _copy(count: int, tokens: int, draw: Draw, split: str) -> tuple[Tensor, Tensor]:
    string = _string(count, min(LONGEST_STRING, (tokens - 5) // 2), draw, words=True)
    return _asked("copy", string), string


def _reverse(count: int, tokens: int, draw: Draw, split: str) -> tuple[Tensor, Tensor]:
    string = _string(count, min(LONGEST_STRING, (tokens - 5) // 2), draw, words=True)
    return _asked("reverse", string), string.flip(1)


def _sort(count: int, tokens: int, draw: Draw, split: str) -> tuple[Tensor, Tensor]:
    string = _string(count, min(LONGEST_SORT, (tokens - 5) // 2), draw, words=False)
    return _asked("sort", string), string.sort(dim=1).values  # ids of characters are in their order


def _string(count: int, longest: int, draw: Draw, *, words: bool) -> Tensor:
    """(count, longest): strings of 3 to `longest` characters, or half of them words; -1 after the last."""
    length = draw.integers(3, longest, count)
    string = draw.pick(v.DIGITS + v.LETTERS, count, longest)
    digit = draw.pick(v.DIGITS, count)  # a short string begins with one, so that it spells no word
    string[:, 0] = torch.where(length < _STRING_OF_NO_WORD, digit, string[:, 0])
    if words:
        spoken = draw.pick(v.ADJECTIVES + v.NOUNS + v.FOODS, count, longest)
        string = torch.where(draw.uniform(count, 1) < 0.5, spoken, string)
    return string.masked_fill(torch.arange(longest, device=draw.device) >= length[:, None], -1)


def _add(count: int, tokens: int, draw: Draw, split: str) -> tuple[Tensor, Tensor]:
    """`add 123 + 4567` and `4690`, no leading zeros. Half of the sums have two numbers of one length."""
    shortest = 1 if split == "train" else 2  # held-out sums need room to move the second number in
    first_digits = draw.integers(shortest, MOST_DIGITS, count)
    second_digits = draw.integers(shortest, MOST_DIGITS, count)
    second_digits = torch.where(draw.uniform(count) < 0.5, first_digits, second_digits)
    first, second = _number(first_digits, draw), _number(second_digits, draw)
    second = _moved(first, second, second_digits, held_out=split == "test")
    mark = torch.full((count, 1), v.ID["+"], device=draw.device)
    prompt = torch.cat([_digits(first), mark, _digits(second)], dim=1)
    return _asked("add", prompt), _digits(first + second)


def _number(digits: Tensor, draw: Draw) -> Tensor:
    low = torch.where(digits == 1, 0, 10 ** (digits - 1))
    return draw.integers(low, 10**digits - 1, len(digits))


def is_held_out_sum(first: Tensor, second: Tensor) -> Tensor:
    """Whether a sum is kept from training: one in 64 of those whose second number has two digits or more."""
    return ((first * 37 + second) % _HELD_OUT == 0) & (second >= 10)


def _moved(first: Tensor, second: Tensor, digits: Tensor, *, held_out: bool) -> Tensor:
    """The second number moved into the split, keeping its number of digits."""
    rest = (first * 37 + second) % _HELD_OUT
    if held_out:
        moved = second + (_HELD_OUT - rest) % _HELD_OUT
        return torch.where(moved >= 10**digits, moved - _HELD_OUT, moved)
    moved = torch.where(second + 1 >= 10**digits, second - 1, second + 1)
    return torch.where(is_held_out_sum(first, second), moved, second)


def _digits(number: Tensor) -> Tensor:
    """(B,) -> (B, MOST_DIGITS + 1) ids, -1 in place of leading zeros."""
    powers = 10 ** torch.arange(MOST_DIGITS, -1, -1, device=number.device)
    digit = number[:, None] // powers % 10
    shown = (number[:, None] >= powers) | (powers == 1)
    return torch.where(shown, digit + v.ID["0"], -1)


def _scene(count: int, tokens: int, draw: Draw, split: str) -> tuple[Tensor, Tensor]:
    """`scene red star left of blue ring. what is right of red star` and `blue ring`; 1 to 4 sentences."""
    most = min(4, (tokens - 12) // 7)
    sentences = draw.integers(1, most, count)
    objects = _objects(count, 2 * most, draw)  # (B, most * 2, 2)
    left, right = objects[:, 0::2], objects[:, 1::2]
    relation = draw.integers(0, 3, count, most)
    told = torch.cat([left, _relation(relation), right], dim=2)
    told = torch.cat([told, torch.full_like(told[:, :, :1], v.ID["."])], dim=2)
    told = told.masked_fill((torch.arange(most, device=draw.device) >= sentences[:, None])[:, :, None], -1)
    chosen = draw.integers(0, sentences - 1, count)
    row = torch.arange(count, device=draw.device)
    left, right, relation = left[row, chosen], right[row, chosen], relation[row, chosen]
    forward = draw.uniform(count) < 0.5
    inverse = torch.tensor([v.RELATIONS.index(_INVERSE[name]) for name in v.RELATIONS], device=draw.device)
    asked = torch.where(forward, relation, inverse[relation])
    known = torch.where(forward[:, None], right, left)
    answer = torch.where(forward[:, None], left, right)
    lead = torch.tensor(v.ids_of(("what", "is")), device=draw.device).expand(count, -1)
    question = torch.cat([lead, _relation(asked), known], dim=1)
    return _asked("scene", torch.cat([told.flatten(1), question], dim=1)), answer


def _objects(count: int, objects: int, draw: Draw) -> Tensor:
    """(count, objects, 2) colour and shape, all different within a row."""
    pairs = len(v.COLOURS) * len(v.SHAPES)  # a power of two: an odd step visits every pair
    step = 2 * draw.integers(0, pairs // 2 - 1, count, 1) + 1
    pair = (draw.integers(0, pairs - 1, count, 1) + step * torch.arange(objects, device=draw.device)) % pairs
    colours = torch.tensor(v.ids_of(v.COLOURS), device=draw.device)
    shapes = torch.tensor(v.ids_of(v.SHAPES), device=draw.device)
    return torch.stack([colours[pair // len(v.SHAPES)], shapes[pair % len(v.SHAPES)]], dim=2)


def _relation(index: Tensor) -> Tensor:
    """(...) -> (..., 2) ids: the relation, and "of" after "left" and "right"."""
    words = torch.tensor(v.ids_of(v.RELATIONS), device=index.device)
    return torch.stack([words[index], torch.where(index < 2, v.ID["of"], -1)], dim=-1)


def _asked(word: str, prompt: Tensor) -> Tensor:
    return torch.cat([torch.full_like(prompt[:, :1], v.ID[word]), prompt], dim=1)


_SHORT_TASKS: dict[str, Callable[[int, int, Draw, str], tuple[Tensor, Tensor]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "add": _add,
    "scene": _scene,
}

TASKS = ("facts", *_SHORT_TASKS)
SHORTEST = {"facts": 32, "copy": 16, "reverse": 16, "sort": 16, "add": 24, "scene": 24}
"""Tokens that a row of the task must have at least."""


# --- rows ---------------------------------------------------------------------------------------------------


def _assembled(prompt: Tensor, answer: Tensor, tokens: int, task: int) -> Examples:
    """Rows of begin, prompt, separator, answer and end; entries of -1 in prompt and answer are left out."""
    prompt, prompt_length = _compacted(prompt)
    answer, length = _compacted(answer)
    start = prompt_length + 2
    place = torch.arange(tokens, device=prompt.device)[None]
    ids = torch.full((len(prompt), tokens), v.EOS, device=prompt.device)
    ids[:, 0] = v.BOS
    ids = torch.where((place >= 1) & (place <= prompt_length[:, None]), _at(prompt, place - 1), ids)
    ids = torch.where(place == prompt_length[:, None] + 1, v.SEP, ids)
    offset = place - start[:, None]
    ids = torch.where((offset >= 0) & (offset < length[:, None]), _at(answer, offset), ids)
    return Examples(ids, start, length, torch.full_like(start, task))


def _compacted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of -1 moved to the end of each row, and the number of the others."""
    missing = rows < 0
    order = missing.to(torch.uint8).argsort(dim=1, stable=True)
    return rows.gather(1, order), (~missing).sum(dim=1)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.clamp(0, rows.shape[1] - 1).expand(len(rows), -1))
