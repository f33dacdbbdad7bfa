"""Parts of a calibration set share no picture where there are enough of them, and leave no part empty."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.calib.parts import Parts, spread
from qncd_deploy.calib.trajectories import CalibSet


def rows(pictures: int, calls: int, *, guided: bool = False) -> CalibSet:
    """As a recorded set has them."""
    picture = np.tile(np.arange(pictures), calls * (1 + guided))
    return CalibSet({"x": np.arange(len(picture))}, "k", picture)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("pictures", [4, 5, 7, 32])  # an odd number shifts rows against pictures from call to call
def test_no_two_parts_share_a_picture(pictures: int, guided: bool) -> None:
    calib = rows(pictures, 10, guided=guided)
    parts = Parts.of(calib)
    whole = sorted(np.concatenate([*parts]))
    assert whole == list(range(len(calib)))
    seen = [set(calib.pictures[part]) for part in parts]
    assert all(seen) and sum(map(len, seen)) == pictures
    np.testing.assert_array_equal(parts.unseen, sorted([*parts.tune, *parts.held_out]))
    few = [set(calib.pictures[part]) for part in parts.take(16)]
    assert all(some <= part for some, part in zip(few, seen, strict=True))


@pytest.mark.parametrize("pictures", [2, 3])
def test_with_few_pictures_what_is_fitted_is_judged_on_another(pictures: int) -> None:
    calib = rows(pictures, 4)
    fit, tune, held_out = Parts.of(calib)
    assert not set(calib.pictures[fit]) & set(calib.pictures[[*tune, *held_out]])
    assert len(tune) == len(held_out) == 2 and not set(tune) & set(held_out)


def test_rows_of_a_single_picture_are_told_apart_at_least() -> None:
    assert [list(part) for part in Parts.of(rows(1, 8))] == [[0, 2, 4, 6], [1, 5], [3, 7]]
    assert [list(part) for part in Parts.of(rows(1, 1))] == [[0], [0], [0]]


def test_rows_of_ones_own_data_are_pictures_each() -> None:
    calib = CalibSet({"x": np.arange(8)}, "k")
    assert [list(part) for part in Parts.of(calib)] == [[0, 2, 4, 6], [1, 5], [3, 7]]
    assert list(calib.take(np.array([5, 2])).pictures) == [5, 2]


def test_rows_are_taken_from_all_timesteps() -> None:
    calib = rows(8, 10)
    some = Parts.of(calib).take(40)
    assert [len(part) for part in some] == [20, 10, 10]
    for part in some:
        assert set(part // 8) == set(range(10))  # the call of every row
    assert list(spread(np.arange(5), 9)) == [0, 1, 2, 3, 4] and list(spread(np.arange(5), 0)) == [0]
