"""An engine that is not asked the same twice: candidates that compete on the same pictures share many of their calls.

They all begin with the same noise; what is corrected in the last calls only is the plain network until then; and the
float network's pictures are the same whoever is held against them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.specs import HostArrays, TensorSpec

ANSWER_BYTES = 1 << 28
"""What the outputs that are kept may take."""


class Answers:
    """Outputs by network, engine and inputs, of all engines that share it; beyond `most` bytes the oldest go."""

    def __init__(self, most: int = ANSWER_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._held: OrderedDict[bytes, dict[str, np.ndarray]] = OrderedDict()

    def find(self, key: bytes) -> dict[str, np.ndarray] | None:
        """Copies, which belong to the caller."""
        held = self._held.get(key)
        return None if held is None else {name: array.copy() for name, array in held.items()}

    def keep(self, key: bytes, outputs: Mapping[str, np.ndarray]) -> None:
        self._held[key] = {name: array.copy() for name, array in outputs.items()}
        self._bytes += _bytes(outputs)
        while self._bytes > self._most:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= _bytes(oldest)


class RememberingEngine(BaseEngine):
    """Another engine, which stays its owner's to close.

    Args: source: hash of the graph and its weights;  answers: where to look first.
    """

    def __init__(self, engine: BaseEngine, answers: Answers, *, source: str) -> None:
        super().__init__(engine.engine_id, engine.path, {}, {})  # what there is in and out, an engine may learn later
        self.arrays = engine.arrays
        self._engine, self._answers, self._source = engine, answers, source

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.outputs

    @property
    def row_sizes(self) -> tuple[int, ...]:
        return self._engine.row_sizes

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = self._key(feeds)
        if (held := self._answers.find(key)) is not None:
            return held
        outputs = self._engine._run(feeds)
        self._answers.keep(key, outputs)
        return outputs

    def _key(self, feeds: Mapping[str, np.ndarray]) -> bytes:
        digest = hashlib.blake2b(f"{self._source} {self.engine_id}".encode(), digest_size=16)
        for name, array in sorted(feeds.items()):
            digest.update(f" {name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.digest()

    def _close(self) -> None: ...


def remembering(engine: BaseEngine, answers: Answers, *, source: str) -> BaseEngine:
    """The engine as a RememberingEngine; as it is where its arrays are not the host's, whose bytes would have to be
    fetched at every call.
    """
    host = isinstance(engine.arrays, HostArrays)
    return RememberingEngine(engine, answers, source=source) if host else engine


def _bytes(outputs: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in outputs.values())
