"""A small network around one skip concatenation, halves of different width, with everything that may read it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qncd_deploy.export.passes.normalise import normalise

H, S = 12, 8
"""Channels of the decoder's half and of the encoder's."""

SHORTCUT, MAIN = "shortcut", "main"
"""Names of the weights that read the concatenation."""

TEXT = f"""
<ir_version: 8, opset_import: ["": 18]>
skips (float[N,3,8,8] sample, float[N] timestep) => (float[N,3,8,8] out)
{{
    first = Conv <pads = [1, 1, 1, 1]> (sample, conv_in)
    time = Reshape (timestep, per_row)
    late = Mul (time, small)
    a = Add (first, late)
    s = Mul (a, loudness)
    h = Conv <pads = [1, 1, 1, 1]> (a, inner)
    cat = Concat <axis = 1> (h, s)
    grouped = Reshape (cat, groups)
    normal = InstanceNormalization (grouped, ones, zeros)
    maps = Reshape (normal, planes)
    stretched = Mul (maps, gamma)
    shifted = Add (stretched, beta)
    gate = Sigmoid (shifted)
    u = Mul (shifted, gate)
    mainly = Conv <pads = [1, 1, 1, 1]> (u, {MAIN}, main_bias)
    shortly = Conv (cat, {SHORTCUT}, shortcut_bias)
    y = Add (mainly, shortly)
    out = Conv <pads = [1, 1, 1, 1]> (y, conv_out)
}}"""


def skip_proto(*, loudness: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """loudness: of the encoder's half, relative to the decoder's."""
    rng = np.random.default_rng(seed)
    shapes = {
        **{"conv_in": (S, 3, 3, 3), "inner": (H, S, 3, 3), MAIN: (S, H + S, 3, 3), SHORTCUT: (S, H + S, 1, 1)},
        **{"conv_out": (3, S, 3, 3)},
    }
    arrays = {name: rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
    arrays |= {
        **{"small": np.full((1, 1, 1, 1), 1e-3), "loudness": np.full((1, S, 1, 1), loudness)},
        **{"ones": np.ones(4), "zeros": np.zeros(4), "gamma": rng.uniform(0.5, 1.5, (1, H + S, 1, 1))},
        **{"beta": rng.normal(size=(1, H + S, 1, 1)), "main_bias": rng.normal(size=S)},
        "shortcut_bias": rng.normal(size=S),
    }
    targets = {"per_row": [-1, 1, 1, 1], "groups": [0, 4, -1], "planes": [0, H + S, 8, 8]}
    proto = onnx.parser.parse_model(TEXT)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for name, target in targets.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(target, np.int64), name))
    return proto


def skip_network(*, loudness: float = 1.0) -> ir.Model:
    """The same in normal form."""
    return normalise(ir.from_proto(skip_proto(loudness=loudness)))


def skip_feeds(rows: int, *, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sample = rng.standard_normal((rows, 3, 8, 8)).astype(np.float32)
    return {"sample": sample, "timestep": np.linspace(0, 999, rows, dtype=np.float32)}
