"""Convolutions of skip concatenations: found by structure, exact in float when split, rounded on grids of their own."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_helpers import feeds_for, instrument, minmax_plan, relative_rms, run, run_torch, traced
from skip_network import MAIN, SHORTCUT, H, S, skip_feeds, skip_network

from qncd_deploy.errors import ExportError
from qncd_deploy.export.graph import find_sites
from qncd_deploy.export.passes.insert_qdq import InsertQDQ
from qncd_deploy.export.passes.ort_sibling import OrtSibling
from qncd_deploy.export.passes.smooth import FoldSmoothing
from qncd_deploy.export.passes.split import SplitShortcuts
from qncd_deploy.export.resblocks import find_resblocks
from qncd_deploy.export.skips import SkipConv, find_skip_convs
from qncd_deploy.export.verify import FLOAT, MASTER, ONNXRUNTIME, verify
from qncd_deploy.quant.grid import fake_quantize

KINDS = ("additive", "scale-shift")


def every_skip(model: ir.Model) -> tuple[str, ...]:
    return tuple(skip.name for skip in find_skip_convs(model))


def recorded_concatenations(module: torch.nn.Module, feeds: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """Channels of the maps that the network's own code concatenates, in order."""
    found = []
    cat = torch.cat

    def recording(tensors, dim=0, **more):
        if dim == 1 and all(tensor.dim() == 4 for tensor in tensors):
            found.append(tuple(tensor.shape[1] for tensor in tensors))
        return cat(tensors, dim=dim, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", recording)
        run_torch(module, feeds)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_block_is_found_with_its_halves(kind):
    module, specs, model = traced(kind)
    skips = find_skip_convs(model)
    names = [name for name, _ in module.named_modules()]
    blocks = [name for name in names if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+", name)]
    for part, name in (("shortcut", "conv_shortcut"), ("main", "conv1")):
        assert [skip.name for skip in skips if skip.kind == part] == [f"{block}.{name}.weight" for block in blocks]
    sizes = recorded_concatenations(module, feeds_for(specs, 1))
    assert len(sizes) == len(blocks) and len(set(sizes)) > 1
    for skip, (h, _) in zip([skip for skip in skips if skip.kind == "shortcut"], sizes, strict=True):
        assert skip.channels == h
        assert {other.channels for other in skips if other.name.split(".conv")[0] == skip.name.split(".conv")[0]} == {h}


@pytest.mark.parametrize("smoothing", ["none", "before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_splitting_is_exact_in_float(kind, smoothing):
    module, specs, model = traced(kind)
    rng = np.random.default_rng(0)
    fold = FoldSmoothing(
        {b.conv2: np.exp(rng.uniform(-1, 1, b.channels)).astype(np.float32) for b in find_resblocks(model)}
    )
    if smoothing == "before":
        fold(model)
    names = every_skip(model)
    SplitShortcuts(names)(model)
    if smoothing == "after":
        fold(model)
    verify(model, FLOAT)
    feeds = feeds_for(specs, 2)
    expected = run_torch(module, feeds)
    # As for smoothing: one more rounding to a layer of some 40 is far from 1e-4 of the largest value.
    np.testing.assert_allclose(run(model, feeds)["out"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    sites = {site.name for site in find_sites(model)}
    assert {name + half for name in names for half in (".h", ".s")} <= sites and not sites & set(names)


def test_a_scaled_input_is_split_like_any_other():
    """A main convolution whose input was divided by smoothing's factor."""
    model = skip_network()
    feeds = skip_feeds(3)
    before = run(model, feeds)["out"]
    FoldSmoothing({MAIN: np.geomspace(0.5, 2, H + S).astype(np.float32)})(model)
    assert [(skip.name, skip.kind, skip.channels) for skip in find_skip_convs(model)] == [
        (MAIN, "main", H),
        (SHORTCUT, "shortcut", H),
    ]
    SplitShortcuts([MAIN, SHORTCUT])(model)
    # Five layers in float32: sums of at most 180 products, 180**0.5 * 6e-8 each.
    np.testing.assert_allclose(run(model, feeds)["out"], before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_the_halves_are_the_weights_halves_and_read_the_halves():
    model = skip_network()
    whole = {name: model.graph.initializers[name].const_value.numpy() for name in (MAIN, SHORTCUT)}
    SplitShortcuts([MAIN, SHORTCUT])(model)
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    sites = {site.name: site for site in find_sites(model)}
    for name, weight in whole.items():
        assert name not in held
        np.testing.assert_array_equal(np.concatenate([held[f"{name}.h"], held[f"{name}.s"]], axis=1), weight)
        assert held[f"{name}.h"].shape[1] == H and held[f"{name}.s"].shape[1] == S
    assert (sites["shortcut.h"].input, sites["shortcut.s"].input) == ("h", "s")
    assert (sites["main.h"].input, sites["main.s"].input) == ("u_h", "u_s")
    nodes = {node.inputs[1].name: node for node in model.graph if node.op_type == "Conv"}
    assert [value.name for value in nodes["shortcut.h"].inputs] == ["h", "shortcut.h", "shortcut_bias"]
    assert len(nodes["shortcut.s"].inputs) == 2
    assert nodes["main.s"].attributes["pads"].as_ints() == nodes["main.h"].attributes["pads"].as_ints() == (1, 1, 1, 1)
    assert {"mainly", "shortly"} <= {node.outputs[0].name for node in model.graph if node.op_type == "Add"}
    feeds = skip_feeds(2)
    found = run(instrument(model, ["u", "u_h", "u_s"]), feeds)
    np.testing.assert_array_equal(np.concatenate([found["u_h"], found["u_s"]], axis=1), found["u"])


@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_each_half_is_rounded_on_its_own_grids(bits):
    model = skip_network(loudness=30)
    SplitShortcuts([SHORTCUT])(model)
    feeds = skip_feeds(3)
    plan = minmax_plan(model, feeds, weight_bits=bits[0], act_bits=bits[1])
    h, s = plan["shortcut.h"], plan["shortcut.s"]
    assert s.act_scale > 10 * h.act_scale and h.weight_scale != s.weight_scale
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    InsertQDQ(plan)(model)
    verify(model, MASTER, plan=plan)
    found = run(instrument(model, ["h", "s", "shortly"]), feeds)
    expected = held["shortcut_bias"][:, None, None].astype(np.float64)
    for layer in (h, s):
        x = fake_quantize(found[layer.input], layer.act_grid).astype(np.float64)
        w = fake_quantize(held[layer.name], layer.weight_grid)[:, :, 0, 0].astype(np.float64)
        expected = expected + np.einsum("oc,nchw->nohw", w, x)
    assert relative_rms(found["shortly"], expected) < 1e-6  # float32 sums of 20 products
    ort = model.clone()
    OrtSibling(plan)(ort)
    verify(ort, ONNXRUNTIME, plan=plan)


def test_convolutions_of_one_tensor_share_its_halves():
    model = skip_network()
    graph = model.graph
    twin = ir.Value(name="twin", shape=graph.initializers[MAIN].shape, type=graph.initializers[MAIN].type)
    twin.const_value = ir.tensor(graph.initializers[MAIN].const_value.numpy() + 1, name="twin")
    graph.register_initializer(twin)
    main = next(node for node in graph if node.inputs[1:2] and node.inputs[1].name == MAIN)
    copy = ir.node("Conv", [main.inputs[0], twin], {"pads": [1, 1, 1, 1]}, name="copy")
    copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].type = (
        "copied",
        main.outputs[0].shape,
        main.outputs[0].type,
    )
    graph.insert_after(main, copy)
    graph.outputs.append(copy.outputs[0])
    SplitShortcuts([MAIN, "twin"])(model)
    assert sum(node.op_type == "Split" for node in graph) == 1
    assert {site.input for site in find_sites(model) if site.name.endswith(".h")} == {"u_h"}
    assert [value.name for value in graph.outputs] == ["out", "copied"]  # a graph's output keeps its name
    verify(model, FLOAT)


def test_twice_gives_the_same_bytes():
    first, second = skip_network(), skip_network()
    for model in (first, second):
        SplitShortcuts({SHORTCUT, MAIN})(model)
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()


@pytest.mark.parametrize("name", ["inner", "conv_out", "nothing"])
def test_what_reads_no_skip_concatenation_is_refused(name):
    with pytest.raises(ExportError, match=rf"split: {name} is not a convolution of a skip concatenation"):
        SplitShortcuts([SHORTCUT, name])(skip_network())


def test_other_concatenations_are_not_skips():
    def concatenation(model: ir.Model) -> ir.Node:
        return next(node for node in model.graph if node.op_type == "Concat")

    three = skip_network()
    node = concatenation(three)
    extended = ir.node("Concat", [*node.inputs, node.inputs[0]], {"axis": 1}, name="three")
    node.graph.insert_after(node, extended)
    node.outputs[0].replace_all_uses_with(extended.outputs[0])
    fed = skip_network()
    concatenation(fed).replace_input_with(1, fed.graph.inputs[0])
    rows = skip_network()
    concatenation(rows).attributes["axis"] = ir.AttrInt64("axis", 0)
    grouped = skip_network()
    for node in grouped.graph:
        if node.op_type == "Conv":
            node.attributes["group"] = ir.AttrInt64("group", 2)
    for model in (three, fed, rows, grouped):
        assert find_skip_convs(model) == ()
    negative = skip_network()
    concatenation(negative).attributes["axis"] = ir.AttrInt64("axis", -3)
    assert find_skip_convs(negative) == (
        SkipConv(MAIN, "u", H, "main"),
        SkipConv(SHORTCUT, "cat", H, "shortcut"),
    )
