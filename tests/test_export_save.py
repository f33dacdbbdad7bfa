"""Siblings on disk: equal weights once, relative places, the same bytes twice, readable by every runtime."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from export_helpers import feeds_for, minmax_plan, parsed, run, traced

from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.save import on_disk, save_siblings, spill


def siblings() -> tuple[dict[str, ir.Model], dict[str, np.ndarray]]:
    _, specs, model = traced("additive")
    feeds = feeds_for(specs, 2)
    plan = minmax_plan(model, feeds)
    master = model.clone()
    InsertQDQ(plan)(master)
    half, other = master.clone(), master.clone()
    HalfRemainder()(half)
    OrtSibling(plan)(other)
    return {"unet.onnx": master, "unet-trt.onnx": half, "unet-ort.onnx": other, "unet-float.onnx": model}, feeds


def references(path) -> dict[str, tuple[str, int, int]]:
    """Initializer name -> (file, offset, length) of what lies outside."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries.keys() <= {"location", "offset", "length"}
            found[tensor.name] = (entries["location"], int(entries["offset"]), int(entries["length"]))
        else:
            assert len(tensor.raw_data) < 1024
    return found


def test_equal_weights_lie_once_and_where_they_belong(tmp_path):
    models, _ = siblings()
    files = {path.name for path in save_siblings(models, tmp_path)}
    assert files == {path.name for path in tmp_path.iterdir()}
    assert files == {*models, "unet.data", "unet-trt.data", "unet-float.data"}
    places = {name: references(tmp_path / name) for name in models}
    assert {file for file, *_ in places["unet.onnx"].values()} == {"unet.data"}
    assert {file for file, *_ in places["unet-ort.onnx"].values()} == {"unet.data"}
    assert {file for file, *_ in places["unet-trt.onnx"].values()} == {"unet.data", "unet-trt.data"}
    assert {file for file, *_ in places["unet-float.onnx"].values()} == {"unet.data", "unet-float.data"}
    integers = "mid_block.resnets.0.conv2.weight_q"
    assert places["unet.onnx"][integers] == places["unet-trt.onnx"][integers] == places["unet-ort.onnx"][integers]
    assert places["unet.onnx"]["conv_in.weight"] == places["unet-float.onnx"]["conv_in.weight"]
    for data in ("unet.data", "unet-trt.data", "unet-float.data"):
        spans = sorted({place[1:] for found in places.values() for place in found.values() if place[0] == data})
        assert all(offset % (4096 if length >= 1 << 16 else 64) == 0 for offset, length in spans)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans)), "tensors overlap"
        assert sum(spans[-1]) == (tmp_path / data).stat().st_size
        contents = [(tmp_path / data).read_bytes()[offset : offset + length] for offset, length in spans]
        assert len(set(contents)) == len(contents), "a tensor is stored twice"


def test_bytes_are_the_same_twice(tmp_path):
    digests = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        written = save_siblings(siblings()[0], folder)
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written})
    assert digests[0] == digests[1]


def test_every_reader_finds_the_weights(tmp_path):
    models, feeds = siblings()
    save_siblings(models, tmp_path)
    for name, model in models.items():
        onnx.checker.check_model(str(tmp_path / name))
        loaded = onnx.load(tmp_path / name)
        for tensor in loaded.graph.initializer:
            stored = model.graph.initializers[tensor.name].const_value.numpy()
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), stored)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(str(tmp_path / name), options, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(["out"], feeds)[0], run(model, feeds)["out"], rtol=0, atol=1e-6)


def test_openvino_reads_the_master(tmp_path):
    openvino = pytest.importorskip("openvino", reason="the cpu extra is not installed")
    models, feeds = siblings()
    save_siblings(models, tmp_path)
    compiled = openvino.compile_model(str(tmp_path / "unet-float.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = run(models["unet-float.onnx"], feeds)["out"]
    np.testing.assert_allclose(compiled(feeds)["out"], expected, rtol=0, atol=2.0**-14 * np.abs(expected).max())
    assert openvino.Core().read_model(str(tmp_path / "unet.onnx")).get_ops()


def test_models_in_memory_stay_as_they_are(tmp_path):
    models, _ = siblings()
    before = {name: ir.to_proto(model).SerializeToString(deterministic=True) for name, model in models.items()}
    save_siblings(models, tmp_path)
    for name, model in models.items():
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before[name]


def test_spilled_tensors_are_mapped_from_their_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal((64, 64), np.float32), "small": np.ones(64, np.float32)}
    text = """<ir_version: 8, opset_import: ["": 18]>
        g (float[N,64] x) => (float[N,64] y) { s = MatMul (x, w) y = Add (s, small) }"""
    model = parsed(text, held)
    spill(model, tmp_path / "first.data")
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), held["w"])
    assert (tmp_path / "first.data").stat().st_size == held["w"].nbytes  # what is small stays
    copy = model.clone()
    copy.graph.initializers["w"].const_value = ir.tensor(2 * held["w"], name="w")
    spill(copy, tmp_path / "second.data")
    spill(model, tmp_path / "third.data")
    assert (tmp_path / "third.data").stat().st_size == 0  # what lies in a file already stays there
    for each, factor in ((model, 1), (copy, 2)):
        save_siblings({"net.onnx": each}, tmp_path)
        found = ir.load(tmp_path / "net.onnx").graph.initializers["w"].const_value.numpy()
        np.testing.assert_array_equal(found, factor * held["w"])


def test_a_graph_on_disk_shares_the_files_that_it_was_spilled_to(tmp_path: Path) -> None:
    models, feeds = siblings()
    model = models["unet.onnx"]
    expected = run(model, feeds)
    spill(model, tmp_path / "weights.data")
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    with on_disk(model, tmp_path) as path, on_disk(model, tmp_path) as other:
        assert path != other and path.with_suffix(".data").stat().st_size == 0
        assert {file for file, _, _ in references(path).values()} == {"weights.data"}
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        (out,) = ort.InferenceSession(path, options).run(None, feeds)
        # the same ops on the same weights; threads may add in another order
        np.testing.assert_allclose(out, expected["out"], rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.data"]
    for name, value in model.graph.initializers.items():  # mapped anew
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with on_disk(model, elsewhere) as path:  # a graph's files lie beside it
        assert {file for file, _, _ in references(path).values()} == {path.with_suffix(".data").name}
