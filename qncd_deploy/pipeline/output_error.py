"""What quantizing does to the network's output, on calibration inputs, with the engine of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.parts import spread
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.engines.base import BaseEngine, computing_backend, find_backend, open_engine
from qncd_deploy.evaluate.metrics import row_power
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.save import on_disk
from qncd_deploy.pipeline.calibrate import as_fed, in_batches
from qncd_deploy.quant.plan import QuantPlan
from qncd_deploy.specs import TensorSpec


@dataclass(frozen=True, eq=False)
class OutputError:
    """Power of the float output and of the quantized one's error, (rows,) each."""

    signal: np.ndarray
    noise: np.ndarray

    @property
    def relative(self) -> float:
        """Mean over rows of noise / signal: every timestep counts alike."""
        return float(np.mean(self.noise / self.signal))

    @property
    def sqnr_db(self) -> float:
        """10 log10 of the powers' sums over all rows."""
        return float(10 * np.log10(self.signal.sum() / max(self.noise.sum(), np.finfo(np.float64).tiny)))


Form = Callable[[], AbstractContextManager[BaseEngine]]
"""Opens a form of a network, float or quantized; asked when it is to run, so that one at a time needs to be there."""


def output_errors(
    exact: Form, quantized: Iterable[Form], inputs: Sequence[TensorSpec], rows: CalibSet
) -> list[OutputError]:
    """Errors of several quantized forms of a network on the same rows, one form after another."""
    outputs = []
    for form in chain([exact], quantized):
        with form() as engine:
            parts = [next(iter(engine(as_fed(feeds, inputs)).values())) for feeds in in_batches(rows, inputs)]
        outputs.append(np.concatenate(parts)[: len(rows)])  # the last batch may be filled up
    signal, *others = outputs
    return [OutputError(row_power(signal), row_power(found - signal)) for found in others]


@contextmanager
def running(graph: ir.Model, plan: QuantPlan | None, scratch: Path) -> Iterator[BaseEngine]:
    """Open a float graph (no plan) or a master of `plan` with what exporting computes on here, in float32.
    Several may be open at a time.
    """
    backend = find_backend(computing_backend())
    if backend.role() == "ort" and plan is not None:
        graph = graph.clone()
        OrtSibling(plan)(graph)
    with on_disk(graph, scratch) as path, open_engine(backend.name, path, remainder="f32") as engine:
        yield engine


def kept_open(form: Form, stack: ExitStack) -> Form:
    """The same form, opened once and closed with the stack: compiling takes longer than running a few rows."""

    @cache
    def engine() -> BaseEngine:
        return stack.enter_context(form())

    return lambda: nullcontext(engine())


def spread_rows(calib: CalibSet, count: int) -> CalibSet:
    """Up to `count` rows, evenly over the set."""
    return calib.take(spread(np.arange(len(calib)), count))
