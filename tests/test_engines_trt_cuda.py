"""Device arrays: order on one stream, copies that do not wait, refusals; and that the fake device shows mistakes."""

from __future__ import annotations

import builtins
import threading
from types import SimpleNamespace
from typing import Any

import fake_cupy
import numpy as np
import pytest

from qncd_deploy.engines.trt import cuda
from qncd_deploy.engines.trt.cuda import DeviceArrays, open_arrays
from qncd_deploy.engines.trt.device import Device
from qncd_deploy.errors import BackendMissing, EngineError
from qncd_deploy.specs import HostArrays

GPU = Device(name="Fake GPU", sm="sm86", memory=1 << 34, cuda="12.6")


@pytest.fixture
def arrays() -> DeviceArrays:
    return DeviceArrays(fake_cupy, GPU)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_round_trip_through_the_device(arrays: DeviceArrays) -> None:
    for array in (numbers(2, 3), np.array(7), np.arange(3), numbers(4, 4)[:, 1:3]):
        there = arrays.put(array)
        assert arrays.holds(there) and not arrays.holds(array)
        assert arrays.put(there) is there
        back = arrays.get(there)
        assert back.dtype == array.dtype and back.shape == array.shape
        np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(arrays.get(array), array)


def test_scalars_stay_scalars(arrays: DeviceArrays) -> None:
    there = arrays.put(np.float32(3))
    assert there.shape == () and arrays.put(there) is there
    assert arrays.get(there) == 3


def test_the_host_may_change_what_it_put(arrays: DeviceArrays) -> None:
    host = numbers(3)
    there = arrays.put(host)
    wanted = host.copy()
    host[...] = -1
    np.testing.assert_array_equal(arrays.get(there), wanted)


def test_arithmetic_waits_for_nothing_but_get(arrays: DeviceArrays) -> None:
    x = arrays.put(numbers(2, 3))
    waits = arrays._stream.waits
    y = 0.5 * x - abs(x)
    y += x.clip(-1, 1)
    assert arrays._stream.waits == waits and np.isnan(y.memory).all()
    x0 = numbers(2, 3)
    # three float32 roundings of numbers below 4
    np.testing.assert_allclose(arrays.get(y), 0.5 * x0 - abs(x0) + x0.clip(-1, 1), atol=3 * 4 * 2.0**-24)


