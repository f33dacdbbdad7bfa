"""A network traced with free sizes: fixed, it is the network traced at that size; freed again, it is torch's at any."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("diffusers", reason="exporting needs diffusers")
ir = pytest.importorskip("onnx_ir", reason="exporting needs onnx-ir")
onnxruntime = pytest.importorskip("onnxruntime", reason="graphs are run with ONNX Runtime")

import onnx  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from export_helpers import feeds_for, minmax_plan, run  # noqa: E402

from qncd_deploy.errors import ExportError  # noqa: E402
from qncd_deploy.export.passes.insert_qdq import InsertQDQ  # noqa: E402
from qncd_deploy.export.passes.ort_sibling import OrtSibling  # noqa: E402
from qncd_deploy.export.passes.sizes import SizeRules, at_size  # noqa: E402
from qncd_deploy.export.trace import trace  # noqa: E402
from qncd_deploy.specs import SIDES, TensorSpec  # noqa: E402

SIZE = dict(zip(SIDES, (8, 8), strict=True))


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def specs(*sides: int | str) -> list[TensorSpec]:
    return [
        TensorSpec("sample", "float32", ("batch", 4, *sides)),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 5, 8)),
    ]


@pytest.fixture(scope="module")
def fixed(unet: torch.nn.Module) -> tuple[ir.Model, SizeRules]:
    return at_size(trace(unet, specs(*SIDES), sides=(8, 8)), SIZE)


def test_at_one_size_it_is_the_network_traced_there(unet: torch.nn.Module, fixed: tuple[ir.Model, SizeRules]) -> None:
    model, rules = fixed
    traced = trace(unet, specs(8, 8))
    assert Counter(node.op_type for node in model.graph) == Counter(node.op_type for node in traced.graph)
    for one, other in ((model.graph.inputs, traced.graph.inputs), (model.graph.outputs, traced.graph.outputs)):
        assert [(value.name, value.shape) for value in one] == [(value.name, value.shape) for value in other]
    assert "Shape" not in {node.op_type for node in model.graph} and rules.targets
    shapes = {node.outputs[0].name: node.outputs[0].shape for node in traced.graph}
    both = [node.outputs[0] for node in model.graph if node.outputs[0].name in shapes]
    both = [value for value in both if not value.name.startswith("val_")]  # which torch counts up
    assert len(both) > 100 and all(value.shape == shapes[value.name] for value in both)


@pytest.mark.parametrize("sides", [(8, 8), (8, 16), (14, 6), (2, 2)])
def test_free_again_it_is_torchs_at_any_size(
    unet: torch.nn.Module, fixed: tuple[ir.Model, SizeRules], tmp_path: Path, sides: tuple[int, int]
) -> None:
    model, rules = fixed
    free = rules.free(model.clone())
    assert list(free.graph.inputs[0].shape) == ["batch", 4, *SIDES] and free.graph.outputs[0].shape[0] == "batch"
    ir.save(free, tmp_path / "free.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "free.onnx")
    given = torch.randn(3, 4, *sides), torch.tensor([999.0, 500.0, 1.0]), torch.randn(3, 5, 8)
    with torch.no_grad():
        wanted = unet(*given).sample.numpy()
    names = [spec.name for spec in specs(*SIDES)]
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
    # Sums of float32 in another order, on their way through some 40 layers.
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_the_fixed_graph_is_left_as_it_is(fixed: tuple[ir.Model, SizeRules]) -> None:
    model, rules = fixed
    before = [(node.name, [value.name for value in node.inputs if value is not None]) for node in model.graph]
    rules.free(model.clone())
    assert before == [(node.name, [value.name for value in node.inputs if value is not None]) for node in model.graph]


def test_a_tensor_whose_size_is_asked_for_must_be_there(fixed: tuple[ir.Model, SizeRules]) -> None:
    model, rules = fixed[0].clone(), fixed[1]
    fed = {value.name for value in model.graph.inputs}
    asked = next(rule.inputs[0] for rule in rules.nodes if rule.op == "Shape" and rule.inputs[0] not in fed)
    for node in model.graph:
        for output in node.outputs:
            if output.name == asked:
                output.name = "elsewhere"
    with pytest.raises(ExportError, match=rf"{asked} is gone, whose size"):
        rules.free(model)


def test_engines_fuse_as_much_as_at_one_size(
    unet: torch.nn.Module, fixed: tuple[ir.Model, SizeRules], tmp_path: Path
) -> None:
    """A convolution whose float output is read before it is rounded, if only for its size, is computed in float."""
    model, rules = fixed[0].clone(), fixed[1]
    plan = minmax_plan(model, feeds_for(specs(8, 8), 2))
    InsertQDQ(plan)(model)
    OrtSibling(plan)(model)
    found = []
    for number, graph in enumerate((model, rules.free(model.clone()))):
        run(graph, feeds_for(specs(8, 8), 2), fused=tmp_path / f"{number}.onnx")
        fused = onnx.load(tmp_path / f"{number}.onnx", load_external_data=False)
        found.append(Counter(node.op_type for node in fused.graph.node))
    integer = ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QuantizeLinear")
    assert [{op: ops[op] for op in integer} for ops in found[1:]] == [{op: found[0][op] for op in integer}]
    assert found[0]["QLinearConv"] == sum(layer.op == "Conv" for layer in plan.quantized)
