"""The evaluation of sparse attention on language models: fair patterns, honest intervals, users' files."""

import json

import pytest
import torch

from diffctrl.attention import BlockLists
from diffctrl.scripts import evaluate_dlm, results_index
from diffctrl.scripts.evaluation_text import difference, lookup_suites, short_suites
from diffctrl.scripts.evaluation_text_files import file_suite, holds_all, same_number
from diffctrl.scripts.evaluation_text_patterns import fixed_blocks, overlap, overlap_of_heads
from diffctrl.scripts.training_text_pack import write_pack
from diffctrl.sparsed import SparseDConfig
from diffctrl.sparsed.layout import RowBlocks
from diffctrl.sparsed.selection import select
from diffctrl.zoo.tasks import TASKS, is_right, tokenizer
from diffctrl.zoo.text import TextSize, text_model


@pytest.fixture(scope="module")
def tokens():
    return tokenizer()


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pack") / "pack.safetensors"
    size = TextSize(width=32, layers=2, heads=2, key_heads=2, head_dim=16, mlp=48)
    write_pack(text_model(size), path, {"smoke": True, "lengths": [64], "steps": 0})
    return path


@pytest.mark.parametrize(("count", "split"), [(8, 7), (9, 5), (12, 0), (1, 0), (40, 36)])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_fixed_patterns_keep_as_many_blocks_as_sparsed(count, split, share):
    row, config = RowBlocks(count, split), SparseDConfig(select=share, block_size=16)
    kept = select(torch.rand(1, count, count), row, config).counts[0]
    window, streaming = (fixed_blocks(shape, row, config) for shape in ("window", "streaming"))
    assert torch.equal(window.sum(dim=1), kept)
    assert torch.equal(streaming.sum(dim=1), kept)
    assert streaming[:, 0].all()
    assert window.diagonal().all()
    distance = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    inside, outside = distance.masked_fill(~window, -1), distance.masked_fill(window, count)
    assert (inside.amax(dim=1) <= outside.amin(dim=1)).all()  # nothing left out is nearer


def test_unknown_shapes_are_named():
    with pytest.raises(ValueError, match="window, streaming"):
        fixed_blocks("ring", RowBlocks(4, 2), SparseDConfig())  # type: ignore[arg-type]


