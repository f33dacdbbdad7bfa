"""Decide on the calibration prompts whether the layers that read the text stay float, for their first token's sake."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qncd_deploy.calib.trajectories import CalibSet
from qncd_deploy.export.passes.common import constant
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import spread_rows
from qncd_deploy.quant.decide import decide, is_included
from qncd_deploy.quant.first_token import FirstToken, first_token
from qncd_deploy.quant.plan import Choice, LayerSite
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.smooth import Reader

PROMPTS = 16
"""Different prompts that are looked at, half of them for ranges and half to be judged on: ranges of as many tokens are
known well, and the layers need to be run no oftener."""


@dataclass(frozen=True)
class FirstTokens:
    """found: what was measured, by graph input;  exceptions: layers that stay float for it, see make_plan."""

    found: Mapping[str, FirstToken] = field(default_factory=dict)
    exceptions: Mapping[str, Choice] = field(default_factory=dict)

    def without(self, network: FloatNetwork) -> FloatNetwork:
        """The network as what follows shall see it: layers that stay float are no layers to quantize."""
        return replace(network, sites=tuple(site for site in network.sites if site.name not in self.exceptions))

    def to_json(self) -> dict[str, Any]:
        return {
            "kept_float": len(self.exceptions),
            "inputs": {
                name: {
                    "times": each.times,
                    "error_first": each.error_first,
                    "error_others": each.error_others,
                    "error_apart": each.error_apart,
                    "kept_float": each.pays,
                }
                for name, each in self.found.items()
            },
        }


def find_first_tokens(network: FloatNetwork, calib: CalibSet, options: ExportOptions, policy: Policy) -> FirstTokens:
    """Measure the first token of every sequence that layers to be quantized read; a network with none, or with one
    token of a class, has nothing to measure. --include overrules.
    """
    if options.first_token == "off":
        return FirstTokens()
    found, exceptions = {}, {}
    for name, sites in _readers(network, policy).items():
        rows = _different(calib, name)
        if not len(rows):
            continue
        fit, held_out = rows[::2], rows[1::2] if len(rows) > 1 else rows
        found[name] = first_token(name, _weighted(network, sites), fit=fit, held_out=held_out, policy=policy)
        if found[name].pays:
            exceptions |= {site.name: Choice(None, found[name].line(name)) for site in sites}
    return FirstTokens(found, exceptions)


def _readers(network: FloatNetwork, policy: Policy) -> dict[str, list[LayerSite]]:
    """By sequence of several tokens, the layers that would read its very rows quantized, unless asked for by name."""
    sequences = {v.name: v for v in network.model.graph.inputs if v.name in network.inputs.conditions and _tokens(v)}
    values = {out.name: out for node in network.model.graph for out in node.outputs} | sequences
    readers: dict[str, list[LayerSite]] = {}
    for site in network.sites:
        source = _unshaped(values.get(site.input))
        if source in sequences.values() and decide(site, policy)[0] and not is_included(site, policy):
            readers.setdefault(source.name, []).append(site)
    return readers


def _tokens(value: ir.Value) -> bool:
    """(N, L, D) with L > 1, or not known."""
    return value.shape is not None and len(value.shape) == 3 and value.shape[1] != 1


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """What a tensor holds the rows of: reshaped to two axes before a Gemm, their last one stays as it was."""
    while value is not None and (node := value.producer()) is not None:
        before = node.inputs[0] if node.op_type in ("Reshape", "Identity") else None
        if before is None or before.shape is None or value.shape is None or before.shape[-1] != value.shape[-1]:
            return value
        value = before
    return value


def _different(calib: CalibSet, name: str) -> np.ndarray:
    """Up to PROMPTS different rows of the text, evenly over the set, which holds each prompt many times. None that is
    zero behind the first token, as the empty prompt of some models is.
    """
    rows = calib.arrays[name]
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(hashlib.sha256(np.ascontiguousarray(row)).digest(), number)
    spoken = np.array([number for number in first.values() if rows[number, 1:].any()], int)
    return spread_rows(calib.take(spoken), PROMPTS).arrays[name] if len(spoken) else rows[:0]


def _weighted(network: FloatNetwork, sites: Sequence[LayerSite]) -> Iterator[Reader]:
    """One weight in memory at a time."""
    return (Reader(site, constant(network.model.graph.initializers[site.name])) for site in sites)
