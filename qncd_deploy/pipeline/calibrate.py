"""Run the float graph to learn what flows through it: calibration inputs, batches of them, its inner tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.trajectories import CalibSet, ConditionRows, Recipe, load_user_npz, record
from qncd_deploy.engines.base import (
    backend_status,
    computing_backend,
    find_backend,
    make_engine_id,
    open_engine,
    torch_backend,
)
from qncd_deploy.engines.eps_model import EngineModel
from qncd_deploy.engines.torch_ref import TorchEngine
from qncd_deploy.errors import CalibrationError
from qncd_deploy.export.save import on_disk
from qncd_deploy.files import sha256_file
from qncd_deploy.pipeline.network import FloatNetwork, condition_rows
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.specs import TensorSpec

ROWS = 32
NUMBERS = 1 << 16
"""Rows per run of a float graph, fewer where they hold more than NUMBERS numbers: 5 of 3x64x64. Activations grow with
both."""

PICTURES = 16
"""Pictures sampled together before there is a bundle; fewer as with ROWS."""


def calibration_set(network: FloatNetwork, options: ExportOptions, graph: Path, name: str, tick: Tick) -> CalibSet:
    """The user's data, or inputs recorded along the float sampler's own trajectories with the engine of this machine.

    graph: the float twin on disk. Raises: CalibrationError for data that do not fit the network.
    """
    if options.calib_data is not None:
        return load_user_npz(options.calib_data, network.facts.sized_inputs)
    backend = computing_backend()
    recipe = _recipe(network, options, f"{make_engine_id(backend)} {backend_status(find_backend(backend)).version}")
    with open_engine(backend, graph) as engine:
        rows = recipe.batch_size * (1 if recipe.null is None else 2)
        model = EngineModel.of(engine, rows=rows)
        return record(model, recipe, options.calib_dir / name, resume=options.resume, progress=tick)


def _recipe(network: FloatNetwork, options: ExportOptions, engine: str) -> Recipe:
    assert network.schedule is not None, "graphs without one bring --calib-data"
    given, null = condition_rows(network, range(options.calib_pictures))
    return Recipe(
        model_sha256=digest_of(network.files),
        schedule=network.schedule,
        sampler=network.sampler,
        latent_shape=network.facts.latent_shape,
        size=options.calib_pictures,
        calls=options.calib_steps,
        condition=None if given is None else ConditionRows(given, null),
        guidance_scale=network.facts.guidance_scale,
        seed=options.seed,
        batch_size=min(options.calib_pictures, rows_per_run(network.facts.latent_shape, most=PICTURES)),
        engine=engine,
    )


def rows_per_run(row: Sequence[int | str], *, most: int = ROWS) -> int:
    """How many rows of this shape to run at a time; sizes that are not known count as 1."""
    numbers = math.prod(size for size in row if isinstance(size, int))
    return max(1, min(most, NUMBERS // numbers))


def digest_of(files: Mapping[str, Path]) -> str:
    """One sha256 for several files, whatever they are called on disk."""
    lines = "".join(f"{name} {sha256_file(path)}\n" for name, path in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


class Probe:
    """A float graph whose inner tensors can be asked for, for any number of rows; see calib.observe.Run."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine

    def __call__(self, feeds: Mapping[str, np.ndarray], names: Sequence[str], /) -> Iterator[tuple[str, np.ndarray]]:
        given, fed = len(next(iter(feeds.values()))), as_fed(feeds, self._engine.inputs.values())
        run = max((len(array) for array in fed.values() if array.ndim), default=1)
        for name, array in self._engine.stream(fed, names):
            yield name, array if run == given else _first(array, given, of=run)


def _first(array: np.ndarray, rows: int, *, of: int) -> np.ndarray:
    """What belongs to the first `rows` of a batch; several places of an array may be of one row."""
    divides = array.ndim > 0 and len(array) % of == 0
    return array[: len(array) // of * rows] if divides else array


@contextmanager
def probing(model: ir.Model, scratch: Path) -> Iterator[Probe]:
    """Open a graph so that its tensors can be read; its copy in `scratch` goes with the block."""
    with on_disk(model, scratch) as graph, open_engine(torch_backend(), graph) as engine:
        assert isinstance(engine, TorchEngine)
        yield Probe(engine)


def in_batches(
    calib: CalibSet, inputs: Sequence[TensorSpec], size: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Calibration rows in batches of even length, so that engines compile for few shapes; see as_fed.

    size: the most rows, None for rows_per_run; what the graph fixes wins. The last batch may be shorter than that.
    """
    fixed = fixed_rows(inputs)
    if fixed is None:
        (sample,) = (spec for spec in inputs if len(spec.shape) == 4)
        runs = math.ceil(len(calib) / (size or rows_per_run(sample.shape[1:])))
        fixed = math.ceil(len(calib) / max(runs, 1))
    return calib.batches(fixed)


def fixed_rows(inputs: Sequence[TensorSpec]) -> int | None:
    """How many rows a graph takes at a time, None for any number: one where its timestep is a single number for all.

    Raises: CalibrationError if the inputs do not agree.
    """
    sizes = {spec.name: spec.shape[0] if spec.shape else 1 for spec in inputs}
    fixed = {name: size for name, size in sizes.items() if isinstance(size, int)}
    if len(set(fixed.values())) > 1:
        (one, few), (other, many) = sorted(fixed.items(), key=lambda item: item[1])[:: len(fixed) - 1]
        raise CalibrationError(
            f"calibration: the graph takes {many} rows of {other} and {few} of {one} at a time, expected as many of "
            "each. Export it with one row of every input, or with a free batch axis."
        )
    return next(iter(fixed.values()), None)


def as_fed(feeds: Mapping[str, np.ndarray], inputs: Iterable[TensorSpec]) -> dict[str, np.ndarray]:
    """A batch as the graph takes it: filled up by repeating the last row where it fixes how many there are, and a
    single number where it takes one.
    """
    fed = {}
    for spec in inputs:
        rows = feeds[spec.name]
        if not spec.shape:
            fed[spec.name] = np.asarray(rows[0])
            continue
        missing = spec.shape[0] - len(rows) if isinstance(spec.shape[0], int) else 0
        fed[spec.name] = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
    return fed


def counted(network: FloatNetwork, calib: CalibSet, tick: Tick) -> Iterator[dict[str, np.ndarray]]:
    """All rows in batches, telling how far they have come."""
    done = 0
    for feeds in in_batches(calib, network.facts.sized_inputs):
        yield feeds
        done += len(next(iter(feeds.values())))
        tick(done, len(calib))
