"""The ways to run a network that are measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qncd_deploy.correct.record import ScheduleKey
from qncd_deploy.engines.base import Remainder
from qncd_deploy.errors import UsageError
from qncd_deploy.evaluate.batches import Draw
from qncd_deploy.runtime import Bundle
from qncd_deploy.sampler import Sampler

REFERENCE = "float"
"""Name of the float twin among the results."""


@dataclass(frozen=True)
class Variant:
    """One way to run a bundle; tables, blobs and the other options as in Bundle.sampler.

    bundle: another one than the rest are of, for ablations; its float twin must be the same network.
    """

    name: str
    backend: str | None = None
    correction: str = "auto"
    float_twin: bool = False
    remainder: Remainder | None = None
    bundle: Bundle | None = None
    tables: tuple[Path, ...] = ()
    blobs: tuple[Path, ...] = ()
    vae_slicing: bool = False
    vae_tiling: bool = False

    def open(self, bundle: Bundle, draw: Draw) -> Sampler:
        """A sampler of this variant. Raises as Bundle.sampler does; UsageError for a bundle of another network."""
        own, sampling = self.bundle or bundle, draw.sampling
        require_same_network(bundle, own)
        return own.sampler(
            self.backend,
            float_twin=self.float_twin,
            correction=self.correction,
            batch_size=draw.batch_size,
            scheduler=sampling.scheduler,
            n_steps=sampling.n_steps,
            eta=sampling.eta,
            guidance_scale=sampling.guidance_scale,
            remainder=self.remainder,
            threads=draw.threads,
            tables=self.tables,
            blobs=self.blobs,
            vae_slicing=self.vae_slicing,
            vae_tiling=self.vae_tiling,
        )


def fitted_methods(bundle: Bundle, key: ScheduleKey, tables: Sequence[Path] = ()) -> tuple[str, ...]:
    """The corrections that were fitted for exactly this way to sample, sorted.

    tables: correction files beside the bundle's own. Raises BundleError for a damaged file.
    """
    held = [table for each in bundle.corrections(tables) for table in each.tables]
    return tuple(sorted({table.method for table in held if table.key == key}))


def require_same_network(bundle: Bundle, other: Bundle) -> None:
    """Float graphs are laid out beside their quantized siblings, so their bytes differ between formats; what they were
    made from does not. Raises UsageError.
    """
    inputs, others = (_network_inputs(each) for each in (bundle, other))
    differs = next(
        (name for name in sorted(inputs.keys() | others.keys()) if inputs.get(name) != others.get(name)), None
    )
    if differs is None and bundle.manifest.model.schedule != other.manifest.model.schedule:
        differs = "noise schedule"
    if differs is not None:
        raise UsageError(
            f"{other.path}: made from another network than {bundle.path} ({differs} differs), so its pictures have no "
            "common float twin. Compare bundles of one checkpoint."
        )


def _network_inputs(bundle: Bundle) -> dict[str, str]:
    return {name: sha256 for name, sha256 in bundle.manifest.inputs.items() if name != "calib-data"}
