"""A network on its way to being quantized: its float graph with the plan for it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.quant.plan import QuantPlan


@dataclass(frozen=True, eq=False)
class Draft:
    """A float graph in the form that is to be quantized, and the plan for it."""

    model: ir.Model
    plan: QuantPlan

    def master(self) -> ir.Model:
        """The same graph with the Q/DQ pairs of the plan."""
        master = self.model.clone()
        InsertQDQ(self.plan)(master)
        return master
