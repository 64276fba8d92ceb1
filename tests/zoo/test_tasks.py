"""Exercises of the text model: readable, solvable from their text alone, and what the generators promise."""

import pytest
import torch

from diffctrl.zoo.tasks import (
    SHORTEST,
    TASKS,
    TOKENS,
    Draw,
    is_held_out_sum,
    is_right,
    sample,
    solve,
    tokenizer,
)
from diffctrl.zoo.tasks.vocabulary import EOS, FILLER, ID, MASK, SEP, VOCABULARY_SIZE


@pytest.fixture(scope="module")
def tokens():
    return tokenizer()


def _texts(tokens, examples):
    """(prompt, answer) of every row, with the ids of both."""
    for ids, start, length in zip(examples.ids, examples.start, examples.length, strict=True):
        rows = ids[:start], ids[start : start + length]
        yield *(tokens.decode(row, skip_special_tokens=True) for row in rows), *rows


def test_every_token_is_its_own_text(tokens, tmp_path):
    assert len(TOKENS) == len(set(TOKENS)) <= VOCABULARY_SIZE
    tokens.save_pretrained(tmp_path)
    again = type(tokens).from_pretrained(tmp_path, local_files_only=True)
    for index, token in enumerate(TOKENS):
        assert again(token.upper() if token.isalpha() else token, add_special_tokens=False).input_ids == [
            index
        ]
    assert again.padding_side == "left"
    assert (again.mask_token_id, again.pad_token_id, again.eos_token_id) == (MASK, 0, EOS)


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("add 123 + 4567 =", "add 123 + 4567"),
        ("ADD 1+2", "add 1 + 2"),
        ("copy catdog7x", "copy catdog7x"),
        ("facts Brown cat 7 plum.grey fox 2 lemon . get grey fox,brown cat ?", None),
    ],
)
def test_what_people_type_becomes_the_canonical_text(tokens, typed, canonical):
    canonical = canonical or "facts brown cat 7 plum. grey fox 2 lemon. get grey fox, brown cat"
    ids = tokens(typed).input_ids
    assert tokens.decode(ids, skip_special_tokens=True) == canonical
    assert ids[-1] == SEP
    assert ids == tokens(canonical).input_ids


def test_what_the_model_cannot_know_is_an_unknown_token(tokens):
    assert tokens.unk_token_id in tokens("copy ab%c").input_ids
    assert tokens.unk_token_id not in tokens("copy abc elephant").input_ids  # spelt in letters


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("length", [48, 128, 300])
def test_texts_round_trip_and_the_answer_follows_from_the_prompt(tokens, length, split):
    examples = sample(dict.fromkeys(TASKS, 24), tokens=length, draw=Draw("cpu", length), split=split)
    assert examples.ids.shape == (24 * len(TASKS), length)
    assert torch.equal(examples.task.bincount(), torch.full((len(TASKS),), 24))
    for prompt, answer, prompt_ids, answer_ids in _texts(tokens, examples):
        assert solve(prompt) == answer
        assert is_right(prompt, f" {answer} ")
        assert tokens(prompt).input_ids == prompt_ids.tolist()
        assert tokens(answer, add_special_tokens=False).input_ids == answer_ids.tolist()
    ends = examples.start + examples.length
    assert (ends < length).all()
    after = torch.arange(length) >= ends[:, None]
    assert (examples.ids[after] == EOS).all()
    assert not (examples.ids[~after] == EOS).any()


def test_wrong_answers_are_rejected(tokens):
    examples = sample(dict.fromkeys(TASKS, 12), tokens=96, draw=Draw("cpu", 3))
    planted = 0
    for prompt, answer, _, ids in _texts(tokens, examples):
        for place in range(len(ids)):
            changed = ids.clone()
            changed[place] = ids[place] + 1
            wrong = tokens.decode(changed, skip_special_tokens=True)
            assert not is_right(prompt, wrong)
            planted += 1
        assert not is_right(prompt, answer[:-1])
        assert not is_right(prompt, "")
        assert not is_right(prompt, answer + " cat")
    assert planted > 300


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "tell me a story",
        "add 12",
        "add 1 , 2",
        "facts big cat 7 plum. get big dog",
        "facts big cat 7 plum.",
        "scene red star above blue ring. what is left of red star",
    ],
)
def test_what_is_no_exercise_is_refused(prompt):
    with pytest.raises(ValueError, match=r"exercise|answered"):
        solve(prompt)


