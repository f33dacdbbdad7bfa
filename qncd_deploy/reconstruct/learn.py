"""Learn the rounding of one block's weights and the steps of its activations from what the block should put out.

    min over roundings and steps of  mean over batch and space of sum over channels (y_q - y)^2

y: the float network's output of the block; y_q: the block, quantized, fed by the network quantized so far (BRECQ, Li
et al., arXiv:2102.05426, as Q-Diffusion uses it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qncd_deploy.engines.torch_place import CPU
from qncd_deploy.export.blocks import Block
from qncd_deploy.export.passes.common import constant
from qncd_deploy.quant.plan import LayerPlan, float32_text
from qncd_deploy.quant.rounding import KINDS, Kind, LearnedStep, Rounding
from qncd_deploy.reconstruct.preset import CHECKS, PASSES, Preset
from qncd_deploy.reconstruct.segment import Operands, Segment

Rows = Callable[[np.ndarray], "tuple[dict[str, Tensor], Tensor]"]
"""Numbers of calibration rows -> the quantized network's tensors that enter the block, the float block's output."""


@dataclass(frozen=True)
class Outcome:
    """Relative output error of a block on held-out rows, sum |y_q - y|^2 / sum |y|^2, with every weight at its nearest
    level and as learned, and the iterations it took.
    """

    error_before: float
    error_after: float
    iterations: int

    @property
    def kept(self) -> bool:
        """Learning helped; else every weight stays at its nearest level."""
        return self.error_after < self.error_before


@dataclass(frozen=True, eq=False)
class Settled:
    """What a block ends with: integers by weight name, int8 in the shape of the weight; step sizes by edge."""

    integers: Mapping[str, np.ndarray]
    steps: Mapping[str, float]


class QuantizedBlock:
    """A block whose planned layers are computed with quantized operands that can be learned.

    layers: of the plan, by weight name. fixed: edges whose step is not to be learned, as others read them too. device:
    where it is computed and learned.
    """

    def __init__(
        self,
        block: Block,
        layers: Mapping[str, LayerPlan],
        kind: Kind,
        fixed: Set[str] = frozenset(),
        device: torch.device = CPU,
    ) -> None:
        self.output = block.output
        self._segment = Segment(block.nodes, device)
        self._readers = {
            node: node.inputs[1].name
            for node in block.nodes
            if len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].name in block.layers
        }
        self.roundings: dict[str, Rounding] = {}
        self.steps: dict[str, LearnedStep] = {}
        for node, name in self._readers.items():
            edge = node.inputs[0].name
            weight = constant(node.inputs[1])
            self.roundings[name] = KINDS[kind](np.array(weight), layers[name].weight_grid).to(device)
            self.steps.setdefault(edge, LearnedStep(layers[name].act_grid).to(device))
            self.steps[edge].step.requires_grad_(edge not in fixed)

    def __call__(self, feeds: Mapping[str, Tensor], *, steps: bool = True) -> Tensor:
        """The output with what has been learned so far, differentiable; without `steps` activations are not rounded."""
        return self._run(feeds, {name: rounding() for name, rounding in self.roundings.items()}, steps=steps)

    def hard(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The same with every weight on its grid, for good; the steps can still be learned."""
        weights = {name: rounding.integers() * rounding.scale for name, rounding in self.roundings.items()}
        return lambda feeds: self._run(feeds, weights)

    def settled(self) -> Settled:
        """What has been learned, as a plan writes it."""
        return Settled(
            {name: rounding.integers().cpu().numpy().astype(np.int8) for name, rounding in self.roundings.items()},
            {edge: float32_text(s.step.item()) for edge, s in self.steps.items() if s.step.requires_grad},
        )

    @torch.no_grad()
    def settle(self, found: Settled) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The block as it ended."""
        for edge, step in found.steps.items():
            self.steps[edge].step.fill_(step)
        weights = {
            name: torch.from_numpy(found.integers[name]).to(rounding.scale.device) * rounding.scale
            for name, rounding in self.roundings.items()
        }
        return lambda feeds: self._run(feeds, weights)

    def float_output(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """What the float block makes of float tensors."""
        return self._segment(feeds, (self.output,))[self.output]

    def state(self) -> list[Tensor]:
        """Copies of all that is learned."""
        return [parameter.detach().clone() for parameter in self._learnable()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._learnable(), state, strict=True):
            parameter.copy_(value)

    def _learnable(self) -> list[Tensor]:
        return [*(each.v for each in self.roundings.values()), *(each.step for each in self.steps.values())]

    def _run(self, feeds: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, steps: bool = True) -> Tensor:
        def operands(node: ir.Node, name: str) -> Operands:
            return lambda x, _: (self.steps[node.inputs[0].name](x) if steps else x, weights[name])

        replaced = {node: operands(node, name) for node, name in self._readers.items()}
        return self._segment(feeds, (self.output,), replaced)[self.output]


def learn(
    block: QuantizedBlock, rows: Rows, *, train: np.ndarray, held_out: np.ndarray, preset: Preset, macs: int, seed: int
) -> Outcome:
    """Learn a block in place; what does not lower the held-out error, or diverges, is taken back.

    train, held_out: numbers of rows, each at least as many as a batch has. macs: multiplications of the block per row.
    """
    nearest, before = block.state(), _held_out_error(block, rows, held_out, preset.batch)
    pick = np.random.default_rng(seed)
    affordable = preset.most_macs / (PASSES * preset.batch * max(macs, 1))
    iterations = max(1, int(min(preset.iterations, affordable)))
    best, least, stale, done = nearest, before, 0, 0
    for done in _weights(block, rows, train, preset, iterations, pick):
        if not preset.patience or done % max(1, iterations // CHECKS):
            continue
        error = _held_out_error(block, rows, held_out, preset.batch)
        best, least, stale = (block.state(), error, 0) if error < least else (best, least, stale + 1)
        if stale >= preset.patience:
            break
    if preset.patience:
        block.restore(best)
    if preset.steps_iterations and _free_steps(block):
        _steps(block, rows, train, preset, pick)
    after = _held_out_error(block, rows, held_out, preset.batch)
    if not after < before:
        block.restore(nearest)
    return Outcome(before, after, done)


def _weights(
    block: QuantizedBlock, rows: Rows, train: np.ndarray, preset: Preset, iterations: int, pick: np.random.Generator
) -> Iterator[int]:
    """Learn roundings, and the steps too if they have no iterations of their own: else the block's activations are not
    rounded yet. Yields the iterations done.
    """
    roundings = list(block.roundings.values())
    groups = [{"params": [each.v for each in roundings], "lr": preset.rate}]
    if not preset.steps_iterations:
        groups += [{"params": [s.step], "lr": preset.steps_rate * s.step.item()} for s in _free_steps(block)]
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, (lambda done: 1 - done / iterations) if preset.decay else (lambda done: 1.0)
    )
    for done in range(iterations):
        feeds, target = rows(pick.choice(train, preset.batch))
        loss = _error(block(feeds, steps=not preset.steps_iterations), target, 2.0)
        if preset.penalty and done >= preset.warm_up * iterations:
            part = (done / iterations - preset.warm_up) / (1 - preset.warm_up)
            loss = loss + preset.penalty * sum(each.penalty(20 - 18 * part) for each in roundings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for each in (*roundings, *_free_steps(block)):
            each.project()
        yield done + 1


def _steps(block: QuantizedBlock, rows: Rows, train: np.ndarray, preset: Preset, pick: np.random.Generator) -> None:
    """Learn step sizes with the weights on their grids."""
    run = block.hard()
    steps = _free_steps(block)
    optimizer = torch.optim.Adam([step.step for step in steps], lr=preset.steps_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, preset.steps_iterations)
    for _ in range(preset.steps_iterations):
        feeds, target = rows(pick.choice(train, preset.batch))
        optimizer.zero_grad()
        _error(run(feeds), target, preset.steps_power).backward()
        optimizer.step()
        schedule.step()
        for step in steps:
            step.project()


def _free_steps(block: QuantizedBlock) -> list[LearnedStep]:
    return [step for step in block.steps.values() if step.step.requires_grad]


def _error(found: Tensor, target: Tensor, power: float) -> Tensor:
    """Mean over batch and space of the sum over channels of |found - target|^power; channels are the second axis of
    four, else the last."""
    axis = 1 if target.dim() == 4 else -1
    return (found - target).abs().pow(power).sum(axis).mean()


def _held_out_error(block: QuantizedBlock, rows: Rows, held_out: np.ndarray, batch: int) -> float:
    run, noise, power = block.hard(), 0.0, 0.0
    for start in range(0, len(held_out) - batch + 1, batch):
        feeds, target = rows(held_out[start : start + batch])
        with torch.no_grad():
            found = run(feeds)
        noise += float((found - target).double().square().sum())
        power += float(target.double().square().sum())
    return noise / power if power and math.isfinite(noise) else math.inf
