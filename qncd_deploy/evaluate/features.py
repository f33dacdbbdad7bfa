"""The feature network that lies beside a checkpoint: pictures in, features and class logits out, on any engine.

images   float32 (n, C, H, W) in [-1, 1]  ->  features (n, d), logits (n, classes), the latter optional
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qncd_deploy.engines.base import BaseEngine, open_engine
from qncd_deploy.engines.eps_model import fixed_rows, in_groups
from qncd_deploy.errors import BundleError
from qncd_deploy.evaluate.metrics import Moments
from qncd_deploy.files import load_npz

if TYPE_CHECKING:
    from typing import Self

_ROWS = 64


class Description(NamedTuple):
    """What the network says of pictures: features (N, d) float32; logits (N, classes) float32 or None."""

    features: np.ndarray
    logits: np.ndarray | None


class FeatureNetwork:
    """An open feature network; a context manager that closes its engine."""

    def __init__(self, engine: BaseEngine) -> None:
        """Raises BundleError if the graph is not of the form above."""
        self._engine = engine
        inputs, outputs = tuple(engine.inputs.values()), engine.outputs
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or "features" not in outputs:
            raise BundleError(
                f"{engine.path}: not a feature network: its inputs are {', '.join(engine.inputs)} and its outputs "
                f"{', '.join(outputs)}; one picture input (n, C, H, W) and an output `features` are expected."
            )
        self._input = inputs[0]
        self._outputs = [name for name in ("features", "logits") if name in outputs]

    @classmethod
    def open(cls, path: Path, backend: str, *, threads: int | None = None) -> FeatureNetwork:
        """Raises: EngineError or BackendMissing as open_engine does, BundleError for a graph of another kind."""
        engine = open_engine(backend, path, remainder="f32", threads=threads)
        try:
            return cls(engine)
        except BundleError:
            engine.close()
            raise

    def __call__(self, images: np.ndarray) -> Description:
        """images (N, H, W, C) uint8. Raises BundleError for pictures of another size than the network takes."""
        size = (images.shape[3], *images.shape[1:3])
        if any(isinstance(want, int) and want != has for want, has in zip(self._input.shape[1:], size, strict=True)):
            wanted = "x".join(map(str, self._input.shape[1:]))
            raise BundleError(
                f"{self._engine.path}: takes pictures of {wanted}, these are {'x'.join(map(str, size))} (channels x "
                "height x width). Use the feature network of this data set."
            )
        widths: list[int] = []

        def run(group: np.ndarray) -> np.ndarray:
            scaled = group.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
            found = self._engine({self._input.name: scaled})
            parts = [found[name].reshape(len(group), -1) for name in self._outputs]
            widths[:] = [part.shape[1] for part in parts]
            return np.concatenate(parts, axis=1)

        joined = in_groups(run, [images], rows=fixed_rows(self._input) or min(_ROWS, len(images)))
        features, logits = np.split(joined, [widths[0]], axis=1)
        return Description(features, logits if "logits" in self._outputs else None)

    def close(self) -> None:
        """Close the engine. Closing twice is allowed."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_reference(path: Path) -> Moments:
    """Mean and covariance of the features of real pictures, from an npz with `mean` (d,) and `cov` (d, d).

    Raises: BundleError if the file is damaged, or the arrays are missing or do not fit each other.
    """
    arrays = load_npz(path)
    mean, cov = arrays.get("mean"), arrays.get("cov")
    if mean is None or cov is None or mean.ndim != 1 or cov.shape != 2 * mean.shape or not np.isfinite(cov).all():
        raise BundleError(f"{path}: not a feature reference: expected `mean` (d,) and `cov` (d, d), finite.")
    return Moments(mean.astype(np.float64), cov.astype(np.float64))
