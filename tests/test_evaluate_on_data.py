"""SQNR of outputs on given inputs, against ONNX Runtime run by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from test_runtime import FACTS, write_bundle  # noqa: E402

from qncd_deploy.errors import CalibrationError  # noqa: E402
from qncd_deploy.evaluate.on_data import compare_on_data  # noqa: E402
from qncd_deploy.files import canonical_json  # noqa: E402
from qncd_deploy.runtime import Bundle  # noqa: E402

ROWS = 21  # a full group and a rest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    facts = replace(FACTS, schedule=None, sampler=None, guidance_scale=1.0, condition=None)
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("export") / "own-w8a8", facts))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "inputs.npz"
    arrays = {"x": rng.standard_normal((ROWS, 8, 16, 16)), "c": rng.standard_normal((ROWS, 1, 12))}
    np.savez(path, t=np.linspace(1, 900, ROWS), **arrays)
    return path


def by_hand(bundle: Bundle, role: str, data: Path) -> np.ndarray:
    session = ort.InferenceSession(bundle.file(role))
    with np.load(data) as arrays:
        return session.run(None, {name: arrays[name].astype(np.float32) for name in arrays.files})[0].astype(np.float64)


def test_rows_and_their_sum_are_those_of_the_graphs(bundle: Bundle, data: Path) -> None:
    found = compare_on_data(bundle, data, backend="onnxruntime", threads=1)
    exact, quantized = by_hand(bundle, "float", data), by_hand(bundle, "ort", data)
    signal, noise = (np.square(part).sum(axis=(1, 2, 3)) for part in (exact, quantized - exact))
    # Groups of another size sum float32 products in another order, which tips a rounding here and there.
    np.testing.assert_allclose(found.row_sqnr_db, 10 * np.log10(signal / noise), rtol=0, atol=0.05)
    assert found.sqnr_db.value == pytest.approx(10 * math.log10(signal.sum() / noise.sum()), abs=0.05)
    assert found.sqnr_db.low < found.sqnr_db.value < found.sqnr_db.high
    assert found.sqnr_db.n == ROWS
    assert found.worst == np.argmin(signal / noise)
    assert found.engine == "onnxruntime-f32"
    facts = json.loads(canonical_json(found.to_json()))
    assert facts["sqnr_db"]["value"] == found.sqnr_db.value and len(facts["row_sqnr_db"]) == ROWS


def test_equal_networks_differ_by_nothing(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "twice", roles={**bundle.manifest.roles, "ort": "unet-float.onnx"})
    found = compare_on_data(Bundle.open(folder), data, backend="onnxruntime")
    assert found.sqnr_db.value == found.sqnr_db.low == math.inf
    assert found.to_json()["sqnr_db"]["value"] is None and set(found.to_json()["row_sqnr_db"]) == {None}


def test_progress_is_told_by_rows(bundle: Bundle, data: Path) -> None:
    done: list[tuple[int, int]] = []
    found = compare_on_data(bundle, data, backend="onnxruntime", on_progress=lambda n, of: done.append((n, of)))
    total = 2 * found.sqnr_db.n
    assert {of for _, of in done} == {total} and done[-1][0] == total
    assert len(done) > 2 and [n for n, _ in done] == sorted({n for n, _ in done})


def test_data_of_another_network_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", sample=np.zeros((2, 3, 8, 8)))
    with pytest.raises(CalibrationError, match=r"other\.npz: arrays \['sample'\], the network's inputs are"):
        compare_on_data(bundle, tmp_path / "other.npz")
