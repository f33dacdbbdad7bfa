"""Every value is observed once, whatever order tensors come in."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.errors import CalibrationError

SIZES = {f"t{i:02d}": 4 + 3 * (i % 5) for i in range(30)}


class Network:
    """Tensor k of a batch is k-dependent multiples of the input, the last one first; counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, feeds, names):
        self.runs += 1
        for name in reversed(names):
            x = feeds["x"]
            yield name, x if name == "x" else np.outer(x, np.arange(SIZES[name])).astype(np.float32)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(8)} for _ in range(count)]


def test_batches_add_up_in_one_run_each() -> None:
    data, network = batches(3), Network()
    found = observe(network, data, list(SIZES))
    assert list(found) == list(SIZES) and network.runs == 3
    everything = np.concatenate([batch["x"] for batch in data])
    for name, size in SIZES.items():
        expected = TensorStats.of(np.outer(everything, np.arange(size)), name)
        np.testing.assert_array_equal(found[name].counts, expected.counts)
        assert found[name].count == expected.count


def test_a_tensor_named_twice_is_counted_once() -> None:
    assert observe(Network(), batches(1), ["t01", "t01"])["t01"].count == 8 * SIZES["t01"]


def test_no_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no batches, expected at least one"):
        observe(Network(), [], ["t00"])


def test_a_tensor_with_nan_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"t03: .* values are not finite"):
        observe(Network(), [{"x": np.array([np.nan])}], ["t03"])
