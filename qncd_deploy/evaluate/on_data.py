"""How far a quantized network's output is from the float twin's on given inputs: for networks that cannot sample.

SQNR = sum e^2 / sum (q - e)^2, row by row and over all rows; e, q: the float and the quantized network's first output
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.calib.trajectories import load_user_npz
from qncd_deploy.engines.base import BaseEngine, Remainder, default_backend, find_backend
from qncd_deploy.engines.eps_model import full_groups, row_sizes
from qncd_deploy.errors import EngineError
from qncd_deploy.evaluate.batches import Tick
from qncd_deploy.evaluate.compare import counter
from qncd_deploy.evaluate.metrics import Estimate, bootstrap, decibels, row_power
from qncd_deploy.runtime import Bundle

_ROWS = 16
_NUMBERS = 1 << 16  # of a row's largest input times the rows run at a time


@dataclass(frozen=True)
class OutputFigures:
    """SQNR in dB over all rows, with its interval, and of each row, infinite where nothing differs."""

    engine: str
    sqnr_db: Estimate
    row_sqnr_db: tuple[float, ...]

    @property
    def worst(self) -> int:
        """The row that loses most."""
        return int(np.argmin(self.row_sqnr_db))

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite SQNR is null."""
        rows = [value if np.isfinite(value) else None for value in self.row_sqnr_db]
        overall = {name: value if np.isfinite(value) else None for name, value in asdict(self.sqnr_db).items()}
        return {"engine": self.engine, "sqnr_db": overall, "row_sqnr_db": rows}


def compare_on_data(
    bundle: Bundle,
    data: Path,
    *,
    backend: str | None = None,
    remainder: Remainder | None = None,
    threads: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> OutputFigures:
    """Run both networks on the rows of an npz, arrays named as the graph's inputs.

    seed: of the bootstrap;  on_progress: rows that went through a network, and all that will.

    Raises: CalibrationError for data that do not fit the network, EngineError as open_engine does and for outputs that
    are not finite.
    """
    backend = backend or default_backend()
    rows = load_user_npz(data, bundle.manifest.model.inputs)
    tick = counter(2 * len(rows), on_progress)
    outputs: list[np.ndarray] = []
    engine_id = ""
    for role, precision in (("float", "f32"), (find_backend(backend).role(remainder), remainder)):
        roles = bundle.network_roles(role)
        with bundle.open_network(backend, roles, remainder=precision, threads=threads) as engine:
            outputs.append(_outputs(engine, rows.arrays, tick))
            engine_id = engine.engine_id
    exact, found = outputs
    signal, noise = row_power(exact), row_power(found - exact)
    error = bootstrap(lambda chosen: float(noise[chosen].sum() / signal[chosen].sum()), len(signal), seed=seed)
    value, low, high = (decibels(1.0, max(part, 0.0)) for part in (error.value, error.high, error.low))
    return OutputFigures(
        engine=engine_id,
        sqnr_db=Estimate(value, low, high, error.n),
        row_sqnr_db=tuple(map(decibels, signal.tolist(), noise.tolist())),
    )


def _outputs(engine: BaseEngine, arrays: Mapping[str, np.ndarray], tick: Tick) -> np.ndarray:
    names, first = list(engine.inputs), next(iter(engine.inputs.values()))
    output = next(iter(engine.outputs))
    largest = max(array[0].size for array in arrays.values())
    rows = int(np.clip(_NUMBERS // max(largest, 1), 1, min(_ROWS, len(arrays[names[0]]))))
    parts = []
    for group, held in full_groups([arrays[name] for name in names], rows=row_sizes(engine, first, rows)):
        parts.append(engine(dict(zip(names, group, strict=True)))[output][:held])
        tick(held)
    found = np.concatenate(parts)
    if not np.isfinite(found).all():
        raise EngineError(f"{engine.path}: {engine.engine_id} returns values that are not finite on these inputs.")
    return found
