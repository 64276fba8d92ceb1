"""Benchmarks that a user has as JSON lines: questions of GSM8K, tasks of RULER, or prompts with answers.

Each line is an object with the fields of one of three kinds, recognised by their names:

- GSM8K: `question`, and `answer` that ends in `#### number`. Right is the last number of the model's answer.
- RULER (`synthetic` tasks as its scripts write them): `input`, and `outputs`, a list of texts that must all
  occur in the model's answer; upper and lower case are the same.
- plain: `prompt`, and `answer`, which the model's answer must equal.
"""

import json
import re
from pathlib import Path
from typing import Any

from diffctrl.dlm import encode

from .evaluation_text import Suite, same_text

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def file_suite(
    path: Path, tokenizer: Any, *, gen_length: int, count: int | None = None, name: str | None = None
) -> Suite:
    """The first `count` lines of a file, all where None.

    Raises:
        ValueError: a line is none of the three kinds, or another than the first; says which line.
    """
    prompts, answers, kinds = [], [], set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if count is not None and len(prompts) == count:
                break
            if not line.strip():
                continue
            kind, prompt, answer = _entry(line, f"{path.name}, line {number}")
            kinds.add(kind)
            prompts.append(prompt)
            answers.append(answer)
            if len(kinds) > 1:
                raise ValueError(f"{path.name}, line {number}: {kind} after other kinds; a file has one kind")
    if not prompts:
        raise ValueError(f"{path.name} has no lines")
    judge = {"gsm8k": same_number, "ruler": holds_all, "plain": same_text}[kinds.pop()]
    return Suite(
        name=name or path.stem,
        prompts=encode(tokenizer, prompts),
        answers=answers,
        gen_length=gen_length,
        judge=judge,
    )


def _entry(line: str, where: str) -> tuple[str, str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error})") from None
    fields = set(found) if isinstance(found, dict) else set()
    if {"question", "answer"} <= fields:
        return (
            "gsm8k",
            str(found["question"]),
            _last_number(str(found["answer"]).rpartition("####")[2], where),
        )
    if {"input", "outputs"} <= fields and isinstance(found["outputs"], list):
        return "ruler", str(found["input"]), tuple(str(each) for each in found["outputs"])
    if {"prompt", "answer"} <= fields:
        return "plain", str(found["prompt"]), str(found["answer"])
    raise ValueError(
        f"{where} has the fields {', '.join(sorted(fields)) or 'of no object'}; accepted are question and "
        "answer (GSM8K), input and outputs (RULER), prompt and answer"
    )


def _last_number(text: str, where: str) -> float:
    numbers = _NUMBER.findall(text)
    if not numbers:
        raise ValueError(f"{where}: the answer has no number after ####")
    return float(numbers[-1].replace(",", ""))


def same_number(answer: str, right: float) -> bool:
    """Whether the last number of a text is the right one."""
    numbers = _NUMBER.findall(answer)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == right


def holds_all(answer: str, right: tuple[str, ...]) -> bool:
    """Whether all texts occur in an answer."""
    return all(text.lower() in answer.lower() for text in right)
