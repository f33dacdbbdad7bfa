"""Small ONNX graphs for engine and runtime tests, written as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

NETWORK = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[batch,8,16,16] x, float[batch] t, float[batch,1,12] c) => (float[batch,8,16,16] out) {
    tokens = MatMul(c, table)
    flat = Squeeze(tokens, axis1)
    shift = Unsqueeze(flat, axes23)
    time3 = Unsqueeze(t, axes123)
    time = Cos(time3)
    y0 = Conv<pads=[1,1,1,1]>(x, w0)
    y1 = Add(y0, shift)
    y2 = Add(y1, time)
    s = Sigmoid(y2)
    h = Mul(y2, s)
    BODY
    last = Transpose<perm=[0,3,1,2]>(mixed)
    out = Add(last, x)
}
"""
FLOAT = """
    y3 = Conv<pads=[1,1,1,1]>(h, w1)
    view = Transpose<perm=[0,2,3,1]>(y3)
    product = MatMul(view, w2)
    mixed = Add(product, bias)
"""
QDQ = """
    hq = QuantizeLinear(h, hs, zero)
    hd = DequantizeLinear(hq, hs, zero)
    w1d = DequantizeLinear<axis=0>(w1q, w1s, w1z)
    y3 = Conv<pads=[1,1,1,1]>(hd, w1d)
    view = Transpose<perm=[0,2,3,1]>(y3)
    vq = QuantizeLinear(view, vs, zero)
    vd = DequantizeLinear(vq, vs, zero)
    w2d = DequantizeLinear<axis=1>(w2q, w2s, w2z)
    product = MatMul(vd, w2d)
    mixed = Add(product, bias)
"""


def save_network(path: Path, *, quantized: bool, external: bool = False) -> None:
    """A network of the shape of a UNet's parts: state, timestep and tokens in; one quantized Conv, one quantized
    MatMul.
    """
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((8, 8, 3, 3), (8, 8)))
    arrays = {
        "table": rng.standard_normal((12, 8)).astype(np.float32),
        "axis1": np.array([1]),
        "axes23": np.array([2, 3]),
        "axes123": np.array([1, 2, 3]),
        "w0": rng.standard_normal((8, 8, 3, 3)).astype(np.float32) * 0.1,
        "bias": rng.standard_normal(8).astype(np.float32),
    }
    if quantized:
        s1, s2 = np.abs(w1).max((1, 2, 3)) / np.float32(127), np.abs(w2).max(0) / np.float32(127)
        arrays |= {
            "w1q": np.round(w1 / s1[:, None, None, None]).astype(np.int8),
            "w2q": np.round(w2 / s2).astype(np.int8),
            "w1s": s1,
            "w2s": s2,
            "w1z": np.zeros(8, np.int8),
            "w2z": np.zeros(8, np.int8),
            "zero": np.int8(0),
            "hs": np.float32(0.03),
            "vs": np.float32(0.0171),
        }
    else:
        arrays |= {"w1": w1, "w2": w2}
    model = parser.parse_model(NETWORK.replace("BODY", QDQ if quantized else FLOAT))
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=64)


def network_feeds(rows: int = 2, *, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 8, 16, 16)).astype(np.float32),
        "t": rng.uniform(0, 6, rows).astype(np.float32),
        "c": rng.standard_normal((rows, 1, 12)).astype(np.float32),
    }


def reference(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The graph's output by ONNX's own evaluator, which knows Q/DQ from opset 19 on; their meaning is that of 18."""
    model = onnx.load(path)
    model.opset_import[0].version = 19
    return ReferenceEvaluator(model).run(None, feeds)[0]
