"""Which program takes which query block: dealt out on the host, where the length of each list is known.

A table instead of a counter on the card: no second kernel to reset it, nothing that two streams could share,
the same in a replayed graph. What a block computes does not depend on who computes it or when.
"""

from __future__ import annotations

import heapq

import torch

TILE = 128  # queries, and keys, of a block
# Fields of an entry: batch row, head, query block, length of its list, row of its list among all lists, last
# block of its list, valid keys of the batch row. Eight numbers, so that an entry is 32 bytes.
BATCH, HEAD, Q_BLOCK, COUNT, LIST, LAST, K_LEN = range(7)
FIELDS = 8
# What a block costs beside its list, in key blocks.
START = 1
# The heaviest first among so many blocks for each program at the end: earlier ones stay in their order, so
# that programs which run together share the keys of a head.
SORTED_TURNS = 4


def deal(
    counts: torch.Tensor, indices: torch.Tensor, k_lens: list[int], batch: int, heads: int, programs: int
) -> torch.Tensor:
    """The schedule, int32 (turns + 1, programs, FIELDS), on the CPU.

    counts int32 (Bm, Hm, NQ) and indices int32 (Bm, Hm, NQ, W) as in `BlockLists`; k_lens: valid keys of each
    batch row. A program takes the entries of its column from the top until the first whose COUNT is -1.
    """
    bm, hm, nq = counts.shape
    fields = torch.zeros(batch, heads, nq, FIELDS, dtype=torch.int32)
    fields[..., BATCH] = torch.arange(batch, dtype=torch.int32).view(-1, 1, 1)
    fields[..., HEAD] = torch.arange(heads, dtype=torch.int32).view(-1, 1)
    fields[..., Q_BLOCK] = torch.arange(nq, dtype=torch.int32)
    fields[..., COUNT] = counts
    fields[..., LIST] = torch.arange(bm * hm * nq, dtype=torch.int32).view(bm, hm, nq)
    fields[..., LAST] = indices.gather(-1, (counts - 1).clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    fields[..., K_LEN] = torch.tensor(k_lens, dtype=torch.int32).view(-1, 1, 1)
    tiles = fields.flatten(0, 2)
    programs = min(programs, len(tiles))
    turn, program = _places(tiles[:, COUNT], programs)
    schedule = torch.zeros(int(turn.max()) + 2, programs, FIELDS, dtype=torch.int32)
    schedule[..., COUNT] = -1
    schedule[turn, program] = tiles
    return schedule


def _places(counts: torch.Tensor, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(turn, program) of each block: round robin for equal lists, else the next block to whoever is free."""
    number = torch.arange(len(counts))
    if int(counts.min()) == int(counts.max()):
        return number // programs, number % programs
    ordered = max(0, len(counts) - SORTED_TURNS * programs)
    heavy_first = torch.argsort(counts[ordered:], descending=True, stable=True) + ordered
    order = torch.cat([number[:ordered], heavy_first])
    free = [(0, program, 0) for program in range(programs)]  # (when, who, which turn): a heap as it stands
    turns, owners = [], []
    for count in counts[order].tolist():
        when, program, turn = free[0]
        heapq.heapreplace(free, (when + count + START, program, turn + 1))
        turns.append(turn)
        owners.append(program)
    turn, program = torch.empty_like(number), torch.empty_like(number)
    turn[order], program[order] = torch.tensor(turns), torch.tensor(owners)
    return turn, program
