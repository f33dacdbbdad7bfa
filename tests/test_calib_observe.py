"""Observing in slices: every value once, within the budget."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import CalibrationError

SIZES = {f"t{i:02d}": 4 + 3 * (i % 5) for i in range(30)}


class Network:
    """Tensor k of a batch is k-dependent multiples of the input; remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, feeds, names):
        self.asked.append(list(names))
        return {name: np.outer(feeds["x"], np.arange(SIZES[name])).astype(np.float32) for name in names}


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(8)} for _ in range(count)]


@pytest.mark.parametrize("budget", [1, 2000, 1 << 30])
def test_slicing_changes_nothing(budget: int) -> None:
    data, network = batches(3), Network()
    found = observe(network, data, list(SIZES), budget_bytes=budget)
    assert list(found) == list(SIZES)
    everything = np.concatenate([batch["x"] for batch in data])
    for name, size in SIZES.items():
        expected = TensorStats.of(np.outer(everything, np.arange(size)), name)
        np.testing.assert_array_equal(found[name].counts, expected.counts)
        assert found[name].count == expected.count
    for part in network.asked[-len(network.asked) // 3 :]:  # sizes are known by the last batch
        assert len(part) == 1 or sum(8 * SIZES[name] * 4 for name in part) <= budget


def test_a_large_budget_needs_one_run_per_batch_once_sizes_are_known() -> None:
    network = Network()
    observe(network, batches(3), list(SIZES))
    assert [len(part) for part in network.asked[-2:]] == [30, 30]


def test_a_tensor_named_twice_is_counted_once() -> None:
    assert observe(Network(), batches(1), ["t01", "t01"])["t01"].count == 8 * SIZES["t01"]


def test_an_input_of_the_network_is_read_off_the_batch() -> None:
    data, network = batches(2), Network()
    found = observe(network, data, ["t01", "x"])
    assert list(found) == ["t01", "x"] and found["x"].count == 16
    assert all("x" not in part for part in network.asked)


def test_no_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no batches, expected at least one"):
        observe(Network(), [], ["t00"])


def test_a_tensor_with_nan_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"t03: .* values are not finite"):
        observe(Network(), [{"x": np.array([np.nan])}], ["t03"])
