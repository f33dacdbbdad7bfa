"""TensorRT engines through the package's own protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from engine_graphs import network_feeds, reference, save_network
from fake_tensorrt import Machine, install

from qncd_deploy.engines.base import BaseEngine, Effort, open_engine
from qncd_deploy.errors import BundleError, EngineError
from qncd_deploy.evaluate.features import FeatureNetwork
from qncd_deploy.evaluate.measure import Stopwatch

LAST_BIT = 1e-5
"""Sums of at most 72 products, |terms| <= 1, in another order."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(monkeypatch)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    save_network(tmp_path / "net.onnx", quantized=False)
    return tmp_path / "net.onnx"


def tensorrt(path: Path) -> BaseEngine:
    return open_engine("tensorrt", path)


def test_numpy_in_numpy_out_and_device_in_device_out(network: Path, machine: Machine) -> None:
    feeds = network_feeds()
    expected = reference(network, feeds)
    with tensorrt(network) as engine:
        assert engine.engine_id == "tensorrt-f16"
        found = engine(feeds)["out"]
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=0, atol=LAST_BIT)
        for there in (("x",), ("x", "t", "c")):
            mixed = {name: machine.arrays.put(array) if name in there else array for name, array in feeds.items()}
            waits = machine.waits
            found = engine(mixed)["out"]
            assert machine.arrays.holds(found) and machine.waits == waits
            np.testing.assert_allclose(engine.arrays.get(found), expected, rtol=0, atol=LAST_BIT)


def test_without_a_stored_engine_one_is_built_for_every_set_of_shapes(network: Path, machine: Machine) -> None:
    with tensorrt(network) as engine:
        for rows in (2, 3, 2):
            feeds = network_feeds(rows)
            np.testing.assert_allclose(engine(feeds)["out"], reference(network, feeds), rtol=0, atol=LAST_BIT)
    assert [shapes["x"][0] for shapes in machine.builds] == [2, 3]


def test_what_is_built_for_a_run_takes_no_more_than_it_may(network: Path, machine: Machine, tmp_path: Path) -> None:
    with open_engine("tensorrt", network, effort=Effort(2, 1 << 30, tmp_path)) as engine:
        engine(network_feeds())
    ((_, asked, _),) = machine.asked
    assert (asked.level, asked.workspace) == (2, 1 << 30)
    assert asked.timing_cache == tmp_path / "timing-tensorrt-10.13.2-sm86.cache"


def test_a_feature_network_is_built_for_one_number_of_pictures(machine: Machine, tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
        net (float[n, 1, 2, 2] images) => (float[n, 4] features) { features = Flatten(images) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "features.onnx")
    pictures = np.random.default_rng(0).integers(0, 256, (70, 2, 2, 1), dtype=np.uint8)
    with FeatureNetwork.open(tmp_path / "features.onnx", "tensorrt", effort=Effort(level=1)) as features:
        for count in (1, 3, 70):
            found = features(pictures[:count]).features
            np.testing.assert_allclose(found, pictures[:count].reshape(count, 4) / 127.5 - 1, rtol=0, atol=1e-6)
    assert [(shapes["images"][0], options.level) for _, options, _ in machine.asked for shapes in options.profiles] == [
        (64, 1)
    ]


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in network_feeds(rows).items()}


def test_stored_engines_are_used_and_nothing_is_built(network: Path, machine: Machine, tmp_path: Path) -> None:
    paths = [
        machine.store(tmp_path / "small.engine", network, shapes(2)),
        machine.store(tmp_path / "large.engine", network, shapes(4), shapes(6)),
    ]
    with tensorrt(network) as engine:
        for path in paths:
            engine.load_blob(path, source="graph")
        for rows in (2, 6, 4):
            feeds = network_feeds(rows)
            np.testing.assert_allclose(engine(feeds)["out"], reference(network, feeds), rtol=0, atol=LAST_BIT)
        assert [kernel.count for kernel in engine.kernels(shapes(6))] == [2]
        assert [engine.compiled_bytes(shapes(rows)) for rows in (2, 6)] == [path.stat().st_size for path in paths]
        with pytest.raises(EngineError) as refused:
            engine(network_feeds(3))
    assert machine.builds == [] and machine.read == []  # neither takes a builder
    assert str(refused.value) == (
        f"{network}: the engines built for it take x 2x8x16x16, t 2, c 2x1x12; or x 4x8x16x16, t 4, c 4x1x12; or "
        "x 6x8x16x16, t 6, c 6x1x12; x 3x8x16x16, t 3, c 3x1x12 was asked for. Build one for that, too, with "
        "`qncd build --batch` and --sizes, or choose a --batch-size and a size that there are."
    )


