"""The tensors that the rest of a network still reads, for all calibration rows, on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qncd_deploy.engines.torch_place import CPU, placed


class Frontier:
    """Arrays by tensor name, first axis = rows; read through the page cache, so that memory stays bounded.

    A tensor that does not depend on the rows is kept as it is. device: where values are handed out.
    """

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._numbers, self._device = folder, count(), device
        self._files: dict[str, Path] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._fixed: dict[str, Tensor] = {}

    def rows(self, names: Sequence[str], rows: slice | np.ndarray) -> dict[str, Tensor]:
        """Copies of some rows of several tensors."""
        copies = {name: torch.from_numpy(np.array(self._arrays[name][rows])) for name in names if name in self._arrays}
        return {name: placed(copies[name], self._device) if name in copies else self._fixed[name] for name in names}

    def keep(self, name: str, value: Tensor) -> None:
        """A tensor that is the same for all rows."""
        self._fixed[name] = value

    @contextmanager
    def filling(self, name: str, count: int) -> Iterator[Filler]:
        """Write a tensor batch by batch; it can be read once the block has ended. One that is there is replaced."""
        path = self._folder / f"{next(self._numbers)}.npy"
        filler = Filler(path, count)
        yield filler
        self.drop(name)
        self._files[name], self._arrays[name] = path, filler.done()

    def drop(self, name: str) -> None:
        self._fixed.pop(name, None)
        if self._arrays.pop(name, None) is not None:
            self._files.pop(name).unlink()


class Filler:
    """One array that grows to `count` rows."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count, self._at = path, count, 0
        self._array: np.memmap | None = None

    def add(self, batch: Tensor) -> None:
        array = batch.detach().cpu().numpy()
        if self._array is None:
            shape = (self._count, *array.shape[1:])
            self._array = np.lib.format.open_memmap(self._path, mode="w+", dtype=array.dtype, shape=shape)
        self._array[self._at : self._at + len(array)] = array
        self._at += len(array)

    def done(self) -> np.ndarray:
        assert self._array is not None and self._at == self._count, f"{self._at} of {self._count} rows"
        self._array.flush()
        return self._array
