"""The page of results is made from the JSON files, and says where one breaks the schema."""

import json

import pytest

from diffctrl.scripts import results_index

RESULT = {
    "topic": "engine",
    "command": "python -m diffctrl.scripts.bench.engine",
    "date": "2026-01-02",
    "commit": "abc1234",
    "device": {"name": "NVIDIA H100 80GB", "driver": "1"},
    "versions": {"torch": "2.13.0"},
    "seeds": [0],
    "figures": [
        {"name": "share of dense", "value": 0.94, "bar": 0.93, "compare": ">=", "holds": True, "unit": ""},
        {"name": "a|b", "value": 3.14159, "low": 3, "high": 3.2, "unit": "ms", "note": "one\nrun"},
        {"name": "missed", "value": 2, "bar": 1, "compare": "<=", "holds": False, "note": "see issue"},
    ],
}


def _write(folder, **changes):
    (folder / "engine.json").write_text(json.dumps({**RESULT, **changes}))


def test_page_shows_every_figure_and_what_was_missed(tmp_path):
    _write(tmp_path)
    assert results_index.main(["--folder", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "NVIDIA H100 80GB; torch 2.13.0; seeds: [0]." in page
    assert "| share of dense | 0.94 |  | >= 0.93 | yes |  |" in page
    assert "| a\\|b | 3.142 ms | 3 to 3.2 |  |  | one run |" in page
    assert "| missed | 2 |  | <= 1 | **no** | see issue |" in page
    assert "Not reached" not in page
    _write(tmp_path, not_reached="the last part")
    results_index.main(["--folder", str(tmp_path)])
    assert "Not reached by this run: the last part." in (tmp_path / "README.md").read_text()


def test_many_figures_are_folded_behind_those_with_bars(tmp_path):
    plain = [{"name": f"rate {i}", "value": i} for i in range(results_index.FOLDED_FROM)]
    _write(tmp_path, figures=[*plain, *RESULT["figures"]])
    results_index.main(["--folder", str(tmp_path)])
    shown, folded = (tmp_path / "README.md").read_text().split("<details>")
    assert [name in shown for name in ("share of dense", "missed", "rate 7 ", "a\\|b")] == [
        True,
        True,
        False,
        False,
    ]
    assert f"<summary>{len(plain) + 1} figures without a bar</summary>\n\n| figure |" in folded
    assert all(f"| rate {i} |" in folded for i in range(len(plain)))
    assert folded.rstrip().endswith("</details>")


def test_check_tells_an_old_page(tmp_path):
    _write(tmp_path)
    assert results_index.main(["--folder", str(tmp_path), "--check"]) == 1
    results_index.main(["--folder", str(tmp_path)])
    assert results_index.main(["--folder", str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize(
    ("figure", "says"),
    [
        ({"name": "x", "value": 1, "bar": 2, "compare": ">=", "holds": True}, "is False"),
        ({"name": "x", "value": 1, "bar": 2, "compare": ">", "holds": False}, "accepted"),
        ({"name": "x", "value": 1, "colour": "red"}, "colour"),
        ({"name": "x"}, "lacks value"),
    ],
)
def test_broken_figures_are_named(tmp_path, figure, says):
    _write(tmp_path, figures=[figure])
    with pytest.raises(ValueError, match=says):
        results_index.main(["--folder", str(tmp_path)])


def test_committed_page_is_up_to_date():
    assert results_index.main(["--check"]) == 0
