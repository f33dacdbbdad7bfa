"""A network on its way to being quantized: its float graph with the plan for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qncd_deploy.export.passes.common import constant
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.save import unmap
from qncd_deploy.quant.plan import LayerPlan, LayerSite, QuantPlan


@dataclass(frozen=True, eq=False)
class Draft:
    """A float graph in the form that is to be quantized, and the plan for it."""

    model: ir.Model
    plan: QuantPlan

    def same_layer(self, site: LayerSite, weight: np.ndarray) -> LayerPlan | None:
        """The plan of this layer, if it is here with the same weight between the same edges."""
        if site.name not in self.plan:
            return None
        layer, own = self.plan[site.name], constant(self.model.graph.initializers[site.name])
        same_edges = (layer.input, layer.output) == (site.input, site.output)
        return layer if same_edges and np.array_equal(own, weight) else None

    def master(self) -> ir.Model:
        """The same graph with the Q/DQ pairs of the plan."""
        master = self.model.clone()
        InsertQDQ(self.plan)(master)
        unmap(self.model)
        return master
