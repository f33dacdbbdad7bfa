"""Reconstruct a whole network: block after block, each fed by the network quantized so far, towards the float one.

Two copies of the network advance together through the calibration rows, one in float, one quantized; only what the rest
still reads is kept, on disk. A finished block is a file, so that a killed run goes on behind it with the same result.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.engines.torch_place import exactly, room, torch_device
from qncd_deploy.errors import CalibrationError, ExportError
from qncd_deploy.export.blocks import Block, find_blocks
from qncd_deploy.export.graph import Flow, Inputs, backward_bytes, row_macs, row_values
from qncd_deploy.export.passes.common import constant
from qncd_deploy.files import load_npz, make_folder, save_npz
from qncd_deploy.quant.grid import dequantize
from qncd_deploy.quant.plan import QuantPlan, finite_db
from qncd_deploy.quant.ranges import sqnr_db, stats_sqnr_db
from qncd_deploy.reconstruct.frontier import Frontier
from qncd_deploy.reconstruct.learn import Outcome, QuantizedBlock, Settled, learn
from qncd_deploy.reconstruct.preset import Preset
from qncd_deploy.reconstruct.segment import Segment

DISK_BYTES = 8 << 30
"""What the tensors between two blocks may take; fewer calibration rows are used where all of them would take more."""

MEMORY_BYTES = 3 << 30
"""What a batch may hold while a block learns; a smaller batch where the preset's would hold more."""

HELD_OUT = 8
"""One picture in so many, or the last of fewer, only tells whether learning helped."""

FEW_PICTURES = 4
"""Of fewer than these every HELD_OUT-th row is held out: a whole picture would be too much of what there is."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What was learned: outcomes by the name of each block's first layer; weights by name, float32 on the points of
    their grids, and step sizes by edge, of the blocks that were kept.
    """

    preset: Preset
    outcomes: Mapping[str, Outcome]
    weights: Mapping[str, np.ndarray]
    steps: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "preset": self.preset.name,
            "blocks": {
                name: {
                    "kept": outcome.kept,
                    "error": [_finite(outcome.error_before), _finite(outcome.error_after)],
                    "iterations": outcome.iterations,
                }
                for name, outcome in self.outcomes.items()
            },
        }

    def fold(self, model: ir.Model) -> ir.Model:
        """A copy of the float graph with the learned weights in the place of its own."""
        copy = model.clone()
        for name, weight in self.weights.items():
            copy.graph.initializers[name].const_value = ir.tensor(weight, name=name)
        return copy

    def revise(self, plan: QuantPlan, model: ir.Model, stats: Mapping[str, TensorStats]) -> QuantPlan:
        """The plan with the learned steps. model: the float graph before; stats: of the plan's edges."""
        layers = []
        for layer in plan:
            if layer.quantized and layer.input in self.steps:
                layer = replace(layer, act_scale=self.steps[layer.input], act_method=f"{layer.act_method}, learned")
                layer = replace(layer, act_sqnr_db=finite_db(stats_sqnr_db(stats[layer.input], layer.act_grid)))
            if layer.name in self.weights:
                loss = sqnr_db(constant(model.graph.initializers[layer.name]), self.weights[layer.name])
                method = f"{layer.weight_method}, {self.preset.rounding}"
                layer = replace(layer, sqnr_db=finite_db(loss), weight_method=method)
            layers.append(layer)
        return replace(plan, layers=tuple(layers))


def reconstruct(
    model: ir.Model,
    inputs: Inputs,
    plan: QuantPlan,
    calib: CalibSet,
    *,
    preset: Preset,
    seed: int,
    work: Path,
    scratch: Path,
    resume: bool = True,
    tick: Callable[[int, int], None],
) -> Reconstruction:
    """Learn the rounding of every planned weight.

    model: the float graph that the plan is of. work: where finished blocks are kept, by everything that decides them;
    scratch: for tensors. tick: blocks done, blocks in all.

    Raises: CalibrationError if there are too few rows for a batch and one to judge by; ExportError for operators that
    torch has no function for, for a graph that takes one timestep for all rows, and for tensors between two blocks that
    do not have one row for each row of the batch.
    """
    blocks = find_blocks(model, inputs, {layer.name for layer in plan.quantized})
    walk = _Walk(model, inputs, plan, blocks, calib, preset, scratch)
    folder = work / walk.key(seed)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    outcomes: dict[str, Outcome] = {}
    weights: dict[str, np.ndarray] = {}
    steps: dict[str, float] = {}
    for unit in walk.units:
        if isinstance(unit, Block):
            with exactly(walk.device):
                outcome, found = walk.advance(unit, folder / f"{len(outcomes):04}.npz", seed)
            outcomes[unit.layers[0]] = outcome
            if outcome.kept:
                weights |= {name: dequantize(q, plan[name].weight_grid) for name, q in found.integers.items()}
                steps |= found.steps
            tick(len(outcomes), len(blocks))
        else:
            walk.pass_through(unit)
        walk.forget(unit)
    return Reconstruction(preset, outcomes, weights, steps)


