"""Measures (specification 4; rows 22, 23 of section 8)."""

import math

import numpy as np
import pytest
import torch

from diffctrl.refam import metrics as m

PAIRS = [(50, 100), (1, 2), (0, 10)]


def test_overall_is_no_mean_over_samples():
    assert m.overall_iou(PAIRS) == pytest.approx(0.455357, abs=1e-6)
    assert m.mean_iou(PAIRS) == pytest.approx(0.333333, abs=1e-6)
    assert m.iou(0, 0) == 1.0
    assert m.iou(0, 5) == 0.0
    assert m.precision_at([(6, 10), (5, 10)], 0.5) == 0.5  # above, not at


def test_pointing():
    heat, truth = torch.zeros(6, 6), torch.zeros(6, 6, dtype=torch.bool)
    heat[2, 2] = heat[4, 4] = 1
    truth[4, 4] = True
    assert not m.points_at(heat, truth)  # the first of equal values
    assert m.points_at(heat, truth, radius=3)
    heat[4, 4] = 2
    assert m.points_at(heat, truth)
    assert not m.points_at(heat, torch.zeros_like(truth), radius=99)


def test_average_precision():
    truth = torch.tensor([[True, False, True, False]])
    assert m.average_precision(torch.tensor([[0.9, 0.1, 0.8, 0.2]]), truth) == 1.0
    assert m.average_precision(torch.tensor([[0.9, 0.8, 0.7, 0.1]]), truth) == pytest.approx((1 + 2 / 3) / 2)
    # Equal values enter together, whatever their order.
    assert m.average_precision(torch.ones(1, 4), truth) == 0.5
    assert math.isnan(m.average_precision(torch.ones(1, 4), ~torch.ones(1, 4, dtype=torch.bool)))


def test_answers_where_nothing_is_meant():
    some, none = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    found = m.generalised([none, some, some], [none, none, some])
    assert found.giou == pytest.approx((1 + 0 + 1) / 3)
    assert found.none_accuracy == 0.5
    assert math.isnan(m.generalised([some], [some]).none_accuracy)


def _square(top, left, side=40, size=(480, 854)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_contours_within_the_tolerance():
    assert m.tolerance((480, 854)) == 8
    assert m.contour_accuracy(_square(100, 100), _square(102, 102)) == 1.0
    assert m.contour_accuracy(_square(100, 100), _square(108, 100)) == 1.0
    assert m.contour_accuracy(_square(100, 100), _square(140, 300)) == 0.0
    assert m.contour_accuracy(_square(100, 100), _square(110, 100)) < 1.0
    empty = torch.zeros(480, 854, dtype=torch.bool)
    assert m.contour_accuracy(empty, empty) == 1.0
    assert m.contour_accuracy(empty, _square(100, 100)) == 0.0


def test_the_boundary_is_one_pixel_wide():
    # Of a square: the row above, the column to the left and the last ones inside, as DAVIS' measure has it.
    line = m.boundary(_square(100, 100, side=10))
    assert line.sum() == 40
    assert not m.boundary(torch.ones(5, 5, dtype=torch.bool)).any()


def test_dilation_is_a_disk():
    mask = torch.zeros(21, 21, dtype=torch.bool)
    mask[10, 10] = mask[0, 3] = True
    found = m._dilated(mask, 4)
    rows, columns = torch.meshgrid(torch.arange(21), torch.arange(21), indexing="ij")
    wanted = ((rows - 10) ** 2 + (columns - 10) ** 2 <= 16) | (rows**2 + (columns - 3) ** 2 <= 16)
    assert torch.equal(found, wanted)


def test_tracks():
    truth = torch.stack([_square(10, 10, 20, (64, 64)) for _ in range(4)])
    predicted = truth.clone()
    predicted[0] = False
    found = m.track_score(predicted, truth)
    assert (found.j, found.f) == (0.75, 0.75)
    assert found.mean == 0.75
    assert m.track_score(predicted, truth, skip_ends=True).mean == 1.0
    with pytest.raises(ValueError, match="both ends"):
        m.track_score(predicted[:2], truth[:2], skip_ends=True)
    with pytest.raises(ValueError, match="do not compare"):
        m.track_score(predicted[:2], truth)


def test_bootstrap_draws_scenes_with_all_of_their_expressions():
    values = np.array([1.0] * 30 + [0.0] * 30)
    scenes = np.repeat(np.arange(20), 3)
    found = m.bootstrap(scenes, lambda i: float(values[i].mean()))
    assert found.value == 0.5
    assert found.low < 0.5 < found.high
    single = m.bootstrap(np.arange(60), lambda i: float(values[i].mean()))
    # Twenty independent scenes know less than sixty.
    assert found.high - found.low > 1.4 * (single.high - single.low)
    assert found == m.bootstrap(scenes, lambda i: float(values[i].mean()))
    assert m.Interval(0.5, 0.4, 0.6).apart(m.Interval(0.8, 0.7, 0.9))
    assert not m.Interval(0.5, 0.4, 0.6).apart(m.Interval(0.6, 0.55, 0.9))
