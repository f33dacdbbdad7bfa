"""A CUDA device that is not there: what the package uses of CuPy, with CUDA's order of events.

Operations are put in the queue of the calling thread's current stream and happen when that stream is synchronized, and
no earlier, whatever happens on other streams. So a result that is read too early is NaN (fresh memory holds nothing
else), work on the wrong stream never shows, and memory that is overwritten before it was read shows the later value.
Mixing host and device arrays, or turning one into the other by accident, is refused as CuPy refuses it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

Operation = Callable[[], Any]

NAN = {"f": np.nan, "i": -(2**30), "u": 2**7, "b": True}


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class Stream:
    """A queue. null: the default stream, current until another one is used."""

    null: Stream
    current: Stream
    by_handle: ClassVar[weakref.WeakValueDictionary[int, Stream]] = weakref.WeakValueDictionary()
    handles = itertools.count(1000)

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = next(self.handles)
        self.queue: list[Operation] = []
        self.captured: list[Operation] | None = None
        self.waits = 0
        self.by_handle[self.ptr] = self

    def use(self) -> Stream:
        Stream.current = self
        return self

    def put(self, operation: Operation) -> None:
        (self.queue if self.captured is None else self.captured).append(operation)

    def synchronize(self) -> None:
        if self.captured is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: not permitted when stream is capturing")
        self.waits += 1
        queue, self.queue = self.queue, []
        for operation in queue:
            operation()

    def begin_capture(self) -> None:
        assert self.captured is None
        self.captured = []

    def end_capture(self) -> Graph:
        assert self.captured is not None
        operations, self.captured = self.captured, None
        return Graph(operations)


class Graph:
    """Operations that are queued together, again and again."""

    def __init__(self, operations: list[Operation]) -> None:
        self.operations = operations
        self.launches = 0

    def launch(self, stream: Stream) -> None:
        self.launches += 1
        for operation in self.operations:
            stream.put(operation)


class Memory:
    """The device's memory: who holds which address, and how much is left."""

    def __init__(self) -> None:
        self.held: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self.limit = 1 << 34

    @property
    def used(self) -> int:
        """Bytes in arrays, and in what the pool keeps."""
        return sum(array.nbytes for array in self.held.values()) + POOL.kept

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        if self.used + array.nbytes > self.limit:
            raise OutOfMemoryError(
                f"Out of memory allocating {array.nbytes:,} bytes (allocated so far: {self.used:,} bytes)."
            )
        array[...] = NAN[array.dtype.kind]
        self.held[address_of(array)] = array
        return array


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


class Pool:
    """CuPy's pool. kept: bytes of arrays that are gone, kept for the next ones, as a test sets them."""

    def __init__(self) -> None:
        self.kept = 0

    def free_all_blocks(self) -> None:
        self.kept = 0


MEMORY = Memory()
POOL = Pool()


def get_default_memory_pool() -> Pool:
    return POOL


class ndarray(NDArrayOperatorsMixin):
    """A device array; `memory` is what it holds once everything queued is done. Views share their base's memory."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    shape = property(lambda self: self.memory.shape)
    dtype = property(lambda self: self.memory.dtype)
    ndim = property(lambda self: self.memory.ndim)
    nbytes = property(lambda self: self.memory.nbytes)

    @property
    def data(self) -> Any:
        class Pointer:
            ptr = address_of(self.memory)

        return Pointer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "data": (self.data.ptr, False)}

    def __len__(self) -> int:
        return len(self.memory)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __float__(self) -> float:
        return float(asnumpy(self))

    def __bool__(self) -> bool:
        return bool(asnumpy(self))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> ndarray:
        assert method == "__call__", f"{ufunc.__name__}.{method}"
        return _queued(lambda *arrays: ufunc(*arrays, **options), inputs, out=None if out is None else out[0])

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        assert function in (np.concatenate, np.repeat, np.split, np.broadcast_to), function.__name__
        if function is np.broadcast_to:
            return ndarray(np.broadcast_to(self.memory, *args[1:], **options))
        if function is np.split:
            return [ndarray(part) for part in np.split(self.memory, *args[1:], **options)]
        if function is np.concatenate:
            return _queued(lambda *parts: np.concatenate(parts, *args[1:], **options), args[0])
        return _queued(lambda array: function(array, *args[1:], **options), (self,))

    def __getitem__(self, index: Any) -> ndarray:
        part = self.memory[index]
        assert part.base is not None or part is self.memory, "only slices: these are views"
        return ndarray(part)

    def __setitem__(self, index: Any, value: Any) -> None:
        _queued(lambda array: array, (value,), out=self[index])

    def reshape(self, *shape: int) -> ndarray:
        assert self.memory.flags.c_contiguous
        return ndarray(self.memory.reshape(*shape))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        if not copy and self.dtype == dtype:
            return self
        return _queued(lambda array: array.astype(dtype), (self,))

    def copy(self) -> ndarray:
        return _queued(np.copy, (self,))

    def clip(self, low: float, high: float) -> ndarray:
        return _queued(lambda array: array.clip(low, high), (self,))

    def mean(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return _queued(lambda array: np.asarray(array.mean(axis=axis, keepdims=keepdims)), (self,))


def _queued(compute: Callable[..., np.ndarray], inputs: Any, out: ndarray | None = None) -> ndarray:
    """Queue out[...] = compute(*inputs). The result's shape and dtype are known at once, its values are not."""
    for value in inputs:
        if isinstance(value, np.ndarray | np.generic):
            raise TypeError(f"Unsupported type {type(value)}")
    arrays = [value.memory if isinstance(value, ndarray) else value for value in inputs]
    if out is None:
        with np.errstate(all="ignore"):
            dry = np.asarray(compute(*(np.ones_like(a) if isinstance(a, np.ndarray) else a for a in arrays)))
        out = empty(dry.shape, dry.dtype)
    target = out.memory

    def run() -> None:
        np.copyto(target, compute(*arrays), casting="same_kind")

    Stream.current.put(run)
    return out


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    return ndarray(MEMORY.allocate(shape, dtype))


def asarray(array: Any, order: str | None = None) -> ndarray:
    """Through staging memory of its own, so the caller may change `array` at once."""
    if isinstance(array, ndarray):
        return array if order != "C" or array.memory.flags.c_contiguous else array.copy()
    staged = np.array(array)
    arrived = empty(staged.shape, staged.dtype)
    Stream.current.put(lambda: np.copyto(arrived.memory, staged))
    return arrived


def ascontiguousarray(array: Any) -> ndarray:
    """At least one dimension, as NumPy's."""
    there = asarray(array, order="C")
    return there if there.ndim else there.reshape(1)


def asnumpy(array: ndarray) -> np.ndarray:
    Stream.current.synchronize()
    return array.memory.copy()


class cuda:
    """The names of cupy.cuda."""

    Stream = Stream

    class runtime:
        CUDARuntimeError = CUDARuntimeError

        @staticmethod
        def memGetInfo() -> tuple[int, int]:
            return MEMORY.limit - MEMORY.used, MEMORY.limit

    class memory:
        OutOfMemoryError = OutOfMemoryError


Stream.null = Stream.current = Stream()
