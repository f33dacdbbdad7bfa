"""The GPU as engines and the sampling loop need it: arrays with operators, one stream, copies that do not wait, graphs.

CuPy is the array library. The loop and every correction are written in array operators, so they run on its arrays as
they are; it brings the rest too: a pool of device memory ordered by stream, pinned staging of uploads, capture of CUDA
graphs, wheels for x86-64 and aarch64 (13 for NumPy 1.26, 14 for NumPy 2). The other way, a small engine for the update,
would say every correction a second time as a graph and rebuild it for every sampler; Polygraphy's CUDA wrapper has
copies, but neither arithmetic nor capture.

Everything is put on one stream: uploads, engines, arithmetic. Its order is all the synchronisation there is, and `get`
is the only place that waits. The stream does not block the default one, so arrays must not be used outside of it;
every method here makes it the calling thread's current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from qncd_deploy.engines.trt.device import Device, find_device
from qncd_deploy.errors import BackendMissing, EngineError, first_line, install_line
from qncd_deploy.specs import Array

INSTALL = f'{install_line("cuda")}, on a Jetson ".[jetson]"'


@cache
def open_arrays() -> DeviceArrays:
    """Those of this process's GPU: the first that CUDA_VISIBLE_DEVICES lets it see.

    Raises: BackendMissing as find_device and DeviceArrays do, and if CuPy is not installed or does not load.
    """
    device = find_device()
    try:
        import cupy
    except (ImportError, OSError) as exc:  # OSError: a shared library that it needs is absent
        raise BackendMissing(f"GPU: CuPy cannot be used here ({first_line(exc)}). Install it: {INSTALL}") from exc
    return DeviceArrays(cupy, device)


class DeviceArrays:
    """Arrays on one GPU, and the one stream on which everything happens to them.

    library: CuPy, or what stands in for it.

    Raises: BackendMissing if CuPy finds the driver too old, or no CUDA toolkit to compile its arithmetic with.
    """

    def __init__(self, library: ModuleType | Any, device: Device) -> None:
        self._cupy = library
        self.device = device
        try:
            self._stream = library.cuda.Stream(non_blocking=True)
        except library.cuda.runtime.CUDARuntimeError as exc:
            raise BackendMissing(
                f"GPU: CuPy cannot use {device.name} ({first_line(exc)}); the driver runs CUDA {device.cuda}. "
                f"Update the driver, or install a CuPy for an older CUDA: {INSTALL}"
            ) from exc
        self._check_arithmetic()

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.ptr)

    def holds(self, array: Array) -> bool:
        """Whether an array lies on the device."""
        return isinstance(array, self._cupy.ndarray)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A contiguous device array, contents undefined. Raises EngineError if memory does not suffice."""
        with self._refusals():
            return self._cupy.empty(shape, dtype)

    def put(self, array: np.ndarray | Array) -> Array:
        """A contiguous copy on the device, or the array itself if that is what it is already.

        Returns at once: the bytes go through pinned memory that is kept until they have arrived, so the argument may
        be changed afterwards. Raises EngineError if memory does not suffice.
        """
        with self._refusals():
            return self._cupy.asarray(array, order="C")  # ascontiguousarray makes a scalar an array of one

    def get(self, array: Array | np.ndarray) -> np.ndarray:
        """A copy on the host, once all that was queued before is done. Raises EngineError if any of it failed."""
        if not self.holds(array):
            return np.asarray(array)
        with self._refusals():
            host: np.ndarray = self._cupy.asnumpy(array)
            return host

    def wait(self) -> None:
        """Until all that was queued is done. Raises EngineError if any of it failed."""
        with self._refusals():
            self._stream.synchronize()

    def used_bytes(self) -> int:
        """Memory of the device that is in use, by whomever, engines included, which take theirs past CuPy's pool. What
        the pool keeps for later is given back first. Waits until all that was queued is done.
        """
        with self._refusals():
            self._stream.synchronize()
            self._cupy.get_default_memory_pool().free_all_blocks()
            free, total = self._cupy.cuda.runtime.memGetInfo()
            return int(total - free)

    def use(self) -> None:
        """Make the stream the calling thread's current one, so that operators on arrays are queued on it."""
        self._stream.use()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What `run` queues, as a graph: the same work on the same addresses at every call, queued in one go.

        Raises: EngineError if something in it cannot be captured.
        """
        with self._refusals():
            self._stream.begin_capture()
            try:
                run()
            finally:
                graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """On our stream; what CUDA complains about, in one line."""
        self.use()
        cuda = self._cupy.cuda
        try:
            yield
        except cuda.memory.OutOfMemoryError as exc:
            raise EngineError(
                f"GPU: out of memory on {self.device.name} ({first_line(exc)}). Use a smaller --batch-size, or close "
                "what else uses it."
            ) from exc
        except cuda.runtime.CUDARuntimeError as exc:
            raise EngineError(f"GPU: {self.device.name} failed ({first_line(exc)}).") from exc

    def _check_arithmetic(self) -> None:
        """CuPy compiles its kernels at first use and finds only then that the compiler is missing: find out now."""
        self.use()
        try:
            one = self._cupy.asarray(np.ones((), np.float32))
            arrived = float(one + one)
        except self._cupy.cuda.memory.OutOfMemoryError as exc:
            raise EngineError(f"GPU: out of memory on {self.device.name} before anything was loaded.") from exc
        except Exception as exc:  # ImportError, OSError, RuntimeError or its own classes: by version and by library
            raise BackendMissing(
                f"GPU: CuPy cannot compile for it ({first_line(exc)}). Install the CUDA toolkit's NVRTC and headers: "
                f"{INSTALL}"
            ) from exc
        assert arrived == 2
