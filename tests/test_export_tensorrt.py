"""Every exported TensorRT sibling is a TensorRT graph: it builds without a GPU, with the INT8 kernels the plan says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from export_helpers import Arrays, feeds_for, minmax_plan, relative_rms, run, run_torch, saved, traced

from qncd_deploy.export.graph import find_sites
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.smooth import FoldSmoothing
from qncd_deploy.export.resblocks import find_resblocks
from qncd_deploy.export.trace import trace
from qncd_deploy.export.verify import TENSORRT, verify
from qncd_deploy.quant.plan import QuantPlan

pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
import rtx_build

DEMO = Path(__file__).parents[1] / "calib_data/fashion-ldm"


def build_sibling(model: ir.Model, plan: QuantPlan, folder: Path) -> rtx_build.Build:
    InsertQDQ(plan)(model)
    HalfRemainder()(model)
    verify(model, TENSORRT, plan=plan)
    saved({"unet-trt.onnx": model}, folder)
    shapes = {}
    for value in model.graph.inputs:
        fixed = tuple(dim for dim in value.shape if isinstance(dim, int))
        shapes[value.name] = ((1, *fixed), (2, *fixed), (8, *fixed))
    return rtx_build.build(folder / "unet-trt.onnx", shapes)


def assert_kernels_are_the_plans(build: rtx_build.Build, plan: QuantPlan) -> None:
    convolutions = Counter(build.convolutions)
    planned = sum(layer.op == "Conv" for layer in plan.quantized)
    assert convolutions == {("Int8", "Int8"): planned, ("Half", "Half"): sum(p.op == "Conv" for p in plan) - planned}
    # Linears that read one edge are merged into one kernel, and attention may keep its probabilities in float32 between
    # its own two products; what must not be is a product of float32 tensors
    matmuls = Counter(build.matmuls)
    assert matmuls[("Int8", "Int8")] >= len({p.input for p in plan.quantized if p.op != "Conv"})
    assert ("Float", "Float") not in matmuls


@pytest.mark.parametrize(("kind", "bits"), [("additive", (8, 8)), ("scale-shift", (4, 6))])
def test_small_networks_build(kind, bits, tmp_path):
    _, specs, model = traced(kind)
    feeds = feeds_for(specs, 2)
    factors = {block.conv2: abs(block.gamma) + 0.5 for block in find_resblocks(model)}
    FoldSmoothing(factors)(model)
    plan = minmax_plan(model, feeds, weight_bits=bits[0], act_bits=bits[1])
    assert_kernels_are_the_plans(build_sibling(model, plan, tmp_path), plan)


@pytest.fixture(scope="session")
def demo() -> tuple[object, ir.Model, Arrays]:
    load = pytest.importorskip("qncd_deploy.models.load", reason="checkpoints cannot be read yet")
    if not (DEMO / "model.ckpt").exists():
        pytest.skip("the demo checkpoint is not there")
    source = load.load_source(DEMO / "model.ckpt", config=None, null_class=None)
    feeds = feeds_for(list(source.input_specs), 2)
    return source, trace(source.unet, source.input_specs), feeds


def test_demo_graph_equals_its_module(demo):
    source, model, feeds = demo
    expected = run_torch(source.unet, feeds)
    assert relative_rms(run(model, feeds)["out"], expected) < 1e-5
    weighted = [m for m in source.unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(find_sites(model)) == len(weighted)
    assert len(find_resblocks(model)) == sum(type(m).__name__ == "ResnetBlock2D" for m in source.unet.modules())


def test_demo_builds(demo, tmp_path):
    _, model, feeds = demo
    plan = minmax_plan(model, feeds)
    assert_kernels_are_the_plans(build_sibling(model.clone(), plan, tmp_path), plan)
