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
from qncd_deploy.errors import CalibrationError
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
"""One row in so many only tells whether learning helped."""


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
    rows: Mapping[str, np.ndarray],
    *,
    preset: Preset,
    seed: int,
    work: Path,
    scratch: Path,
    resume: bool = True,
    tick: Callable[[int, int], None],
) -> Reconstruction:
    """Learn the rounding of every planned weight.

    model: the float graph that the plan is of. rows: calibration inputs by graph input, equal first axes. work: where
    finished blocks are kept, by everything that decides them; scratch: for tensors. tick: blocks done, blocks in all.

    Raises: CalibrationError if there are too few rows for a batch and one to judge by; ExportError for operators that
    torch has no function for.
    """
    blocks = find_blocks(model, inputs, {layer.name for layer in plan.quantized})
    walk = _Walk(model, inputs, plan, blocks, rows, preset, scratch)
    folder = work / walk.key(seed)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    outcomes: dict[str, Outcome] = {}
    weights: dict[str, np.ndarray] = {}
    steps: dict[str, float] = {}
    for node in model.graph:
        if node not in walk.inside:
            walk.pass_through(node)
        elif (block := walk.ends.get(node)) is not None:
            outcome, found = walk.advance(block, folder / f"{len(outcomes):04}.npz", seed)
            outcomes[block.layers[0]] = outcome
            if outcome.kept:
                weights |= {name: dequantize(q, plan[name].weight_grid) for name, q in found.integers.items()}
                steps |= found.steps
            tick(len(outcomes), len(blocks))
        walk.forget(node)
    return Reconstruction(preset, outcomes, weights, steps)


class _Walk:
    """Both copies of the network, and where they have got to."""

    def __init__(
        self,
        model: ir.Model,
        inputs: Inputs,
        plan: QuantPlan,
        blocks: Sequence[Block],
        rows: Mapping[str, np.ndarray],
        preset: Preset,
        scratch: Path,
    ) -> None:
        self.model, self.plan, self.blocks = model, plan, blocks
        self.inside = {node for block in blocks for node in block.nodes}
        self.ends = {block.nodes[-1]: block for block in blocks}
        self._turn = {node: block.nodes[-1] for block in blocks for node in block.nodes}
        self._varies = Flow(model, inputs).sources
        self._last_use = self._last_uses()
        given, size = len(next(iter(rows.values()))), model.graph.inputs[0].shape[0]
        free = max(1, min(preset.batch, self._largest_batch(), given // HELD_OUT))
        self.batch = size if isinstance(size, int) else free
        self.preset = replace(preset, batch=self.batch)
        self.rows = self._choose(rows)
        numbers = np.arange(len(next(iter(self.rows.values()))))
        self.held_out = numbers[numbers % HELD_OUT == HELD_OUT - 1]
        self.train = numbers[numbers % HELD_OUT != HELD_OUT - 1]
        if len(self.held_out) < self.batch:
            raise CalibrationError(
                f"reconstruction: {len(numbers)} calibration rows, expected at least {HELD_OUT * self.batch} for "
                f"batches of {self.batch}. Raise --calib-size or --calib-steps, or use --recon off."
            )
        self.float_, self.quantized = Frontier(scratch / "float"), Frontier(scratch / "quantized")
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
        digest.update(str(torch.get_num_threads()).encode())
        for name, value in sorted(self.model.graph.initializers.items()):
            digest.update(name.encode() + value.const_value.tobytes())
        for name, array in sorted(self.rows.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def pass_through(self, node: ir.Node) -> None:
        """Run a node outside every block."""
        segment, names = Segment([node]), tuple(out.name for out in node.outputs)
        inputs = tuple(v.name for v in node.inputs if v is not None and not v.is_initializer())
        for frontier in (self.float_, self.quantized):
            if not self._varies.get(node.outputs[0]):  # a shape at most, and batches are all of one size
                for name, value in segment(frontier.rows(inputs, slice(0, self.batch)), names).items():
                    frontier.keep(name, value)
                continue
            self._fill(frontier, inputs, names, lambda feeds: segment(feeds, names))

    def advance(self, block: Block, file: Path, seed: int) -> tuple[Outcome, Settled]:
        """Learn a block, or read what was learned of it before, and take both copies past it."""
        layers = {name: self.plan[name] for name in block.layers}
        quantized = QuantizedBlock(block, layers, self.preset.rounding, self._shared)
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

    def forget(self, node: ir.Node) -> None:
        """Drop what nothing after this node reads."""
        for name in self._last_use.get(node, ()):
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
                    fillers[name].add(value)

    def _last_uses(self) -> dict[ir.Node, list[str]]:
        """What can be forgotten after each node; a block reads all it needs when its last node's turn comes."""
        place = {node: number for number, node in enumerate(self.model.graph)}
        last: dict[str, ir.Node] = {}
        for node in self.model.graph:
            turn = self._turn.get(node, node)
            for value in node.inputs:
                if value is not None and (value.name not in last or place[turn] > place[last[value.name]]):
                    last[value.name] = turn
        ended: dict[ir.Node, list[str]] = {}
        for name, node in last.items():
            ended.setdefault(node, []).append(name)
        return ended

    def _largest_batch(self) -> int:
        return max(1, MEMORY_BYTES // max(backward_bytes(block.nodes) for block in self.blocks))

    def _choose(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As many rows as the disk may hold, evenly spread, whole batches of them."""
        given = len(next(iter(rows.values())))
        count = min(given, DISK_BYTES // max(1, 2 * 4 * self._widest())) // self.batch * self.batch
        picked = np.linspace(0, given - 1, count).astype(int)
        return {name: array[picked] for name, array in rows.items()}

    def _widest(self) -> int:
        """The most values per row that are kept at a time."""
        kept = {value.name: row_values(value) for value in self.model.graph.inputs}
        widest = 0
        for node in self.model.graph:
            if node not in self.inside or node in self.ends:
                outputs = node.outputs if node not in self.ends else node.outputs[:1]
                kept |= {out.name: row_values(out) for out in outputs}
            widest = max(widest, sum(kept.values()))
            for name in self._last_use.get(node, ()):
                kept.pop(name, None)
        return widest

    def _macs(self, name: str) -> int:
        (node,) = self.model.graph.initializers[name].consumers()
        return row_macs(self.plan[name].shape, self.plan[name].out_axis, node.outputs[0])


def _finite(error: float) -> float | None:
    """None for what JSON has no number for: the error of a block that puts out nothing but zeros, or diverged."""
    return error if math.isfinite(error) else None


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
