"""Inputs, weighted ops and residual blocks are found by structure, in our graphs and in others'."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import feeds_for, instrument, run, run_torch, traced

from qncd_deploy.errors import ExportError
from qncd_deploy.export.graph import Inputs, find_inputs, find_sites
from qncd_deploy.export.passes.normalise import normalise
from qncd_deploy.export.resblocks import find_resblocks


def graph(text: str, opset: int = 18) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}'))


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_every_weighted_module_is_a_site_with_its_role(kind):
    module, _, model = traced(kind)
    weighted = {
        f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)
    }
    sites = find_sites(model)
    assert {site.name for site in sites} == weighted and len(sites) == len(weighted)
    for site in sites:
        expected = "body"
        if "time_emb" in site.name:
            expected = "time"
        elif site.name.startswith("conv_"):
            expected = {"conv_in.weight": "first", "conv_out.weight": "last"}[site.name]
        assert site.role == expected, site
        assert site.out_axis == (1 if site.op == "MatMul" else 0)


def test_condition_projections_are_noted():
    _, _, model = traced("additive")
    noted = {site.name for site in find_sites(model) if "encoder_hidden_states" in site.note}
    assert noted == {site.name for site in find_sites(model) if "attn2.to_k" in site.name or "attn2.to_v" in site.name}
    assert len(noted) == 8  # four transformer blocks


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_every_residual_block_is_found(kind):
    module, _, model = traced(kind)
    resnets = {name: part for name, part in module.named_modules() if type(part).__name__ == "ResnetBlock2D"}
    blocks = {block.conv2.removesuffix(".conv2.weight"): block for block in find_resblocks(model)}
    assert blocks.keys() == resnets.keys() and len(blocks) == 8
    projections = {site.name: site.output for site in find_sites(model) if site.role == "time"}
    for name, block in blocks.items():
        norm = resnets[name].norm2
        np.testing.assert_array_equal(block.gamma, norm.weight.detach().numpy())
        np.testing.assert_array_equal(block.beta, norm.bias.detach().numpy())
        assert block.gamma.flags.owndata and block.beta.flags.owndata  # views would keep the checkpoint in memory
        assert (block.groups, block.kind) == (norm.num_groups, kind)
        assert block.epsilon == pytest.approx(norm.eps)
        assert block.emb == (projections[f"{name}.time_emb_proj.weight"],) and block.scale_first


def test_blocks_edge_is_what_the_second_convolution_reads():
    module, specs, model = traced("scale-shift")
    block = find_resblocks(model)[1]
    conv = module.get_submodule(block.conv2.removesuffix(".weight"))
    seen = []
    handle = conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    feeds = feeds_for(specs, 2)
    run_torch(module, feeds)
    handle.remove()
    np.testing.assert_allclose(run(instrument(model, [block.edge]), feeds)[block.edge], seen[0], atol=1e-4)


class _Positional(torch.nn.Module):
    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, third: torch.Tensor) -> torch.Tensor:
        name = "class_labels" if third.dtype == torch.int64 else "encoder_hidden_states"
        return self.unet(sample, timestep, **{name: third}, return_dict=False)[0]


@pytest.mark.parametrize("opset", [14, 17])
@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_foreign_graph_with_meaningless_names(kind, opset, tmp_path):
    """torch's older exporter writes shapes, norms and attention in other ways, and knows other names."""
    module, specs, ours = traced(kind)
    feeds = feeds_for(specs, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Positional(module),
            tuple(torch.from_numpy(feeds[spec.name]) for spec in specs),
            tmp_path / "foreign.onnx",
            dynamo=False,
            opset_version=opset,
            input_names=list("abc"),
            output_names=["z"],
            dynamic_axes={name: {0: "n"} for name in "abcz"},
        )
    model = ir.load(tmp_path / "foreign.onnx")
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"w{index}"
    normalise(model)
    assert model.opset_imports[""] == 18
    assert Counter(site.role for site in find_sites(model)) == Counter(site.role for site in find_sites(ours))
    blocks, expected = find_resblocks(model), find_resblocks(ours)
    assert len(blocks) == len(expected)
    for block, twin in zip(blocks, expected, strict=True):
        assert (block.kind, block.groups, block.scale_first) == (twin.kind, twin.groups, twin.scale_first)
        np.testing.assert_array_equal(block.gamma, twin.gamma)
    larger = feeds_for(specs, 3)
    out = run(model, dict(zip("abc", larger.values(), strict=True)))["z"]
    np.testing.assert_allclose(out, run_torch(module, larger), atol=2.0**-14 * np.abs(out).max())