def test_memory_in_use_is_the_devices_without_what_the_pool_keeps(
    arrays: DeviceArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = arrays.used_bytes()
    held = arrays.put(numbers(64, 64))
    monkeypatch.setattr(fake_cupy.POOL, "kept", 1 << 20)
    assert arrays.used_bytes() - before == held.nbytes == 64 * 64 * 4
    del held
    assert arrays.used_bytes() == before
    assert HostArrays().used_bytes() is None


def test_every_thread_gets_the_stream(arrays: DeviceArrays) -> None:
    found: list[fake_cupy.Stream] = []

    def work() -> None:
        fake_cupy.Stream.null.use()  # as a thread starts
        arrays.put(numbers(1))
        found.append(fake_cupy.Stream.current)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [arrays._stream]


def test_a_captured_graph_is_the_same_work_every_time(arrays: DeviceArrays) -> None:
    x, total = arrays.put(np.ones(3, np.float32)), arrays.put(np.zeros(3, np.float32))

    def work() -> None:
        total[...] = total + x

    launch = arrays.capture(work)
    np.testing.assert_array_equal(arrays.get(total), 0)  # capturing runs nothing
    for _ in range(3):
        launch()
    np.testing.assert_array_equal(arrays.get(total), 3)


def test_what_cannot_be_captured_leaves_the_stream_usable(arrays: DeviceArrays) -> None:
    x = arrays.put(np.ones(3, np.float32))
    with pytest.raises(EngineError, match=r"GPU: Fake GPU failed .*not permitted when stream is capturing"):
        arrays.capture(lambda: arrays.wait())
    np.testing.assert_array_equal(arrays.get(x + x), 2)


# ---------------------------------------------------------------- the fake shows what a GPU may hide


def test_reading_early_shows(arrays: DeviceArrays) -> None:
    x = arrays.put(numbers(3))
    assert np.isnan((x + x).memory).all()


def test_work_on_another_stream_shows(arrays: DeviceArrays) -> None:
    x = arrays.put(numbers(3))
    fake_cupy.Stream.null.use()
    y = x + x
    assert np.isnan(arrays.get(y)).all()


def test_memory_that_is_overwritten_too_early_shows(arrays: DeviceArrays) -> None:
    buffer = arrays.empty((3,), "float32")
    remembered = []
    for value in (1.0, 2.0):
        buffer[...] = arrays.put(np.full(3, value, np.float32))
        remembered.append(buffer)  # not a copy
    np.testing.assert_array_equal([arrays.get(array) for array in remembered], [[2, 2, 2], [2, 2, 2]])


def test_host_and_device_do_not_mix(arrays: DeviceArrays) -> None:
    x = arrays.put(numbers(3))
    with pytest.raises(TypeError, match="Unsupported type"):
        x + numbers(3)
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(x)


def test_the_package_uses_nothing_that_cupy_has_not() -> None:
    """With CuPy installed, which needs no GPU to be asked for its names."""
    cupy = pytest.importorskip("cupy")
    for name in ("ndarray", "empty", "asarray", "ascontiguousarray", "asnumpy", "cuda"):
        assert hasattr(cupy, name) and hasattr(fake_cupy, name)
    for name in ("Stream", "runtime.CUDARuntimeError", "memory.OutOfMemoryError"):
        for library in (cupy, fake_cupy):
            found = library.cuda
            for part in name.split("."):
                found = getattr(found, part)
    for name in ("use", "synchronize", "begin_capture", "end_capture"):
        assert hasattr(cupy.cuda.Stream, name) and hasattr(fake_cupy.Stream, name)
    assert hasattr(cupy.cuda.Graph, "launch")
    own = {name for name in vars(fake_cupy.ndarray) if not name.startswith("_")} - {"memory"}
    assert own <= set(dir(cupy.ndarray))
    assert {"__array_ufunc__", "__array_function__", "__cuda_array_interface__"} <= set(dir(cupy.ndarray))


# ---------------------------------------------------------------- refusals


def test_what_is_missing_is_one_line_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    open_arrays.cache_clear()
    monkeypatch.setattr(cuda, "find_device", lambda: GPU)
    real = builtins.__import__

    def without(error: Exception) -> None:
        def load(name: str, *args: Any, **given: Any) -> Any:
            if name == "cupy":
                raise error
            return real(name, *args, **given)

        monkeypatch.setattr(builtins, "__import__", load)

    without(ModuleNotFoundError("No module named 'cupy'"))
    with pytest.raises(
        BackendMissing, match=r"^GPU: CuPy cannot be used here \(No module named 'cupy'\)\. Install it: pip"
    ):
        open_arrays()
    without(OSError("libcudart.so.12: cannot open shared object file"))
    with pytest.raises(BackendMissing, match=r"\(libcudart\.so\.12: cannot open shared object file\)"):
        open_arrays()


def test_a_driver_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(non_blocking: bool) -> None:
        raise fake_cupy.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    library = SimpleNamespace(
        cuda=SimpleNamespace(Stream=refuse, runtime=fake_cupy.cuda.runtime, memory=fake_cupy.cuda.memory)
    )
    with pytest.raises(
        BackendMissing, match=r"cannot use Fake GPU \(cudaErrorInsuff.*; the driver runs CUDA 12\.6\. Up"
    ):
        DeviceArrays(library, GPU)


def test_a_missing_compiler_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find any of the CUDA NVRTC libraries")

    monkeypatch.setattr(fake_cupy.ndarray, "__array_ufunc__", refuse)
    with pytest.raises(
        BackendMissing, match=r"CuPy cannot compile for it \(Failed to find .*\)\. Install the CUDA toolkit"
    ):
        DeviceArrays(fake_cupy, GPU)


def test_too_little_memory_is_one_line(arrays: DeviceArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cupy.MEMORY, "limit", 0)
    for demand in (lambda: arrays.empty((9,), "float32"), lambda: arrays.put(numbers(9))):
        with pytest.raises(EngineError, match=r"GPU: out of memory on Fake GPU \(Out of memory allocating 36 bytes"):
            demand()


def test_an_error_that_arrives_late_is_one_line(arrays: DeviceArrays) -> None:
    def crash() -> None:
        raise fake_cupy.CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    x = arrays.put(numbers(3))
    arrays._stream.put(crash)
    with pytest.raises(EngineError, match=r"GPU: Fake GPU failed \(cudaErrorIllegalAddress: an illegal memory access"):
        arrays.get(x)
