"""Blocks are found by structure, hold every layer once, and compute what the whole graph does."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from export_helpers import feeds_for, instrument, parsed, run, small_network, traced  # noqa: E402

from qncd_deploy.export.blocks import MOST_LAYERS, find_blocks  # noqa: E402
from qncd_deploy.export.graph import Inputs, find_inputs, find_sites  # noqa: E402
from qncd_deploy.reconstruct.segment import Segment  # noqa: E402


def quantizable(model) -> set[str]:
    return {site.name for site in find_sites(model) if site.role == "body"}


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_residual_and_transformer_blocks_are_whole_and_every_layer_is_in_one(kind: str) -> None:
    _, _, model = traced(kind)
    layers = quantizable(model)
    blocks = find_blocks(model, find_inputs(model), layers)
    assert sorted(name for block in blocks for name in block.layers) == sorted(layers)
    nodes = [node for block in blocks for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    by_module: dict[str, set[str]] = {}
    for block in blocks:
        for name in block.layers:
            parts = name.split(".")
            if "resnets" in parts or "attentions" in parts:
                by_module.setdefault(".".join(parts[: 4 if "mid" not in parts[0] else 3]), set()).add(block.output)
    assert by_module and all(len(outputs) == 1 for outputs in by_module.values())


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_a_block_computes_its_output_from_its_inputs(kind: str) -> None:
    _, specs, model = traced(kind)
    blocks = find_blocks(model, find_inputs(model), quantizable(model))
    feeds = feeds_for(specs, 2)
    names = {name for block in blocks for name in (*block.inputs, block.output)}
    values = {**feeds, **run(instrument(model, names), feeds)}
    for block in blocks:
        given = {name: torch.from_numpy(values[name]) for name in block.inputs}
        found = Segment(block.nodes)(given, (block.output,))[block.output].numpy()
        # Two float32 implementations of up to 12 layers in a row.
        np.testing.assert_allclose(found, values[block.output], rtol=0, atol=2e-5 * np.abs(values[block.output]).max())


def test_what_projects_the_time_for_one_block_belongs_to_it() -> None:
    _, _, model = traced("additive")
    blocks = find_blocks(model, find_inputs(model), quantizable(model))
    (block,) = [block for block in blocks if "down_blocks.0.resnets.0.conv1.weight" in block.layers]
    weights = {node.inputs[1].name for node in block.nodes if node.op_type == "Gemm"}
    assert weights == {"down_blocks.0.resnets.0.time_emb_proj.weight"}


def test_a_layer_outside_residual_regions_stands_alone() -> None:
    model = small_network()
    blocks = find_blocks(model, Inputs("x", None), {"conv", "left", "right", "gemm", "last"})
    assert [block.layers for block in blocks] == [("conv",), ("left", "right", "gemm"), ("last",)]
    assert blocks[1].inputs == ("a",) and blocks[1].output == "k"


LEAKY = """<ir_version: 8, opset_import: ["": 18]>
    leaky (float[N,8,4,4] x) => (float[N,8,4,4] y, float[N,8,4,4] aside)
    {
        a = Conv (x, first)
        b = Conv (a, second)
        c = Conv (b, third)
        y = Add (c, a)
        aside = Relu (b)
    }"""


def test_a_region_that_is_read_in_the_middle_is_no_block() -> None:
    arrays = {name: np.ones((8, 8, 1, 1), np.float32) for name in ("first", "second", "third")}
    blocks = find_blocks(parsed(LEAKY, arrays), Inputs("x", None), set(arrays))
    assert [block.layers for block in blocks] == [("first",), ("second",), ("third",)]


def deep(depth: int) -> str:
    lines = [f"h{i + 1} = Conv (h{i}, w{i})" for i in range(depth)]
    return (
        '<ir_version: 8, opset_import: ["": 18]> deep (float[N,8,4,4] h0) => (float[N,8,4,4] y) {'
        + "\n".join([*lines, f"m = Conv (h{depth}, u)", f"n = Add (m, h{depth})", "y = Add (n, h0)"])
        + "}"
    )


@pytest.mark.parametrize("depth", [MOST_LAYERS - 1, MOST_LAYERS])
def test_a_large_region_is_taken_apart(depth: int) -> None:
    arrays = {name: np.ones((8, 8, 1, 1), np.float32) for name in (*(f"w{i}" for i in range(depth)), "u")}
    blocks = find_blocks(parsed(deep(depth), arrays), Inputs("h0", None), set(arrays))
    assert len(blocks) == (1 if depth < MOST_LAYERS else depth + 1)


SPLIT = """<ir_version: 8, opset_import: ["": 18]>
    split (float[N,8,4,4] x) => (float[N,8,4,4] y)
    {
        h = Conv (x, before)
        s = Relu (x)
        both = Concat <axis = 1> (h, s)
        main = Conv (both, inner)
        left = Conv (h, shortcut_h)
        right = Conv (s, shortcut_s)
        shortcut = Add (left, right)
        y = Add (main, shortcut)
    }"""


def test_a_split_shortcut_stays_with_its_block() -> None:
    arrays = {
        "before": np.ones((8, 8, 1, 1), np.float32),
        "inner": np.ones((8, 16, 1, 1), np.float32),
        "shortcut_h": np.full((8, 8, 1, 1), 2, np.float32),
        "shortcut_s": np.full((8, 8, 1, 1), 3, np.float32),
    }
    blocks = find_blocks(parsed(SPLIT, arrays), Inputs("x", None), set(arrays))
    assert [set(block.layers) for block in blocks] == [{"before"}, {"inner", "shortcut_h", "shortcut_s"}]
    assert set(blocks[1].inputs) == {"both", "h", "s"}