def test_weights_behind_constants_and_views_are_found():
    model = graph("""
        foreign (float[N,2,4,4] pixels, float[N] sigma) => (float[N,3,4,4] y)
        <float[3,2,1,1] w0 = {1.0,2.0,3.0,4.0,5.0,6.0}, double[3,3,1,1] w2 = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0}>
        {
            alias = Identity (w0)
            a = Conv (pixels, alias)
            rows = Constant <value = float[3,3] {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0}> ()
            turned = Transpose <perm = [1, 0]> (rows)
            h = Transpose <perm = [0, 2, 3, 1]> (a)
            i = MatMul (h, turned)
            j = Transpose <perm = [0, 3, 1, 2]> (i)
            single = Cast <to = 1> (w2)
            y = Conv (j, single)
        }""")
    weights = {"w0": (3, 2, 1, 1), "turned": (3, 3), "w2": (3, 3, 1, 1)}
    normalise(model)
    sites = find_sites(model, Inputs("pixels", "sigma"))
    assert {site.name: site.shape for site in sites} == weights
    assert [site.role for site in sites] == ["first", "body", "last"]
    turned = model.graph.initializers["turned"].const_value.numpy()
    np.testing.assert_array_equal(turned, np.arange(1, 10, dtype=np.float32).reshape(3, 3).T)


def test_a_weight_that_two_ops_share_becomes_two():
    model = graph("""
        tied (float[N,2,4,4] x) => (float[N,2,4,4] y) <float[2,2,1,1] w = {1.0,2.0,3.0,4.0}>
        { a = Conv (x, w)  b = Relu (a)  y = Conv (b, w) }""")
    assert [site.name for site in find_sites(normalise(model), Inputs("x", None))] == ["w", "w.2"]


def test_attention_products_are_no_sites():
    _, _, model = traced("additive")
    products = [node for node in model.graph if node.op_type == "MatMul" and not node.inputs[1].is_initializer()]
    assert len(products) == 16  # scores and values of eight attentions
    assert not {node.outputs[0].name for node in products} & {site.output for site in find_sites(model)}


def test_inputs_are_told_by_rank_type_and_use():
    assert find_inputs(traced("additive")[2]) == Inputs("sample", "timestep", (), ("encoder_hidden_states",))
    assert find_inputs(traced("scale-shift")[2]) == Inputs("sample", "timestep", ("class_labels",), ())


def test_ambiguous_and_unknown_inputs_are_refused():
    two = graph("two (float[N,1,2,2] a, float[N,1,2,2] b, float[N] s) => (float[N,1,2,2] y) { y = Add (a, b) }")
    with pytest.raises(ExportError, match="sample input: expected one 4-D float input, found a and b"):
        find_inputs(two)
    assert find_inputs(two, sample="b") == Inputs("b", "s", (), ("a",))
    vectors = graph("v (float[N,1,2,2] a, float[N] s, int64[N] k) => (float[N,1,2,2] y) { y = Relu (a) }")
    with pytest.raises(ExportError, match="timestep input: expected one scalar or 1-D input, found s and k"):
        find_inputs(vectors)
    with pytest.raises(ExportError, match="timestep input 'u': not in the graph, its inputs are a, s, k"):
        find_inputs(vectors, timestep="u")


REFUSED = {
    "opset 21: expected 20 at most": ("g (float[1,1,2,2] x) => (float[1,1,2,2] y) { y = Relu (x) }", 21),
    "QuantizeLinear, the graph is quantized already": (
        "g (float[N] x) => (int8[N] y) <float s = {1.0}, int8 z = {0}> { y = QuantizeLinear (x, s, z) }",
        18,
    ),
    r"control flow \(If\)": (
        "g (bool c, float[N] x) => (float[N] y) { y = If (c) <"
        "then_branch = t () => (float[N] p) { p = Relu (x) }, else_branch = e () => (float[N] q) { q = Abs (x) }> }",
        18,
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_normalise_refuses_what_cannot_be_quantized(words):
    with pytest.raises(ExportError, match=words):
        normalise(graph(*REFUSED[words]))


def test_normalise_refuses_contrib_operators():
    model = graph("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    model.graph[0].domain, model.graph[0].op_type = "com.microsoft", "Gelu"
    with pytest.raises(ExportError, match=r"com\.microsoft\.Gelu is not part of the ONNX standard"):
        normalise(model)


def test_projections_of_a_single_token_are_small():
    """A sequence of one token makes them products with a vector."""
    _, _, model = traced("additive")
    (condition,) = (value for value in model.graph.inputs if value.name == "encoder_hidden_states")
    projections = {site.name for site in find_sites(model) if "encoder_hidden_states" in site.note}
    condition.shape = ir.Shape([condition.shape[0], 1, condition.shape[2]])
    small = {site.name for site in find_sites(model) if site.role == "small"}
    assert small == projections and small
