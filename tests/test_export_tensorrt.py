"""Every exported TensorRT sibling is a TensorRT graph: it builds without a GPU, with the INT8 kernels the plan says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DModel
from export_helpers import Arrays, feeds_for, minmax_plan, randomize, relative_rms, run, run_torch, saved, traced
from skip_network import MAIN, SHORTCUT, skip_feeds, skip_network

from qncd_deploy.engines.trt.build import BuiltEngine, build
from qncd_deploy.engines.trt.kernels import KernelTable
from qncd_deploy.engines.trt.library import Library, open_library
from qncd_deploy.engines.trt.options import BuildOptions
from qncd_deploy.export.graph import find_sites
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.shift import ShiftZeroPoints
from qncd_deploy.export.passes.sizes import at_size
from qncd_deploy.export.passes.smooth import FoldSmoothing
from qncd_deploy.export.passes.split import SplitShortcuts
from qncd_deploy.export.resblocks import find_resblocks
from qncd_deploy.export.trace import trace
from qncd_deploy.export.verify import TENSORRT, verify
from qncd_deploy.quant.plan import QuantPlan
from qncd_deploy.specs import SIDES, TensorSpec

pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")

DEMO = Path(__file__).parents[1] / "calib_data/fashion-ldm"
TARGETS = ("sm86", "sm89", "sm120")


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("tensorrt-rtx")


def build_half(library: Library, model: ir.Model, folder: Path, *, rows: int = 2) -> BuiltEngine:
    HalfRemainder()(model)
    saved({"unet-trt.onnx": model}, folder)
    shapes = {value.name: tuple(n if isinstance(n, int) else rows for n in value.shape) for value in model.graph.inputs}
    return build(library, folder / "unet-trt.onnx", BuildOptions((shapes,), TARGETS))


def build_sibling(library: Library, model: ir.Model, plan: QuantPlan, folder: Path) -> BuiltEngine:
    InsertQDQ(plan)(model)
    ShiftZeroPoints()(model)
    built = build_half(library, model, folder)
    verify(model, TENSORRT, plan=plan)
    return built


def counts(table: KernelTable, op: str) -> Counter[str]:
    return Counter({kernel.precision: kernel.count for kernel in table.kernels if kernel.op == op})


def assert_kernels_are_the_plans(built: BuiltEngine, plan: QuantPlan) -> None:
    table = built.table
    planned = [product.layer for product in built.demands.products if product.planned]
    assert sorted(planned) == sorted(layer.name for layer in plan.quantized)
    assert table.planned == len(planned) and table.missed == ()
    convolutions = sum(layer.op == "Conv" for layer in plan.quantized)
    assert counts(table, "Convolution") == {"i8": convolutions, "f16": sum(p.op == "Conv" for p in plan) - convolutions}
    # Linears that read one edge are merged into one kernel
    assert counts(table, "MatMul")["i8"] >= len({p.input for p in plan.quantized if p.op != "Conv"})
    assert table.float_products == ()


@pytest.mark.parametrize(
    ("kind", "bits", "zero_points"),
    [("additive", (8, 8), False), ("scale-shift", (4, 6), False), ("scale-shift", (4, 8), True)],
)
def test_small_networks_build(kind, bits, zero_points, library, tmp_path):
    _, specs, model = traced(kind)
    feeds = feeds_for(specs, 2)
    factors = {block.conv2: abs(block.gamma) + 0.5 for block in find_resblocks(model)}
    FoldSmoothing(factors)(model)
    plan = minmax_plan(
        model, feeds, weight_bits=bits[0], act_bits=bits[1], asymmetric=True, eight_bits_asymmetric=zero_points
    )
    assert_kernels_are_the_plans(build_sibling(library, model, plan, tmp_path), plan)


def test_one_engine_of_two_sizes_runs_the_plan_in_both(library, tmp_path):
    module, specs, _ = traced("additive")
    sample, *others = specs
    channels, *sides = sample.shape[1:]
    free = [TensorSpec(sample.name, sample.dtype, ("batch", channels, *SIDES)), *others]
    model, rules = at_size(trace(module, free, sides=tuple(sides)), dict(zip(SIDES, sides, strict=True)))
    plan = minmax_plan(model, feeds_for(specs, 2))
    InsertQDQ(plan)(model)
    HalfRemainder()(model)
    saved({"unet-trt.onnx": rules.free(model)}, tmp_path)
    sizes = (sides, [sides[0], 2 * sides[1]])
    profiles = tuple(
        {spec.name: (2, channels, *size) if spec is sample else (2, *spec.shape[1:]) for spec in specs}
        for size in sizes
    )
    built = build(library, tmp_path / "unet-trt.onnx", BuildOptions(profiles, TARGETS))
    assert sorted(p.layer for p in built.demands.products if p.planned) == sorted(each.name for each in plan.quantized)
    assert built.table.planned == len(plan.quantized) and built.table.missed == () == built.table.float_products


def test_a_split_convolution_is_two_integer_kernels(library, tmp_path):
    model = skip_network(loudness=30)
    whole = minmax_plan(model, skip_feeds(2))
    SplitShortcuts([MAIN, SHORTCUT])(model)
    plan = minmax_plan(model, skip_feeds(2))
    assert len(plan.quantized) == len(whole.quantized) + 2
    assert_kernels_are_the_plans(build_sibling(library, model, plan, tmp_path), plan)


def test_a_float16_twin_multiplies_no_float32(library, tmp_path):
    _, _, model = traced("additive")
    table = build_half(library, model, tmp_path).table
    assert table.planned == 0 and table.float_products == () and table.integer_kernels == 0
    assert set(counts(table, "Convolution")) == set(counts(table, "MatMul")) == {"f16"}


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


def test_demo_builds(demo, library, tmp_path):
    """W8A8, and the float16 twin beside it: the same attentions stay in one kernel."""
    _, model, feeds = demo
    plan = minmax_plan(model, feeds)
    int8 = build_sibling(library, model.clone(), plan, tmp_path)
    assert_kernels_are_the_plans(int8, plan)
    half = build_half(library, model.clone(), tmp_path / "half")
    assert half.table.float_products == () and half.table.attentions == int8.table.attentions > 0
    assert half.table.fused == int8.table.fused > 0


@pytest.mark.slow
def test_a_network_of_sixteen_million_weights_builds(library, tmp_path):
    """64x64, 15.7 M weights; its heads of 8 channels are too narrow for a fused attention."""
    module = UNet2DModel(
        sample_size=64,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    specs = [TensorSpec("sample", "float32", ("batch", 3, 64, 64)), TensorSpec("timestep", "float32", ("batch",))]
    model = trace(randomize(module), specs)
    plan = minmax_plan(model, feeds_for(specs, 1))
    int8 = build_sibling(library, model.clone(), plan, tmp_path)
    assert_kernels_are_the_plans(int8, plan)
    assert build(library, tmp_path / "unet-trt.onnx", int8.options).plan == int8.plan
    half = build_half(library, model, tmp_path / "half").table
    assert half.float_products == () and set(counts(half, "Convolution")) == {"f16"}
