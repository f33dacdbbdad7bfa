"""The demo's feature network on every engine, and refusals of what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import parser  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from qncd_deploy.errors import BundleError  # noqa: E402
from qncd_deploy.evaluate.features import FeatureNetwork, load_reference  # noqa: E402
from qncd_deploy.files import save_npz  # noqa: E402

DEMO = Path(__file__).parents[1] / "calib_data/fashion-ldm"


@pytest.fixture(params=["openvino", "onnxruntime", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


def test_features_are_those_of_the_graph_whatever_the_group_size(backend: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (67, 32, 32, 1)).astype(np.uint8)  # a full group and a rest
    with FeatureNetwork.open(DEMO / "features.onnx", backend, threads=1) as network:
        features, logits, _ = network(images)
    scaled = (images.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    expected = ReferenceEvaluator(str(DEMO / "features.onnx")).run(None, {"images": scaled[[0, 64, 66]]})
    assert features.shape == (67, 128)
    # Sums of up to 1,000 float32 products in another order, in three layers.
    np.testing.assert_allclose(features[[0, 64, 66]], expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())
    assert logits is not None
    np.testing.assert_allclose(logits[[0, 64, 66]], expected[1], rtol=0, atol=1e-4 * np.abs(expected[1]).max())


def test_pictures_of_another_size_are_refused_in_one_line() -> None:
    pytest.importorskip("onnxruntime")
    words = r"features\.onnx: takes pictures of 1x32x32, these are 3x64x48 \(channels x height x width\)"
    with FeatureNetwork.open(DEMO / "features.onnx", "onnxruntime") as network, pytest.raises(BundleError, match=words):
        network(np.zeros((2, 64, 48, 3), np.uint8))


@pytest.mark.parametrize(
    "text",
    [
        "net (float[n,4] images) => (float[n,4] features) { features = Relu(images) }",
        "net (float[n,1,4,4] images) => (float[n,1,4,4] out) { out = Relu(images) }",
    ],
)
def test_other_graphs_are_refused_and_closed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from qncd_deploy.engines.ort import OrtEngine

    closed: list[str] = []
    monkeypatch.setattr(OrtEngine, "_close", lambda self: closed.append(self.path.name))
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}'), tmp_path / "other.onnx")
    words = r"other\.onnx: not a feature network: its inputs are images and its outputs (features|out); one picture"
    with pytest.raises(BundleError, match=words):
        FeatureNetwork.open(tmp_path / "other.onnx", "onnxruntime")
    assert closed == ["other.onnx"]


def test_logits_are_optional_and_features_may_be_maps(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    text = "net (float[n,2,1,2] images) => (float[n,2,1,2] features) { features = Identity(images) }"
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}'), tmp_path / "net.onnx")
    images = np.array([[[[0, 255], [51, 102]]]], np.uint8)  # (1, 1, 2, 2): channels last
    with FeatureNetwork.open(tmp_path / "net.onnx", "onnxruntime") as network:
        features, logits, _ = network(images)
    assert logits is None
    np.testing.assert_allclose(features, [[-1, -0.6, 1, -0.2]], rtol=0, atol=2e-7)  # channels first, [-1, 1]


def test_the_reference_is_mean_and_covariance(tmp_path: Path) -> None:
    moments = load_reference(DEMO / "features-reference.npz").moments
    assert moments.mean.shape == (128,)
    assert moments.cov.shape == (128, 128)
    for name, arrays in {
        "short": {"mean": np.zeros(3)},
        "misfit": {"mean": np.zeros(3), "cov": np.zeros((2, 2))},
        "nan": {"mean": np.zeros(2), "cov": np.full((2, 2), np.nan)},
    }.items():
        save_npz(tmp_path / f"{name}.npz", arrays)
        with pytest.raises(BundleError, match=rf"{name}\.npz: not a feature reference: expected `mean`"):
            load_reference(tmp_path / f"{name}.npz")
