"""What needs an NVIDIA GPU, `python -m pytest -m gpu`: every library installed builds and runs the tiny network, or the
bundle that QNCD_TEST_BUNDLE names.

Speed is `qncd bench`'s business.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import qncd

from qncd_deploy.engines.base import BACKENDS, backend_status, computing_backend, open_engine, torch_backend
from qncd_deploy.engines.trt.cuda import open_arrays
from qncd_deploy.engines.trt.device import find_device
from qncd_deploy.engines.trt.library import open_library
from qncd_deploy.engines.trt.loaded import LoadedEngine
from qncd_deploy.errors import BackendMissing, EngineError
from qncd_deploy.runtime import Bundle

pytestmark = pytest.mark.gpu

NATIVE = ("tensorrt", "tensorrt-rtx")


@pytest.fixture(params=[name for name, backend in BACKENDS.items() if "f16" in backend.remainders])
def backend(request: pytest.FixtureRequest) -> str:
    status = backend_status(BACKENDS[request.param])
    if status.missing:
        pytest.skip(status.missing)
    return request.param


@pytest.fixture
def native(backend: str) -> str:
    if backend not in NATIVE:
        pytest.skip("not a TensorRT of its own")
    return backend


@pytest.fixture(autouse=True)
def gpu() -> None:
    try:
        find_device()
    except BackendMissing as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize("role", ["float", "master"])
def test_exporting_computes_on_the_gpu_what_it_does_on_the_cpu(bundle: Path, role: str) -> None:
    if missing := backend_status(BACKENDS["torch-cuda"]).missing:
        pytest.skip(missing)
    assert computing_backend() == torch_backend() == "torch-cuda"
    graph = Bundle.open(bundle).file(role)
    with open_engine("torch", graph) as cpu, open_engine("torch-cuda", graph) as gpu:
        rng = np.random.default_rng(0)
        feeds = {
            name: np.zeros((4, *spec.shape[1:]), spec.dtype)
            if spec.dtype.startswith("int")
            else rng.standard_normal((4, *spec.shape[1:])).astype(spec.dtype)
            for name, spec in cpu.inputs.items()
        }
        (expected,), (found,) = cpu(feeds).values(), gpu(feeds).values()
    # Float: sums in another order. Quantized: a value next to an edge may round the other way, one step in 255.
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if role == "float" else 1e-2)


def test_arrays_do_what_numpys_do() -> None:
    """CuPy through our own stream: operators, reductions, views, matrix products, graphs."""
    arrays, rng = open_arrays(), np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 4, 6, 5)).astype(np.float32) for _ in range(2))
    mix = rng.standard_normal((4, 4)).astype(np.float32)
    x, y = arrays.put(a), arrays.put(b)
    for ours, theirs in (
        (0.5 * x - abs(y), 0.5 * a - abs(b)),
        ((x > y) * x + ~(x > y) * y, np.maximum(a, b)),
        (x.clip(-0.5, 0.5), a.clip(-0.5, 0.5)),
        (x.mean(axis=(2, 3), keepdims=True), a.mean(axis=(2, 3), keepdims=True)),
        (arrays.put(mix) @ x.reshape(2, 4, 30), mix @ a.reshape(2, 4, 30)),
        (np.concatenate([x, y]), np.concatenate([a, b])),
        (np.split(x, 2)[1], np.split(a, 2)[1]),
        (np.repeat(x[-1:], 3, axis=0), np.repeat(a[-1:], 3, axis=0)),
    ):
        # sums of at most 30 terms below 8 in another order
        np.testing.assert_allclose(arrays.get(ours), theirs, atol=30 * 8 * 2.0**-24)
    total = arrays.put(np.zeros(3, np.float32))

    def work() -> None:
        total[...] = total + 1.0

    work()  # compiled before it is captured
    launch = arrays.capture(work)
    for _ in range(3):
        launch()
    np.testing.assert_array_equal(arrays.get(total), 4)


def test_built_checked_kept_and_sampled(native: str, bundle: Path, tmp_path: Path) -> None:
    shelf = ("--backend", native, "--engine-dir", tmp_path)
    done = qncd("build", bundle, *shelf, "--batch", 2, "--json")
    assert done.code == 0, done.err
    unet, *others = json.loads(done.out)["engines"]
    assert unet["parity"] and all(other["parity"] for other in others), "the gate ran"
    assert unet["missed"] == [], "planned layers run in INT8"
    again = qncd("build", bundle, *shelf, "--batch", 2, "--json")
    assert {engine["seconds"] for engine in json.loads(again.out)["engines"]} == {None}
    drawn = qncd("sample", bundle, *shelf, "-n", 3, "--batch-size", 2, "-o", tmp_path / "pictures.npz")
    assert drawn.code == 0, drawn.err
    with np.load(tmp_path / "pictures.npz") as found, Bundle.open(bundle).sampler(float_twin=True) as exact:
        truth = exact.sample(3).latents
        error = np.sqrt(np.square(found["latents"] - truth).sum() / np.square(truth).sum())
    assert error < 0.5, "a few steps of INT8, each off by far less"


def test_a_bench_times_what_was_built_and_tells_the_gpus_memory(native: str, bundle: Path, tmp_path: Path) -> None:
    shelf = ("--backend", native, "--remainder", "f16", "--engine-dir", tmp_path)
    built = json.loads(qncd("build", bundle, *shelf, "--batch", 1, "--no-fit", "--json").out)
    done = qncd("bench", bundle, *shelf, "--rounds", 3, "--eval-size", 2, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    twin, *_, quantized = found["rows"]
    assert quantized["engine_bytes"] == built["bytes"] and twin["engine_bytes"] > 0
    # single engines of this size may fit into pages that the GPU has handed out already
    assert twin["device_bytes"] + quantized["device_bytes"] > 0
    assert find_device().name in found["context"]["gpu"]


def test_the_device_loop_equals_the_hosts(native: str, bundle: Path) -> None:
    """The same engine, with the loop on the device and on the host: float32 arithmetic in another order."""
    with Bundle.open(bundle).sampler(native, float_twin=True, batch_size=2) as sampler:
        *_, there = sampler.trajectory([0, 1])
        model, x = sampler.model_for([0, 1]), None
        for state in sampler.trajectory([0, 1]):
            here = sampler.on_host(state)
            np.testing.assert_allclose(model(here.x_in, state.step.t), here.raw, rtol=0, atol=1e-4)
            x = here.x
        np.testing.assert_allclose(sampler.on_host(there).x, x, rtol=0, atol=1e-4)


def test_calls_are_captured_as_a_graph(native: str, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Bundle.open(bundle).sampler(native, batch_size=2) as sampler:
        sampler.sample(2)
    assert "runs without a CUDA graph" not in caplog.text


def test_float_twins_agree_with_the_cpus(backend: str, bundle: Path) -> None:
    cpu = next(
        (name for name, held in BACKENDS.items() if held.device == "cpu" and not backend_status(held).missing), None
    )
    if cpu is None:
        pytest.skip("no engine for the CPU")
    latents = []
    for name in (backend, cpu):
        with Bundle.open(bundle).sampler(name, float_twin=True, batch_size=2) as sampler:
            latents.append(sampler.sample(2).latents)
    # float32 with sums in another order, without TF32, over a few steps
    np.testing.assert_allclose(latents[0], latents[1], rtol=0, atol=1e-3 * np.abs(latents[1]).max())


def test_plans_of_others_are_refused(native: str, bundle: Path, tmp_path: Path) -> None:
    done = qncd("build", bundle, "--backend", native, "--engine-dir", tmp_path, "--batch", 1, "--json")
    whole = Path(json.loads(done.out)["path"]).read_bytes()
    for plan in (b"PK\x03\x04", whole[: len(whole) // 2]):
        with pytest.raises(
            EngineError, match=r"net\.engine: tensorrt.* cannot load it \(.*\)\. Run `qncd build` again"
        ):
            LoadedEngine(open_library(native), open_arrays(), plan, place=Path("net.engine"))