def test_facts_have_different_keys_and_fill_the_row():
    examples = sample({"facts": 300}, tokens=512, draw=Draw("cpu", 5))
    digits = torch.tensor([ID[d] for d in "0123456789"])
    filler = torch.tensor([ID[word] for word in FILLER])
    known, filled = [], []
    for ids, start in zip(examples.ids, examples.start, strict=True):
        body = ids[2 : (ids == ID["get"]).nonzero()[0, 0]]
        places = torch.isin(body, digits).nonzero().flatten()
        keys = {(int(body[p - 2]), int(body[p - 1])) for p in places}
        assert len(keys) == len(places) >= 1
        known.append(len(places))
        filled.append(int(torch.isin(body, filler).sum()))
        assert len(body) == 5 * known[-1] + filled[-1]
        assert len(ids) - start >= 4 + 1
    known = torch.tensor(known)
    assert (known <= 3).float().mean() > 0.05  # a passkey in filler
    assert (known >= 60).float().mean() > 0.3  # as many as fit
    asked = (examples.length + 1) // 5
    assert 0.2 < (asked == 1).float().mean() < 0.4
    assert asked.max() == 16
    assert (512 - examples.start - examples.length).max() <= 129


def test_asked_for_numbers_of_facts_and_questions():
    examples = sample({"facts": 20}, tokens=256, draw=Draw("cpu", 1), facts=9, queries=2)
    assert (examples.length == 9).all()
    digits = torch.tensor([ID[d] for d in "0123456789"])
    assert (torch.isin(examples.ids, digits).sum(dim=1) == 9 + 2).all()
    fixed = sample({"facts": 20}, tokens=256, draw=Draw("cpu", 1), queries=3, generation=32)
    assert (fixed.start == 256 - 32).all()
    with pytest.raises(ValueError, match="do not fit"):
        sample({"facts": 1}, tokens=64, draw=Draw("cpu", 1), facts=12)


def test_seeds_repeat_and_differ():
    counts = dict.fromkeys(TASKS, 8)
    first, again, other = (sample(counts, tokens=64, draw=Draw("cpu", seed)) for seed in (7, 7, 8))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


def test_held_out_sums_are_never_trained_on(tokens):
    for split in ("train", "test"):
        examples = sample({"add": 3000}, tokens=32, draw=Draw("cpu", 2), split=split)
        sums = [prompt.split() for prompt, *_ in _texts(tokens, examples)]
        first = torch.tensor([int(words[1]) for words in sums])
        second = torch.tensor([int(words[3]) for words in sums])
        assert (is_held_out_sum(first, second) == (split == "test")).all()
        widths = torch.tensor([len(words[3]) for words in sums])
        assert len(widths.unique()) == (5 if split == "train" else 4)


def test_wrong_requests_are_named():
    draw = Draw("cpu", 0)
    with pytest.raises(ValueError, match="unknown tasks"):
        sample({"sing": 1}, tokens=64, draw=draw)
    with pytest.raises(ValueError, match="at least 32"):
        sample({"facts": 1}, tokens=SHORTEST["facts"] - 1, draw=draw)
    with pytest.raises(ValueError, match="split"):
        sample({"add": 1}, tokens=64, draw=draw, split="valid")
    with pytest.raises(ValueError, match="queries"):
        sample({"facts": 1}, tokens=64, draw=draw, queries=9)
    with pytest.raises(ValueError, match="queries"):
        sample({"facts": 1}, tokens=256, draw=draw, queries=7, generation=32)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fits_its_shortest_row(task):
    examples = sample({task: 200}, tokens=SHORTEST[task], draw=Draw("cpu", 4))
    assert (examples.start + examples.length < SHORTEST[task]).all()
