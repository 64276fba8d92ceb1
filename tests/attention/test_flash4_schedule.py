"""Query blocks dealt out to programs: each exactly once, evenly, with what the device code reads of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.attention import BlockLists
from diffctrl.attention.kernels.flash4_schedule import (
    BATCH,
    COUNT,
    HEAD,
    K_LEN,
    LAST,
    LIST,
    Q_BLOCK,
    START,
    deal,
)  # fmt: skip
from tests.attention.cases import random_lists


def entries(schedule: torch.Tensor) -> list[list[int]]:
    """Those that the programs take, with the program in front."""
    taken = []
    for program in range(schedule.shape[1]):
        for entry in schedule[:, program].tolist():
            if entry[COUNT] < 0:
                break
            taken.append([program, *entry])
        else:
            raise AssertionError("a program does not find its end")
    return taken


def dealt(mask: BlockLists, batch: int, heads: int, programs: int) -> torch.Tensor:
    k_lens = [mask.lengths[1]] if mask.n_valid is None else mask.n_valid.tolist()
    return deal(mask.counts, mask.indices, k_lens, batch, heads, programs)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 4), shared=st.tuples(st.booleans(), st.booleans()),
    q_len=st.integers(1, 700), programs=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_each_block_once_with_its_own_list(batch, heads, shared, q_len, programs, seed):
    bm, hm = (1 if one else n for one, n in zip(shared, (batch, heads), strict=True))
    mask = random_lists(
        (128, 128), (q_len, 900), density=0.4, heads=hm, batch=bm, seed=seed, allow_empty=True
    )
    taken = entries(dealt(mask, batch, heads, programs))
    nq = mask.n_q_blocks
    places = sorted((e[1 + BATCH], e[1 + HEAD], e[1 + Q_BLOCK]) for e in taken)
    assert places == [(b, h, q) for b in range(batch) for h in range(heads) for q in range(nq)]
    lists = mask.indices.flatten(0, 2)
    for _, *entry in taken:
        b, h, q = (entry[i] for i in (BATCH, HEAD, Q_BLOCK))
        own = (b if bm > 1 else 0, h if hm > 1 else 0, q)
        count = int(mask.counts[own])
        assert entry[COUNT] == count
        assert torch.equal(lists[entry[LIST], :count], mask.indices[own][:count])
        assert count == 0 or entry[LAST] == int(mask.indices[own][count - 1])
        assert entry[K_LEN] == 900


def test_lengths_go_with_their_row():
    mask = random_lists((128, 128), (300, 500), heads=2, n_valid=[130, 500]).clipped()
    assert {(e[1 + BATCH], e[1 + K_LEN]) for e in entries(dealt(mask, 2, 2, 5))} == {(0, 130), (1, 500)}


def test_equal_lists_go_round_and_keep_heads_together():
    mask = BlockLists.full((128, 128), (36 * 128, 36 * 128))
    schedule = dealt(mask, 1, 24, 132)
    assert schedule.shape[:2] == (8, 132)
    first = schedule[0]
    assert first[:, HEAD].tolist() == [i // 36 for i in range(132)]
    assert (schedule[:, :, COUNT] >= 0).sum(0).unique().tolist() == [6, 7]


@pytest.mark.parametrize("longest", [17, 60])
def test_ragged_lists_end_together(longest):
    """The last program ends little after the mean; round robin would take a tenth longer at least."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, longest + 1, (1, 24, 36), generator=generator, dtype=torch.int32)
    indices = torch.arange(longest, dtype=torch.int32).expand(1, 24, 36, longest)
    schedule = deal(counts, indices, [longest * 128], 1, 24, 132)
    count = schedule[..., COUNT]
    load = torch.where(count >= 0, count + START, 0).sum(0).float()
    assert float(load.max() / load.mean()) < 1.04
    dealt_in_turn = torch.nn.functional.pad((counts + START).flatten(), (0, 60)).view(7, 132).sum(0).float()
    assert float(dealt_in_turn.max() / dealt_in_turn.mean()) > 1.1
