"""Run the float graph to learn what flows through it: calibration inputs, ranges, samples of single tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.trajectories import CalibSet, ConditionRows, Recipe, load_user_npz, record
from qncd_deploy.engines.base import computing_backend, open_engine, torch_backend
from qncd_deploy.engines.eps_model import EngineModel
from qncd_deploy.engines.torch_ref import TorchEngine
from qncd_deploy.errors import CalibrationError
from qncd_deploy.export.graph import row_values
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


SAMPLE_ROWS = 128
SAMPLE_BYTES = 32 << 20
"""Rows of one layer's input on which a choice for it is judged, fewer where they would not fit in SAMPLE_BYTES: large
planes say as much in few rows, and running the layer several times is what takes the time."""


def calibration_set(network: FloatNetwork, options: ExportOptions, graph: Path, name: str, tick: Tick) -> CalibSet:
    """The user's data, or inputs recorded along the float sampler's own trajectories with the engine of this machine.

    graph: the float twin on disk. Raises: CalibrationError for data that do not fit the network.
    """
    if options.calib_data is not None:
        return load_user_npz(options.calib_data, network.facts.inputs)
    recipe = _recipe(network, options)
    with open_engine(computing_backend(), graph) as engine:
        rows = recipe.batch_size * (1 if recipe.null is None else 2)
        model = EngineModel.of(engine, rows=rows)
        return record(model, recipe, options.calib_dir / name, resume=options.resume, progress=tick)


def _recipe(network: FloatNetwork, options: ExportOptions) -> Recipe:
    if network.schedule is None:
        raise CalibrationError("calibration: the graph has no schedule to sample with. Give --calib-data FILE.npz.")
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
    """A float graph whose inner tensors can be asked for; see calib.observe.Run. row_bytes: how large they are."""

    def __init__(self, engine: TorchEngine, row_bytes: Mapping[str, int]) -> None:
        self.row_bytes = row_bytes
        self._engine = engine

    def __call__(self, feeds: Mapping[str, np.ndarray], names: Sequence[str], /) -> Iterator[tuple[str, np.ndarray]]:
        return self._engine.stream(feeds, names)


@contextmanager
def probing(model: ir.Model, scratch: Path) -> Iterator[Probe]:
    """Open a graph so that its tensors can be read; its copy in `scratch` goes with the block."""
    with on_disk(model, scratch) as graph, open_engine(torch_backend(), graph) as engine:
        assert isinstance(engine, TorchEngine)
        tensors = (*model.graph.inputs, *(out for node in model.graph for out in node.outputs))
        yield Probe(engine, {tensor.name: 4 * row_values(tensor) for tensor in tensors})


def in_batches(
    calib: CalibSet, inputs: Sequence[TensorSpec], size: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Calibration rows as the graph takes them, in batches of even length, so that engines compile for few shapes.

    A batch size fixed in the graph is filled up by repeating a row. size: the most rows, None for rows_per_run.
    """
    fixed = inputs[0].shape[0]
    if isinstance(fixed, int):
        size = fixed
    else:
        runs = math.ceil(len(calib) / (size or rows_per_run(inputs[0].shape[1:])))
        size = math.ceil(len(calib) / max(runs, 1))
    for batch in calib.batches(size):
        missing = size - len(next(iter(batch.values())))
        if missing and isinstance(fixed, int):
            batch = {name: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for name, a in batch.items()}
        yield batch


def counted(network: FloatNetwork, calib: CalibSet, tick: Tick) -> Iterator[dict[str, np.ndarray]]:
    """All rows in batches, telling how far they have come."""
    done = 0
    for feeds in in_batches(calib, network.facts.inputs):
        yield feeds
        done = min(done + len(next(iter(feeds.values()))), len(calib))
        tick(done, len(calib))


def fetch(probe: Probe, network: FloatNetwork, rows: CalibSet, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named tensors for all rows, (rows, ...) each."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feeds in in_batches(rows, network.facts.inputs):
        for name, array in probe(feeds, names):
            found[name].append(array)
    return {name: np.concatenate(parts)[: len(rows)] for name, parts in found.items()}


def edge_samples(
    probe: Probe, network: FloatNetwork, calib: CalibSet, edges: Sequence[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(edge, samples to fit on, as many held out), float32 (N, ...), once for every edge, not in order.

    Up to SAMPLE_ROWS rows in all, evenly spread, at least two a half; the two halves share no picture. One run of the
    network serves all edges that take as many rows.
    """
    groups: dict[int, list[str]] = {}
    for edge in dict.fromkeys(edges):
        count = max(4, min(SAMPLE_ROWS, len(calib), SAMPLE_BYTES // max(1, probe.row_bytes[edge])))
        groups.setdefault(count, []).append(edge)
    for count, group in groups.items():
        samples = fetch(probe, network, _pairs(calib, count), group)
        for edge in group:
            x = samples.pop(edge)
            yield edge, x[::2], x[1::2]


def _pairs(calib: CalibSet, count: int) -> CalibSet:
    """Some rows, evenly spread; the calibration set alternates pictures, so even and odd ones share none."""
    rows = np.linspace(0, len(calib) - 1, count // 2).astype(int) // 2 * 2
    return calib.take(np.minimum(np.stack([rows, rows + 1], axis=1).ravel(), len(calib) - 1))