@dataclass(frozen=True, eq=False)
class _Passage:
    """What no block computes between two of them, run as one. nodes: in graph order; inputs: names of the tensors that
    come in; outputs: of those that something behind it reads.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _units(model: ir.Model, blocks: Sequence[Block]) -> tuple[list[Block | _Passage], dict[str, Block | _Passage]]:
    """Blocks and passages in the order in which they can run, up to the last block, and the last reader of every
    tensor by name.
    """
    inside = {node for block in blocks for node in block.nodes}
    ends = {block.nodes[-1]: block for block in blocks}
    parts: list[Block | list[ir.Node]] = [[]]
    for node in model.graph:
        if node in ends:
            parts += [ends[node], []]
        elif node not in inside:
            parts[-1].append(node)
    parts.pop()  # what nothing reads
    read_after: set[str] = set()
    units: list[Block | _Passage] = []
    last_reader: dict[str, Block | _Passage] = {}
    for part in reversed(parts):
        nodes = part.nodes if isinstance(part, Block) else part
        read = dict.fromkeys(v.name for node in nodes for v in node.inputs if v is not None and not v.is_initializer())
        made = [out.name for node in nodes for out in node.outputs]
        unit = part
        if not isinstance(part, Block):
            inputs = tuple(name for name in read if name not in set(made))
            unit = _Passage(tuple(part), inputs, tuple(name for name in made if name in read_after))
        if not isinstance(unit, _Passage) or unit.outputs:
            units.append(unit)
            for name in read:
                last_reader.setdefault(name, unit)
            read_after.update(read)
    return units[::-1], last_reader


class _Walk:
    """Both copies of the network, and where they have got to."""

    def __init__(
        self,
        model: ir.Model,
        inputs: Inputs,
        plan: QuantPlan,
        blocks: Sequence[Block],
        calib: CalibSet,
        preset: Preset,
        scratch: Path,
    ) -> None:
        self.device = torch_device()
        self.model, self.plan, self.blocks = model, plan, blocks
        self.units, last_reader = _units(model, blocks)
        self._last_use: dict[Block | _Passage, list[str]] = {unit: [] for unit in self.units}
        for name, unit in last_reader.items():
            self._last_use[unit].append(name)
        self._varies = {value.name for value, sources in Flow(model, inputs).sources.items() if sources}
        fixed = _fixed_batch(model, inputs)
        self.batch = fixed or max(1, min(preset.batch, self._largest_batch(), len(calib) // HELD_OUT))
        chosen, self.held_out = self._choose(calib)
        while not fixed and self.batch > 1 and len(self.held_out) < self.batch:
            self.batch -= 1
            chosen, self.held_out = self._choose(calib)
        self.rows = chosen.arrays
        self.train = np.setdiff1d(np.arange(len(chosen)), self.held_out)
        if len(self.held_out) < self.batch:
            raise CalibrationError(
                f"reconstruction: {len(calib)} calibration rows, expected at least {HELD_OUT * self.batch} for "
                f"batches of {self.batch}. Give more calibration data, or use --recon off."
            )
        self.preset = replace(preset, batch=self.batch)
        self.float_, self.quantized = (Frontier(scratch / name, self.device) for name in ("float", "quantized"))
        for name, array in self.rows.items():
            for frontier in (self.float_, self.quantized):
                with frontier.filling(name, len(array)) as filler:
                    filler.add(torch.from_numpy(array))
        readers: dict[str, set[str]] = {}
        for block in blocks:
            for name in block.layers:
                readers.setdefault(plan[name].input, set()).add(block.output)
        self._shared = {edge for edge, found in readers.items() if len(found) > 1}

    def key(self, seed: int) -> str:
        """Stands for everything that decides what is learned."""
        digest = hashlib.sha256(f"{self.plan.sha256} {self.preset} {seed} {torch.__version__}".encode())
        digest.update(f"{torch.get_num_threads()} {self.device}".encode())
        for name, value in sorted(self.model.graph.initializers.items()):
            digest.update(name.encode() + value.const_value.tobytes())
        for name, array in sorted(self.rows.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()[:16]

    def pass_through(self, passage: _Passage) -> None:
        """Run what lies outside every block. What does not depend on the rows, a shape at most, is kept as it is:
        batches are all of one size.
        """
        segment = Segment(passage.nodes, self.device)
        varying = tuple(name for name in passage.outputs if name in self._varies)
        others = tuple(name for name in passage.outputs if name not in self._varies)
        for frontier in (self.float_, self.quantized):
            for name, value in segment(frontier.rows(passage.inputs, slice(0, self.batch)), others).items():
                frontier.keep(name, value)
            if varying:
                self._fill(frontier, passage.inputs, varying, lambda feeds: segment(feeds, varying))

    def advance(self, block: Block, file: Path, seed: int) -> tuple[Outcome, Settled]:
        """Learn a block, or read what was learned of it before, and take both copies past it."""
        layers = {name: self.plan[name] for name in block.layers}
        quantized = QuantizedBlock(block, layers, self.preset.rounding, self._shared, self.device)
        names = (block.output,)
        self._fill(self.float_, block.inputs, names, lambda feeds: {names[0]: quantized.float_output(feeds)})

        def rows(picked: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            picked = np.sort(picked)  # the files are read forwards
            feeds = self.quantized.rows(block.inputs, picked)
            return feeds, self.float_.rows(names, picked)[block.output]

        if file.exists():
            outcome, found = _read(file)
        else:
            outcome = learn(
                quantized,
                rows,
                train=self.train,
                held_out=self.held_out,
                preset=self.preset,
                macs=sum(map(self._macs, layers)),
                seed=seed,
            )
            found = quantized.settled()
            _write(file, outcome, found)
        run = quantized.settle(found)
        self._fill(self.quantized, block.inputs, names, lambda feeds: {names[0]: run(feeds)})
        return outcome, found

    def forget(self, unit: Block | _Passage) -> None:
        """Drop what nothing after this unit reads."""
        for name in self._last_use[unit]:
            self.float_.drop(name)
            self.quantized.drop(name)

    def _fill(
        self,
        frontier: Frontier,
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    ) -> None:
        """Compute tensors for all rows, batch by batch."""
        total = len(next(iter(self.rows.values())))
        with ExitStack() as stack, torch.no_grad():
            fillers = {name: stack.enter_context(frontier.filling(name, total)) for name in names}
            for start in range(0, total, self.batch):
                for name, value in run(frontier.rows(inputs, slice(start, start + self.batch))).items():
                    if value.shape[:1] != (self.batch,):
                        raise ExportError(
                            f"reconstruction: {name} has shape {list(value.shape)} for a batch of {self.batch}, "
                            "expected between two blocks is one row for each. Use --recon off."
                        )
                    fillers[name].add(value)

    def _largest_batch(self) -> int:
        return max(1, room(self.device, MEMORY_BYTES) // max(backward_bytes(block.nodes) for block in self.blocks))

    def _choose(self, calib: CalibSet) -> tuple[CalibSet, np.ndarray]:
        """As many rows as the disk may hold, evenly spread, whole batches of them; the numbers of those held out."""
        count = min(len(calib), DISK_BYTES // max(1, 2 * 4 * self._widest())) // self.batch * self.batch
        chosen = calib.take(np.linspace(0, len(calib) - 1, count).astype(int))
        names, ranks = np.unique(chosen.pictures, return_inverse=True)
        if len(names) < FEW_PICTURES or count < HELD_OUT:
            return chosen, np.arange(HELD_OUT - 1, count, HELD_OUT)
        every = min(HELD_OUT, len(names))
        return chosen, np.flatnonzero(ranks % every == every - 1)

    def _widest(self) -> int:
        """The most values per row that are kept at a time."""
        values = {out.name: out for node in self.model.graph for out in node.outputs}
        kept = {value.name: row_values(value) for value in self.model.graph.inputs}
        widest = 0
        for unit in self.units:
            outputs = unit.outputs if isinstance(unit, _Passage) else (unit.output,)
            kept |= {name: row_values(values[name]) for name in outputs}
            widest = max(widest, sum(kept.values()))
            for name in self._last_use[unit]:
                kept.pop(name, None)
        return widest

    def _macs(self, name: str) -> int:
        (node,) = self.model.graph.initializers[name].consumers()
        return row_macs(self.plan[name].shape, self.plan[name].out_axis, node.outputs[0])


def _finite(error: float) -> float | None:
    """None for what JSON has no number for: the error of a block that puts out nothing but zeros, or diverged."""
    return error if math.isfinite(error) else None


def _fixed_batch(model: ir.Model, inputs: Inputs) -> int | None:
    """Rows that the graph takes at a time, None for any number. Raises: ExportError for a single timestep for all."""
    given = {value.name: value for value in model.graph.inputs}
    if single := [name for name, value in given.items() if not len(value.shape)]:
        raise ExportError(
            f"reconstruction: input {single[0]} is a single number for all rows, expected one for each. "
            "Use --recon off."
        )
    size = given[inputs.sample].shape[0]
    return size if isinstance(size, int) else None


def _write(file: Path, outcome: Outcome, found: Settled) -> None:
    facts = np.array([outcome.error_before, outcome.error_after, outcome.iterations])
    integers = {f"q {name}": array for name, array in found.integers.items()}
    steps = {f"s {edge}": np.array(step) for edge, step in found.steps.items()}
    save_npz(file, {"outcome": facts, **integers, **steps})


def _read(file: Path) -> tuple[Outcome, Settled]:
    arrays = load_npz(file)
    before, after, iterations = arrays.pop("outcome").tolist()
    integers = {name[2:]: array for name, array in arrays.items() if name.startswith("q ")}
    steps = {name[2:]: float(array) for name, array in arrays.items() if name.startswith("s ")}
    return Outcome(before, after, int(iterations)), Settled(integers, steps)
