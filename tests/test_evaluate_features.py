"""The demo's feature network on every engine, and refusals of what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import parser  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from qncd_deploy.errors import BundleError  # noqa: E402
from qncd_deploy.evaluate.features import Description, FeatureNetwork, Lens, Reference, load_reference  # noqa: E402
from qncd_deploy.evaluate.metrics import Moments  # noqa: E402
from qncd_deploy.files import save_npz  # noqa: E402
from qncd_deploy.runtime import Bundle  # noqa: E402

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


def network(folder: Path, outputs: str, body: str, name: str = "net") -> Path:
    text = f'<ir_version: 9, opset_import: ["" : 18]> net (float[n,1,32,32] images) => ({outputs}) {{ {body} }}'
    onnx.save(parser.parse_model(text), folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def test_spatial_features_are_flattened_and_told_apart_from_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = network(
        tmp_path,
        "float[n,1,16,16] spatial, float[n,1,1,1] features, float[n,1,32,32] logits",
        "spatial = MaxPool<kernel_shape=[2,2], strides=[2,2]>(images)\n"
        "features = GlobalAveragePool(images)\nlogits = Neg(images)",
    )
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 1)).astype(np.uint8)
    with FeatureNetwork.open(path, "onnxruntime") as opened:
        found = opened(images)
    scaled = (images[..., 0] / 127.5 - 1).astype(np.float32)
    assert found.spatial is not None and found.logits is not None
    pooled = scaled.reshape(70, 16, 2, 16, 2).max(axis=(2, 4)).reshape(70, 256)
    np.testing.assert_allclose(found.spatial, pooled, rtol=0, atol=1e-6)  # one float32 rounding of order 1
    np.testing.assert_allclose(found.logits, -scaled.reshape(70, -1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.features[:, 0], scaled.mean(axis=(1, 2)), rtol=0, atol=1e-6)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = network(tmp_path, "float[n,1,32,32] features", "features = Log(images)")
    words = r"net\.onnx: returns features that are not finite"
    with FeatureNetwork.open(path, "onnxruntime") as opened, pytest.raises(BundleError, match=words):
        opened(np.zeros((2, 32, 32, 1), np.uint8))


def test_features_alone_are_a_reference_too(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((30, 4))
    spatial = {"spatial_mean": np.zeros(6), "spatial_cov": np.eye(6)}
    save_npz(tmp_path / "real.npz", {"features": features, **spatial})
    found = load_reference(tmp_path / "real.npz")
    np.testing.assert_allclose(found.moments.cov, np.cov(features.T), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.features, features)
    assert found.spatial is not None
    np.testing.assert_allclose(found.spatial.cov, np.eye(6), atol=1e-15)
    assert load_reference(DEMO / "features-reference.npz").features is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "`mean`"),
        ({"features": np.zeros((1, 4))}, "`features`"),
        ({"features": np.zeros(4)}, "`features`"),
        ({"features": np.full((5, 4), np.nan)}, "`features`"),
        ({"features": np.zeros((5, 4)), "mean": np.zeros(3), "cov": np.eye(3)}, "`mean`"),
        ({"mean": np.zeros(3), "cov": np.eye(3), "spatial_mean": np.zeros(3)}, "`spatial_mean`"),
    ],
)
def test_other_references_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    save_npz(tmp_path / "real.npz", arrays)
    with pytest.raises(BundleError, match=rf"real\.npz: not a feature reference: expected {words}"):
        load_reference(tmp_path / "real.npz")


def test_a_reference_of_another_network_is_refused() -> None:
    reference = Reference(Path("real.npz"), Moments.of(np.eye(4)), Moments.of(np.eye(6)))
    reference.check(Description(np.zeros((1, 4)), None, np.zeros((1, 6))))
    reference.check(Description(np.zeros((1, 4))))
    with pytest.raises(BundleError, match=r"real\.npz: made with a network of 4 features, this one has 5\."):
        reference.check(Description(np.zeros((1, 5))))
    with pytest.raises(BundleError, match=r"real\.npz: made with a network of 6 spatial, this one has 7\."):
        reference.check(Description(np.zeros((1, 4)), None, np.zeros((1, 7))))


def test_the_bundles_reference_goes_with_its_own_network_alone(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from test_evaluate_compare import with_features
    from test_runtime import write_bundle

    bundle = Bundle.open(with_features(write_bundle(tmp_path / "net-w8a8")))
    other = network(tmp_path, "float[n,1,32,32] features", "features = Neg(images)")
    save_npz(tmp_path / "real.npz", {"features": np.random.default_rng(0).standard_normal((9, 128))})
    with Lens.open(bundle, "onnxruntime") as lens:
        assert lens.network is not None and lens.data is not None and len(lens.data.moments.mean) == 128
    with Lens.open(bundle, "onnxruntime", features=other) as lens:
        assert lens.network is not None and lens.data is None
    with Lens.open(bundle, "onnxruntime", reference=tmp_path / "real.npz") as lens:
        assert lens.data is not None and lens.data.features is not None
    with pytest.raises(BundleError, match=r"real\.npz: made with a network of 128 features, this one has 1024"):
        Lens.open(bundle, "onnxruntime", features=other, reference=tmp_path / "real.npz")


def test_the_demos_evaluation_network_is_its_feature_network_with_an_inner_layer() -> None:
    ort = pytest.importorskip("onnxruntime")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1)).astype(np.uint8)
    with FeatureNetwork.open(DEMO / "features-spatial.onnx", "onnxruntime", threads=1) as network:
        found = network(images)
    model = onnx.load(DEMO / "features.onnx")
    (inner,) = [node for node in model.graph.node if node.op_type == "Relu"][3].output
    model.graph.output.append(onnx.ValueInfoProto(name=inner))
    scaled = (images.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString())
    features, logits, layer = session.run(["features", "logits", inner], {"images": scaled})
    for ours, exact in ((found.features, features), (found.logits, logits), (found.spatial, layer[:, :7])):
        assert ours is not None
        exact = exact.reshape(len(exact), -1)
        np.testing.assert_allclose(
            ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max()
        )  # float32 products, fused or not
    reference = load_reference(DEMO / "features-spatial-reference.npz")
    reference.check(found)
    plain = load_reference(DEMO / "features-reference.npz")
    np.testing.assert_array_equal(reference.moments.cov, plain.moments.cov)
    assert reference.features is not None and reference.features.shape == (2000, 128)
