"""Precision and recall against the definition spelled out pair by pair, and against sets whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.evaluate import manifold
from qncd_deploy.evaluate.manifold import Manifold

distance = pytest.importorskip("scipy.spatial.distance")


def covered(reference: np.ndarray, points: np.ndarray, k: int) -> np.ndarray:
    """Equation 1 of the paper, by sorting all distances."""
    radii = np.sort(distance.cdist(reference, reference), axis=1)[:, k]  # the nearest is the point itself
    return (distance.cdist(points, reference) <= radii).any(axis=1)


@pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 60, 5, 3), (60, 40, 5, 3), (30, 30, 2, 1), (25, 90, 12, 7)])
def test_a_manifold_covers_what_the_definition_says(n: int, m: int, d: int, k: int) -> None:
    rng = np.random.default_rng(n + m)
    reference, points = rng.standard_normal((n, d)), 1.5 * rng.standard_normal((m, d))
    found = Manifold.of(reference, neighbours=k)
    assert found is not None
    expected = covered(reference, points, k)
    assert 0 < expected.mean() < 1  # else the test could not fail
    np.testing.assert_array_equal(found.covers(points), expected)


def test_points_on_a_line_by_hand() -> None:
    found = Manifold.of(np.array([[0.0], [1.0], [3.0], [7.0], [20.0]]), neighbours=2)
    assert found is not None
    np.testing.assert_array_equal(np.sqrt(found.radii), [3, 2, 3, 6, 17])
    points = np.array([[-3.0], [-3.5], [13.0], [37.0], [37.5], [2.9]])
    np.testing.assert_array_equal(found.covers(points), [True, False, True, True, False, True])


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    points = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    found = Manifold.of(points)
    assert found is not None
    assert found.covers(points).all()
    assert not found.covers(points + 100).any()


def test_a_collapsed_set_has_precision_without_recall() -> None:
    real = np.random.default_rng(1).standard_normal((400, 2))
    collapsed = real[:8].mean(axis=0) + 0.01 * np.random.default_rng(2).standard_normal((100, 2))
    data, own = Manifold.of(real), Manifold.of(collapsed)
    assert data is not None and own is not None
    assert data.covers(collapsed).mean() == 1
    assert own.covers(real).mean() < 0.05


def test_too_few_points_have_no_neighbours() -> None:
    assert Manifold.of(np.zeros((3, 2))) is None
    assert Manifold.of(np.zeros((4, 2))) is not None


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    reference, points = rng.standard_normal((37, 4)), 2 * rng.standard_normal((53, 4))
    whole = Manifold.of(reference)
    monkeypatch.setattr(manifold, "_BLOCK", 100)  # two rows at a time
    pieces = Manifold.of(reference)
    assert whole is not None and pieces is not None
    np.testing.assert_allclose(pieces.radii, whole.radii, rtol=1e-12)  # products of other block sizes: last bits
    np.testing.assert_array_equal(pieces.covers(points), covered(reference, points, 3))
