"""The feature network that lies beside a checkpoint: pictures in, features and class logits out, on any engine.

images   float32 (n, C, H, W) in [-1, 1]  ->  features (n, d), logits (n, classes), spatial (n, ...); the last two
         optional

features and spatial are flattened. What `spatial` holds is up to whoever made the network; the distance of such
features is called sFID, for which Nash et al. (arXiv:2103.03841) take the first 7 channels of an inner layer of
Inception's, unpooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qncd_deploy.engines.base import BaseEngine, Effort, find_backend, open_engine
from qncd_deploy.engines.eps_model import in_groups, row_sizes
from qncd_deploy.errors import BundleError
from qncd_deploy.evaluate.metrics import Moments
from qncd_deploy.files import load_npz
from qncd_deploy.pictures import Pictures
from qncd_deploy.runtime import Bundle

if TYPE_CHECKING:
    from typing import Self

_ROWS = 64


class Description(NamedTuple):
    """What the network says of pictures: features (N, d) float32; logits (N, classes) and spatial (N, s) float32, each
    None where the network has no such output."""

    features: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


class FeatureNetwork:
    """An open feature network; a context manager that closes its engine."""

    def __init__(self, engine: BaseEngine, *, full: bool = False) -> None:
        """full: always run as many rows at a time as are run of many pictures, since each other number would have to
        be compiled. Raises BundleError if the graph is not of the form above.
        """
        self._engine = engine
        self._full = full
        inputs, outputs = tuple(engine.inputs.values()), engine.outputs
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or "features" not in outputs:
            raise BundleError(
                f"{engine.path}: not a feature network: its inputs are {', '.join(engine.inputs)} and its outputs "
                f"{', '.join(outputs)}; one picture input (n, C, H, W) and an output `features` are expected."
            )
        self._input = inputs[0]
        self._outputs = [name for name in Description._fields if name in outputs]

    @classmethod
    def open(
        cls, path: Path, backend: str, *, threads: int | None = None, effort: Effort = BaseEngine.effort
    ) -> FeatureNetwork:
        """Raises: EngineError or BackendMissing as open_engine does, BundleError for a graph of another kind."""
        engine = open_engine(backend, path, remainder="f32", threads=threads, effort=effort)
        try:
            return cls(engine, full=find_backend(backend).device == "gpu")
        except BundleError:
            engine.close()
            raise

    def __call__(self, images: np.ndarray) -> Description:
        """images (N, H, W, C) uint8. Raises BundleError for pictures of another size than the network takes, and where
        what it returns is not finite."""
        self.check((images.shape[3], *images.shape[1:3]))
        widths: list[int] = []

        def run(group: np.ndarray) -> np.ndarray:
            scaled = group.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
            found = self._engine({self._input.name: scaled})
            parts = [found[name].reshape(len(group), -1) for name in self._outputs]
            widths[:] = [part.shape[1] for part in parts]
            return np.concatenate(parts, axis=1)

        rows = row_sizes(self._engine, self._input, _ROWS if self._full else min(_ROWS, len(images)))
        joined = in_groups(run, [images], rows=rows)
        if not np.isfinite(joined).all():
            raise BundleError(
                f"{self._engine.path}: returns features that are not finite. Use another feature network."
            )
        parts = np.split(joined, np.cumsum(widths)[:-1], axis=1)
        return Description(**dict(zip(self._outputs, parts, strict=True)))

    def check(self, size: Sequence[int]) -> None:
        """Raises BundleError if the network does not take pictures of this size, (C, H, W)."""
        if any(isinstance(want, int) and want != has for want, has in zip(self._input.shape[1:], size, strict=True)):
            wanted = "x".join(map(str, self._input.shape[1:]))
            raise BundleError(
                f"{self._engine.path}: takes pictures of {wanted}, these are {'x'.join(map(str, size))} (channels x "
                "height x width). Use the feature network of this data set."
            )

    def close(self) -> None:
        """Close the engine. Closing twice is allowed."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Reference:
    """What is known of real pictures, in terms of one feature network.

    path: for messages;  moments, spatial: of `features` and of `spatial`, the latter None if not known;  features:
    (n, d) of some real pictures, for precision and recall, None if there are none.
    """

    path: Path
    moments: Moments
    spatial: Moments | None = None
    features: np.ndarray | None = None

    def check(self, description: Description) -> None:
        """Raises BundleError if it was made with another network than this description."""
        for name, known, found in (
            ("features", self.moments, description.features),
            ("spatial", self.spatial, description.spatial),
        ):
            if known is not None and found is not None and len(known.mean) != found.shape[1]:
                raise BundleError(
                    f"{self.path}: made with a network of {len(known.mean)} {name}, this one has {found.shape[1]}. "
                    "Name the reference of this feature network."
                )


def load_reference(path: Path) -> Reference:
    """What an npz holds of real pictures: `mean` (d,) and `cov` (d, d) of their features, or `features` (n, d), from
    which both follow; optionally `spatial_mean` (s,) and `spatial_cov` (s, s).

    Raises: BundleError if the file is damaged, or the arrays are missing or do not fit each other.
    """
    arrays = load_npz(path)
    features = arrays.get("features")
    if features is not None and (features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all()):
        raise BundleError(f"{path}: not a feature reference: expected `features` (n, d), two rows or more, finite.")
    moments = _moments(path, arrays, "")
    if moments is None and features is not None:
        moments = Moments.of(features)
    if moments is None or (features is not None and features.shape[1] != len(moments.mean)):
        raise BundleError(f"{path}: not a feature reference: expected `mean` (d,) and `cov` (d, d), finite.")
    return Reference(path, moments, _moments(path, arrays, "spatial_"), features)


def _moments(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> Moments | None:
    mean, cov = arrays.get(f"{prefix}mean"), arrays.get(f"{prefix}cov")
    if mean is None and cov is None:
        return None
    if mean is None or cov is None or mean.ndim != 1 or cov.shape != 2 * mean.shape or not np.isfinite(cov).all():
        raise BundleError(
            f"{path}: not a feature reference: expected `{prefix}mean` (d,) and `{prefix}cov` (d, d), finite."
        )
    return Moments.from_cov(mean, cov)


@dataclass(frozen=True, eq=False)
class Lens:
    """How pictures are looked at: a feature network and what it makes of real pictures, either None; a context manager
    that closes the network.
    """

    network: FeatureNetwork | None = None
    data: Reference | None = None

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        backend: str,
        *,
        features: Path | None = None,
        reference: Path | None = None,
        threads: int | None = None,
    ) -> Lens:
        """What the bundle brings, or the files named; the bundle's reference belongs to its own network alone.

        Raises: BundleError for files of another form, a network of other pictures or a reference of another network;
        EngineError as open_engine does.
        """
        roles = bundle.manifest.roles
        if reference is None and features is None and "features-reference" in roles:
            reference = bundle.file("features-reference")
        if features is None and "features" in roles:
            features = bundle.file("features")
        data = None if reference is None else load_reference(reference)
        if features is None:
            return cls(None, data)
        network = FeatureNetwork.open(features, backend, threads=threads, effort=bundle.effort)
        try:
            if (size := bundle.manifest.model.picture_shape) is not None:
                network.check(size)
                if data is not None:
                    data.check(network(np.zeros((1, *size[1:], size[0]), np.uint8)))
        except BaseException:
            network.close()
            raise
        return cls(network, data)

    def describe(self, pictures: Pictures) -> Description | None:
        return None if self.network is None or pictures.images is None else self.network(pictures.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.network is not None:
            self.network.close()