def test_overlap_is_intersection_over_union():
    def lists(*rows):
        blocks = torch.tensor(rows, dtype=torch.bool).view(1, len(rows) // 2, 2, 2)
        return BlockLists.from_dense_blocks(blocks, (4, 4), (8, 8))

    one, other = lists([1, 0], [1, 1]), lists([0, 1], [1, 1])
    assert overlap(one, one) == 1.0
    assert overlap(one, other) == pytest.approx(2 / 4)
    assert overlap_of_heads(lists([1, 0], [1, 1], [0, 1], [1, 1])) == pytest.approx(2 / 4)


def test_differences_are_paired():
    good, bad = [True] * 100, [True] * 90 + [False] * 10
    value, low, high = difference(good, bad)
    assert value == pytest.approx(10.0)
    assert 3.0 < low < 10.0 < high < 18.0
    value, low, high = difference(good, good)
    assert value == 0.0
    assert -2.5 < low < 0.0 < high < 2.5  # agreement on a hundred prompts is no proof for all
    # The same shares with all disagreements opposed are far less certain.
    first, second = [True] * 50 + [False] * 50, [False] * 50 + [True] * 50
    assert difference(first, second)[2] > 15.0


def test_suites_have_their_lengths_and_true_answers(tokens):
    suites = [*lookup_suites(tokens, [96], 3), *short_suites(tokens, 3)]
    assert [suite.name for suite in suites] == [
        "passkey, 96 tokens",
        "one fact, 96 tokens",
        "four facts, 96 tokens",
        *TASKS[1:],
    ]
    for suite in suites:
        for prompt, answer in zip(suite.prompts, suite.answers, strict=True):
            assert is_right(tokens.decode(prompt, skip_special_tokens=True), answer)
            assert suite.judge(f" {answer} ", answer)
            assert not suite.judge(answer + " plum", answer)
            if "tokens" in suite.name:
                assert len(prompt) + suite.gen_length == 96
    again = lookup_suites(tokens, [96], 3)
    assert again[1].prompts == suites[1].prompts


def _lines(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n", encoding="utf-8")
    return path


def test_files_of_users(tokens, tmp_path):
    gsm8k = _lines(tmp_path / "gsm8k.jsonl", {"question": "copy ab", "answer": "so 1+1\n#### 1,234"})
    suite = file_suite(gsm8k, tokens, gen_length=16)
    assert suite.judge("it is 5, no: 1234.", suite.answers[0])
    assert not suite.judge("it is 1234, no: 5", suite.answers[0])
    assert suite.prompts == [tokens("copy ab").input_ids]
    ruler = _lines(tmp_path / "ruler.jsonl", *[{"input": "copy ab", "outputs": ["Red", "7"], "index": 0}] * 3)
    suite = file_suite(ruler, tokens, gen_length=16, count=2, name="niah")
    assert (suite.name, len(suite.prompts)) == ("niah", 2)
    assert suite.judge("RED and 7", suite.answers[0])
    assert not suite.judge("red", suite.answers[0])
    assert same_number("-3.5", -3.5)
    assert not same_number("none", 1.0)
    assert holds_all("a", ())
    for entries, says in (
        ([{"text": "a"}], "line 1 has the fields text"),
        ([{"prompt": "copy ab", "answer": "ab"}, {"input": "a", "outputs": []}], "line 2: ruler after"),
        ([{"question": "a", "answer": "no number"}], "no number"),
        ([["a"]], "of no object"),
    ):
        with pytest.raises(ValueError, match=says):
            file_suite(_lines(tmp_path / "bad.jsonl", *entries), tokens, gen_length=16)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        file_suite(tmp_path / "bad.jsonl", tokens, gen_length=16)


def test_every_part_runs_and_writes_the_results_schema(pack, tmp_path):
    torch.set_num_threads(1)
    # Rows of 80 and 96 tokens with their answers: padded, and whole blocks of 16.
    file = _lines(
        tmp_path / "plain.jsonl",
        *[{"prompt": f"copy {'ab1' * n}{'c' * m}", "answer": "x"} for n, m in ((23, 0), (28, 1))],
    )
    out, picture = tmp_path / "dlm.json", tmp_path / "ablation.png"
    command = [
        "--pack",
        str(pack),
        "--jsonl",
        str(file),
        "--gen-length",
        "8",
        "--block-size",
        "16",
        "--quick",
    ]
    figures = evaluate_dlm.main([*command, "--out", str(out), "--figure", str(picture), "--device", "cpu"])
    report = results_index.read(out)
    assert report["topic"] == "dlm"
    kept = evaluate_dlm._figures_of(out)  # what --add goes on from
    assert [figure.as_dict() for figure in kept] == report["figures"] == [f.as_dict() for f in figures]
    names = [figure.name for figure in figures]
    assert {"plain: dense", "plain: SparseD", "plain: lost to dense by SparseD"} <= set(names)
    assert any(name.startswith("ablation, select, StreamingLLM") for name in names)
    assert "overlap of patterns of two heads of a layer" in names
    assert picture.stat().st_size > 5000
    notes = {figure.name: figure.note for figure in figures}
    kept = [
        notes[f"plain: {name}"].split(";")[1].split(",")
        for name in ("SparseD", "sliding window", "StreamingLLM")
    ]
    densities = {part[0] for part in kept}
    assert len(densities) == 1  # the comparison is at equal density
    assert "6 of 8 steps sparse" in notes["plain: SparseD"]
    assert "7 of 8 steps sparse" in notes["plain: sliding window, no dense steps"]


def test_models_that_do_not_know_the_exercises_need_files(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("diffctrl.zoo.tasks.TOKENS", ("a", "b"))
    with pytest.raises(SystemExit, match="--jsonl"):
        evaluate_dlm.main(["--pack", str(pack), "--quick", "--device", "cpu"])
