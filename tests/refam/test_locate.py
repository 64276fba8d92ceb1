"""Bias, point, mask, box (specification 2.6; rows 16, 17, 24 of section 8)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.refam import directions, split_words
from diffctrl.refam.locate import (
    best_frame,
    box_of,
    centre,
    compactness,
    component,
    mask_of,
    otsu,
    peak,
    ranged,
    spatial_bias,
)


def test_ramps_end_at_the_floor_and_multiply():
    left = spatial_bias(["left"], 2, 5)
    assert left[0].tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0.1])
    assert torch.equal(left, spatial_bias(["right"], 2, 5).flip(1))
    assert torch.equal(spatial_bias(["top"], 5, 2), left.T)
    middle = spatial_bias(["middle"], 3, 3)
    assert middle[1, 1] == 1
    assert middle[0, 0] == pytest.approx(0.1)
    assert spatial_bias(["top", "right"], 3, 3)[0, 2] == 1
    assert spatial_bias(["top", "right"], 3, 3)[1, 1] == pytest.approx(0.25)
    assert torch.equal(spatial_bias([], 3, 4), torch.ones(3, 4))


@pytest.mark.parametrize("text", ["the circle above the green cross", "the cup left of the plate"])
def test_a_relation_gives_no_ramp(text):
    assert torch.equal(spatial_bias(directions(split_words(text)), 4, 4), torch.ones(4, 4))


def test_equal_values_point_at_the_first():
    heat = torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    assert peak(heat) == (0, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_the_point_is_the_middle_of_its_token(rows, columns, data):
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    heat = torch.zeros(rows, columns)
    heat[row, column] = 1
    size = (rows * 16, columns * 16)
    x, y = centre(*peak(heat), (rows, columns), size)
    assert (x, y) == (column * 16 + 8, row * 16 + 8)
    # The enlarged map's middle is the same place: no shift by half a token.
    mask = mask_of(heat, (x, y), size, "region")
    if rows > 1 and columns > 1:
        left, top, right, bottom = box_of(mask)
        inner = 0 < row < rows - 1 and 0 < column < columns - 1
        if inner:
            assert (left + right, top + bottom) == (2 * x, 2 * y)
        assert mask[int(y), int(x)]


def test_a_grid_that_is_not_square_keeps_its_axes():
    heat = torch.zeros(3, 5)
    heat[2, 1] = 1
    assert peak(heat) == (2, 1)
    assert centre(2, 1, (3, 5), (48, 80)) == (24.0, 40.0)
    rows, columns = mask_of(heat, (24.0, 40.0), (48, 80), "region").nonzero(as_tuple=True)
    assert rows.min() >= 32
    assert columns.max() < 32


def test_region_is_the_part_that_holds_the_point():
    heat = torch.zeros(8, 8)
    heat[1, 1], heat[6, 6] = 1.0, 0.9
    here = mask_of(heat, centre(1, 1, (8, 8), (64, 64)), (64, 64), "region")
    assert box_of(here) is not None
    assert not here[32:, 32:].any()
    assert mask_of(heat, centre(1, 1, (8, 8), (64, 64)), (64, 64), "mean")[32:, 32:].any()


def test_masks_of_a_flat_map_are_empty():
    flat = torch.full((4, 4), 0.3)
    for rule in ("region", "mean", "otsu"):
        mask = mask_of(flat, (2.0, 2.0), (16, 16), rule)
        assert not mask.any()
        assert box_of(mask) is None
    assert torch.equal(ranged(flat), torch.zeros(4, 4))


def test_otsu_splits_two_levels_between_them():
    values = torch.tensor([0.1] * 30 + [0.8] * 10)
    assert 0.1 < otsu(values) < 0.8


def test_a_component_is_connected_by_edges_alone():
    mask = torch.tensor(
        [
            [1, 1, 0, 0, 1],
            [0, 1, 0, 1, 1],
            [0, 1, 1, 0, 0],
            [0, 0, 1, 0, 1],
            [1, 1, 1, 0, 1],
        ],
        dtype=torch.bool,
    )
    part = component(mask, 0, 0)
    wanted = mask.clone()
    wanted[0, 4] = wanted[1, 3] = wanted[1, 4] = wanted[3, 4] = wanted[4, 4] = False
    assert torch.equal(part, wanted)
    assert not component(mask, 0, 2).any()
    assert component(mask, 3, 4).sum() == 2


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=30, max_size=30), st.integers(0, 29))
def test_components_equal_a_flood(cells, start):
    mask = torch.tensor(cells).view(5, 6)
    row, column = divmod(start, 6)
    reached = {(row, column)} if mask[row, column] else set()
    waiting = list(reached)
    while waiting:
        r, c = waiting.pop()
        for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if 0 <= near[0] < 5 and 0 <= near[1] < 6 and mask[near] and near not in reached:
                reached.add(near)
                waiting.append(near)
    found = {tuple(place) for place in component(mask, row, column).nonzero().tolist()}
    assert found == reached


def test_the_most_compact_frame():
    spread, compact = torch.ones(4, 4), torch.zeros(4, 4)
    compact[1, 2] = 1
    assert compactness(compact) < 1e-9
    assert compactness(spread) == pytest.approx(1)
    assert best_frame(torch.stack([spread, compact, compact])) == 1