def test_a_stored_engine_for_something_else_is_refused(network: Path, machine: Machine, tmp_path: Path) -> None:
    path = machine.store(tmp_path / "net.engine", network, shapes(2))
    with tensorrt(network) as engine:
        with pytest.raises(EngineError, match="made from another graph"):
            engine.load_blob(path, source="another")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(EngineError, match="changed on disk"):
            engine.load_blob(path, source="graph")


def test_what_tensorrt_for_rtx_compiled_is_kept_beside_the_engine(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(monkeypatch, "tensorrt-rtx")
    path = machine.store(tmp_path / "net.engine", network, shapes(2))
    for _ in range(2):
        with open_engine("tensorrt-rtx", network) as engine:
            engine.load_blob(path, source="graph")
            engine(network_feeds())
        cache = tmp_path / "net.cache"
        assert cache.read_bytes() == b"cache of 1.7.1"
    assert machine.module.engines[1].contexts[0].config.cache.filled
    cache.unlink()
    with open_engine("tensorrt-rtx", network) as engine:
        engine.load_blob(path, source="graph")
        engine(network_feeds())
        monkeypatch.setattr("qncd_deploy.engines.trt.run.atomic_file", _read_only)
    assert not cache.exists()


def test_a_stored_engine_for_later_versions_is_loaded_as_one(network: Path, machine: Machine, tmp_path: Path) -> None:
    path = machine.store(tmp_path / "net.engine", network, shapes(2), version_compatible=True)
    with tensorrt(network) as engine:
        engine.load_blob(path, source="graph")
        assert engine(network_feeds())["out"].shape == (2, 8, 16, 16)


def test_memory_is_given_back_even_if_the_device_failed(
    network: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tensorrt(network)
    engine.load_blob(machine.store(tmp_path / "net.engine", network, shapes(2)), source="graph")
    held = engine._held[0].engine

    def fail() -> None:
        raise EngineError("GPU: failed.")

    monkeypatch.setattr(machine.arrays, "wait", fail)
    with pytest.raises(EngineError, match="GPU: failed"):
        engine.close()
    assert held._engine is None and engine._held == []


def _read_only(path: Path) -> None:
    raise BundleError(f"{path}: cannot be written.")


def test_a_timed_engine_takes_the_sizes_that_it_took(network: Path, machine: Machine, tmp_path: Path) -> None:
    path = machine.store(tmp_path / "net.engine", network, shapes(2), shapes(4))
    with tensorrt(network) as engine:
        engine.load_blob(path, source="graph")
        assert Stopwatch(engine).row_sizes == engine.row_sizes == (2, 4)


def test_a_stopwatch_waits_until_the_results_are_there(network: Path, machine: Machine) -> None:
    with tensorrt(network) as engine:
        watch = Stopwatch(engine)
        out = watch({name: machine.arrays.put(array) for name, array in network_feeds().items()})["out"]
        assert watch.arrays is engine.arrays and len(watch.seconds) == 1
        np.testing.assert_allclose(out.memory, reference(network, network_feeds()), rtol=0, atol=LAST_BIT)


def test_wrong_feeds_are_refused_on_the_device_too(network: Path, machine: Machine) -> None:
    feeds = {name: machine.arrays.put(array) for name, array in network_feeds().items()}
    with tensorrt(network) as engine:
        with pytest.raises(EngineError, match=r"input 't' is float32 3, expected float32 batch with batch = 2"):
            engine({**feeds, "t": machine.arrays.put(np.zeros(3, np.float32))})
        with pytest.raises(EngineError, match="input 'x' is float64"):
            engine({**feeds, "x": feeds["x"].astype("float64")})


def test_threads_are_refused(network: Path, machine: Machine) -> None:
    with pytest.raises(EngineError, match=r"tensorrt-f16: runs on the GPU, where --threads 2 means nothing"):
        open_engine("tensorrt", network, threads=2)
