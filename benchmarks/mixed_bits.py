"""Which layers of the demo get 8-bit weights: the predicted noise of each layer against the measured one, and the
choice that follows from it against simpler ones.

    python benchmarks/mixed_bits.py --out benchmarks/results/mixed-bits.md

Every row of the second table spends the same budget on the same layers. Errors are of the network's output, relative to
its power, on calibration rows; ranges are learned from all of them, so that rows differ from those of the backward pass
but not from those of calibration. No smoothing, no layer kept in float, rounding to nearest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from scipy.stats import spearmanr

from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.calib.parts import Parts, spread
from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.save import save_siblings
from qncd_deploy.pipeline.calibrate import calibration_set, counted, probing
from qncd_deploy.pipeline.network import FloatNetwork, read_network
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import output_errors
from qncd_deploy.pipeline.quantize import policy_of
from qncd_deploy.pipeline.sensitivity import edge_costs, unmeasured, weight_noise
from qncd_deploy.quant.budget import EdgeCost
from qncd_deploy.quant.decide import decide, make_plan
from qncd_deploy.quant.grid import fake_quantize
from qncd_deploy.quant.mixed import BitBudget, assign
from qncd_deploy.quant.plan import Choice, LayerSite
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.ranges import sqnr_db

ROWS = 64
"""Rows of the calibration set on which errors are measured, none of them seen by the backward pass."""


@dataclass(frozen=True, eq=False)
class Case:
    """A float network with all that a plan for it needs."""

    network: FloatNetwork
    policy: Policy
    stats: Mapping[str, TensorStats]
    sites: Sequence[LayerSite]
    edges: Sequence[EdgeCost]
    noise: Mapping[str, Mapping[int, float]]
    rows: CalibSet
    scratch: Path

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return {s.name: constant(self.network.model.graph.initializers[s.name]) for s in self.network.sites}

    def errors(self, choices: Sequence[Mapping[str, Choice]], *, float_inputs: bool = False) -> list[float]:
        """Measured relative error of the output for each choice of bits; float_inputs: of rounded weights alone."""
        forms = []
        for exceptions in choices:
            plan = make_plan(self.network.sites, self.weights, self.stats, self.policy, exceptions=exceptions)
            model = self.network.model.clone()
            if float_inputs:
                for layer in plan.quantized:
                    rounded = fake_quantize(self.weights[layer.name], layer.weight_grid)
                    model.graph.initializers[layer.name].const_value = ir.tensor(rounded, name=layer.name)
                forms.append((model, None))
            else:
                InsertQDQ(plan)(model)
                forms.append((model, plan))
        found = output_errors(self.network.model, forms, self.network.facts.inputs, self.rows, self.scratch)
        return [error.relative for error in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("calib_data/fashion-ldm/model.ckpt"))
    parser.add_argument("--format", default="w4a8")
    parser.add_argument("--budgets", default="5,6")
    parser.add_argument("--layers", type=int, default=24, help="Layers that are tried one at a time.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixed-bits.md"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        case, seconds = _case(ExportOptions(given.checkpoint, format=given.format), Path(scratch))
        lines = [
            f"# Mixed weight bits on the demo, {given.format.upper()}",
            "",
            f"`python benchmarks/mixed_bits.py --format {given.format} --budgets {given.budgets} --layers "
            f"{given.layers}`; {len(case.sites)} layers, errors on {len(case.rows)} rows; searching the ranges of all "
            f"weights at 4 and 8 bits and the backward pass over them: {seconds:.0f} s of one core.",
            "",
        ]
        for part in (_predictions(case, given.layers), _contest(case, [float(b) for b in given.budgets.split(",")])):
            lines += [*part, ""]
            given.out.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    print("\n".join(lines[:-1]))


def _case(options: ExportOptions, scratch: Path) -> tuple[Case, float]:
    network, policy = read_network(options), policy_of(options)
    graph = scratch / "float.onnx"
    save_siblings({graph.name: network.model}, scratch)
    options = replace(options, calib_dir=scratch)
    calib = calibration_set(network, options, graph, "mixed-bits", lambda done, total: None)
    sites = [site for site in network.sites if decide(site, policy)[0]]
    edges = list(dict.fromkeys(site.input for site in sites))
    with probing(network.model, scratch) as probe:
        stats = observe(probe, counted(network, calib, lambda done, total: None), edges)
    costs = edge_costs(network.model, network, sites, calib, stats, policy, scratch)
    started = time.process_time()
    noise = weight_noise(network.model, network, sites, calib, policy, scratch)
    seconds = time.process_time() - started
    rows = calib.take(spread(Parts.of(calib).unseen, ROWS))
    return Case(network, policy, stats, sites, costs, noise, rows, scratch), seconds


def _predictions(case: Case, count: int) -> Iterator[str]:
    """One layer at a time: its weight alone rounded to 4 bits."""
    names = sorted(case.noise, key=lambda name: case.noise[name][4])
    heard = [name for name in names if case.noise[name][4]]  # attention over one token listens to no query and no key
    tried = [heard[i] for i in np.unique(np.linspace(0, len(heard) - 1, count).astype(int))]
    alone = [{other: Choice(None, "") for other in names if other != name} for name in tried]
    *measured, together = case.errors([*alone, {}], float_inputs=True)
    predicted = np.array([case.noise[name][4] for name in tried])
    whole = sum(noise[4] for noise in case.noise.values())
    ratio = predicted / np.array(measured)
    yield f"One weight at a time at 4 bits, {len(tried)} of {len(heard)} that matter, the quietest to the loudest:"
    yield ""
    yield "| rank correlation | predicted / measured: median | least | largest | all together: predicted, measured |"
    yield "|---|---|---|---|---|"
    rank = spearmanr(predicted, measured).statistic
    yield (
        f"| {rank:.3f} | {np.median(ratio):.2f} | {ratio.min():.2f} | {ratio.max():.2f} | {whole:.4f}, {together:.4f} |"
    )


def _contest(case: Case, budgets: Sequence[float]) -> Iterator[str]:
    noise = {name: each[4] for name, each in case.noise.items()}
    weights = case.weights
    lost = {
        site.name: -sqnr_db(weights[site.name], fake_quantize(weights[site.name], _grid(case, site)))
        for site in case.sites
    }
    size = {site.name: weights[site.name].size for site in case.sites}
    rng = np.random.default_rng(0)
    ways = {
        "largest layers first": [size],
        "smallest layers first": [{name: -n for name, n in size.items()}],
        "lowest SQNR of the weight first": [lost],
        "loudest first": [noise],
        "random (mean of 3)": [{name: rng.random() for name in size} for _ in range(3)],
    }
    rows: list[tuple[str, str, list[Mapping[str, Choice]]]] = [
        ("4", "none", [{}]),
        ("8", "all", [dict.fromkeys(size, Choice(8, ""))]),
    ]
    guessed = unmeasured(case.network.model, case.sites, case.stats, case.policy)
    for average in budgets:
        found = assign(case.sites, case.edges, case.noise, BitBudget(average=average), float_share=0)
        rows.append((f"{average:g}", "**the solver's choice**", [found.choices]))
        blind = assign(case.sites, *guessed, BitBudget(average=average), float_share=0)
        rows.append((f"{average:g}", "without a backward pass", [blind.choices]))
        for name, orders in ways.items():
            rows.append((f"{average:g}", name, [_filled(order, size, average) for order in orders]))
    measured = iter(case.errors([choices for *_, several in rows for choices in several]))
    yield "| bits a weight | 8 bits go to | output error | predicted | SQNR dB |"
    yield "|---|---|---|---|---|"
    for bits, name, several in rows:
        error = float(np.mean([next(measured) for _ in several]))
        predicted = float(np.mean([_predicted(case, choices) for choices in several]))
        yield f"| {bits} | {name} | {error:.5f} | {predicted:.5f} | {-10 * np.log10(error):.2f} |"


def _grid(case: Case, site: LayerSite):
    return case.policy.weight_grid(case.weights[site.name], site.out_axis)


def _filled(order: Mapping[str, float], size: Mapping[str, int], average: float) -> dict[str, Choice]:
    """8 bits for one layer after the other, the largest value first, wherever the budget allows it."""
    left = (average - 4) * sum(size.values())
    chosen = {}
    for name in sorted(order, key=order.__getitem__, reverse=True):
        if 4 * size[name] <= left:
            left -= 4 * size[name]
            chosen[name] = Choice(8, "")
    return chosen


def _predicted(case: Case, choices: Mapping[str, Choice]) -> float:
    widths = {site.name: 4 for site in case.sites} | {name: choice.weight_bits for name, choice in choices.items()}
    return sum(edge.noise for edge in case.edges) + sum(case.noise[name][width] for name, width in widths.items())


if __name__ == "__main__":
    main()
