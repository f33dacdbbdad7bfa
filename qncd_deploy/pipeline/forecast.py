"""How long an export goes on once calibration has timed the network: mostly more calls of it, which can be counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qncd_deploy.calib.parts import Parts
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.blocks import find_blocks
from qncd_deploy.export.graph import macs_by_layer
from qncd_deploy.pipeline.fit import FitOptions
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.pipeline.smoothing import JUDGED_ROWS
from qncd_deploy.reconstruct.preset import Preset
from qncd_deploy.steps import make_steps

WORTH_TELLING = 20 * 60
"""Seconds. Who waits less than this has no use for a forecast."""

FORMS = 5
"""The float network, and it quantized without smoothing, with either kind and with both."""
LARGE_FORMS = 3
"""Those of them that make pictures of a large network."""

FLAGS = {"smoothing": "--smooth off", "rounding": "--recon off", "corrections": "--correction off"}
"""What saves a stage; all others are as long as --calib-size, --fit-size and --eval-size make them."""


class Pace:
    """Passes on what a tick is told of network calls, and times them."""

    def __init__(self, tick: Tick, clock: Callable[[], float] = time.monotonic) -> None:
        self._tick, self._clock = tick, clock
        self._told: list[tuple[float, int]] = []
        self._total = 0

    def __call__(self, done: int, total: int) -> None:
        self._told.append((self._clock(), done))
        self._total = total
        self._tick(done, total)

    @property
    def seconds(self) -> float | None:
        """Of all calls, told of or not, as fast as those after the first, which pays for what is compiled. None where
        fewer than two were told of.
        """
        if len(self._told) < 2:
            return None
        (start, first), (end, last) = self._told[0], self._told[-1]
        return self._total * (end - start) / max(last - first, 1)


@dataclass(frozen=True)
class Forecast:
    """rows: of network calls to come, by stage;  row_seconds: of the float network, for one of them."""

    rows: Mapping[str, float]
    row_seconds: float

    @property
    def seconds(self) -> float:
        """An upper bound as far as calls go, since quantized ones are faster."""
        return self.row_seconds * sum(self.rows.values())

    def __str__(self) -> str:
        parts = (
            f"{stage} {_span(self.row_seconds * count)}{f' ({FLAGS[stage]} saves it)' if stage in FLAGS else ''}"
            for stage, count in self.rows.items()
            if count
        )
        return (
            f"This network takes {self.row_seconds:.2g} s a picture and call here, twice that with guidance: up to "
            f"{_span(self.seconds)} follow: {', '.join(parts)}. Fewer pictures take less: --calib-size, --fit-size, "
            "--eval-size. Where torch finds a CUDA device, it computes there."
        )


def forecast(
    network: FloatNetwork, options: ExportOptions, calib: CalibSet, fits: Sequence[FitOptions], pace: Pace
) -> Forecast | None:
    """What is still to come behind calibration; None where that is soon done, or nothing was timed. fits: of every
    engine;  pace: of recording `calib`.
    """
    if pace.seconds is None:
        return None
    assert network.schedule is not None, "only sampling is timed"
    guided = 1 if network.facts.guidance_scale == 1 else 2
    picture = guided * len(make_steps(network.schedule, network.sampler))  # rows from noise to the end
    unseen = min(len(Parts.of(calib).unseen), JUDGED_ROWS)
    sampled = LARGE_FORMS if network.is_large else FORMS
    judged = FORMS * unseen + sampled * options.fit_size * picture if options.gate else 0
    rows = {
        "ranges": len(calib),
        "smoothing": 0 if options.smooth == "off" else len(calib) + judged,
        "rounding": 0 if options.preset is None else 2 * len(calib) + _learned(network, options.preset),
        "corrections": picture * sum(each.sampled for each in fits),
        # the float twin, and what is shown beside it, whose output is measured on the twin's trajectory too
        "proof": picture * options.eval_size * (5 if fits else 3),
    }
    found = Forecast(rows, pace.seconds / (picture * options.calib_pictures))
    return found if found.seconds >= WORTH_TELLING else None


def _learned(network: FloatNetwork, preset: Preset) -> float:
    """Rows that learning runs through the network, forward or the like, at most."""
    macs = macs_by_layer(network.model, network.sites)
    blocks = find_blocks(network.model, network.inputs, macs.keys())
    return min(preset.passes, len(blocks) * preset.most_macs / sum(macs.values()))


def _span(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
