"""The yardstick: every operator against ONNX's own reference evaluator, a small UNet against its torch module."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import parser  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from qncd_deploy.engines import torch_place, torch_ref  # noqa: E402
from qncd_deploy.engines.base import open_engine  # noqa: E402
from qncd_deploy.engines.torch_ops import OPERATORS, Operator  # noqa: E402
from qncd_deploy.errors import BuildFailed, EngineError  # noqa: E402

X = "float[2,4,5,6] x"
POSITIVE = "float[2,4,5,6] p"

UNARY = ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "LeakyRelu", "Neg", "Relu", "Round", "Sigmoid", "Sin")
UNARY += ("Softplus", "Tanh")
BINARY = ("Add", "Div", "Max", "Min", "Mul", "Sub", "Sum", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")

# Operator covered (and an opset other than 18): inputs, body. x ~ N(0, 1), p > 0, i and j in 1 .. 4, b bool, q int8.
CASES: dict[str, tuple[str, str]] = {
    **{name: (X, f"y = {name}(x)") for name in UNARY},
    **{name: (POSITIVE, f"y = {name}(p)") for name in ("Log", "Reciprocal", "Sqrt")},
    **{name: (f"{X}, {POSITIVE}", f"y = {name}(x, p)") for name in BINARY},
    **{name: ("bool[3,4] b, bool[4] c", f"y = {name}(b, c)") for name in ["And", "Or"]},
    **{
        f"{name} keepdims={form}": (X, f"axes = Constant<value_ints=[1,-1]>() y = {name}<keepdims={form}>(x, axes)")
        for name in ["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"]
        for form in (0, 1)
    },
    "ReduceMean all": (X, "y = ReduceMean(x)"),
    "ReduceMean noop": (X, "y = ReduceMean<noop_with_empty_axes=1>(x)"),
    "ArgMax": (X, "y = ArgMax<axis=1,keepdims=0>(x)"),
    "ArgMin": (X, "y = ArgMin<axis=-1>(x)"),
    "AveragePool": (X, "y = AveragePool<kernel_shape=[2,3],strides=[2,1],pads=[1,1,1,1]>(x)"),
    "AveragePool included": (X, "y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(x)"),
    "BatchNormalization": (
        f"{X}, float[4] g, float[4] h, float[4] m, float[4] v",
        "v2 = Mul(v, v) y = BatchNormalization(x, g, h, m, v2)",
    ),
    "Cast": (X, "y = Cast<to=7>(x)"),
    "Cast float16": (X, "y = Cast<to=10>(x)"),
    "Clip": (X, "lo = Constant<value_float=-0.5>() hi = Constant<value_float=0.7>() y = Clip(x, lo, hi)"),
    "Clip low": (X, "lo = Constant<value_float=-0.5>() y = Clip(x, lo)"),
    "Concat": (f"{X}, {POSITIVE}", "y = Concat<axis=-3>(x, p)"),
    "Constant": (X, "c = Constant<value_floats=[1.0,2.0,3.0,4.0,5.0,6.0]>() y = Add(x, c)"),
    "ConstantOfShape": (
        "int64[2] i",
        "y = ConstantOfShape<value = int64[1] {7}>(i)",
    ),
    "Conv": (f"{X}, float[6,4,3,2] w, float[6] c", "y = Conv<pads=[1,0,2,1],strides=[2,1]>(x, w, c)"),
    "Conv groups": (f"{X}, float[4,2,3,3] w", "y = Conv<group=2,dilations=[1,2],pads=[1,2,1,2]>(x, w)"),
    "Conv 1d": ("float[2,3,9] r, float[5,3,3] w", "y = Conv<pads=[2,1]>(r, w)"),
    "ConvTranspose": (
        f"{X}, float[4,3,3,3] w, float[3] c",
        "y = ConvTranspose<strides=[2,2],pads=[1,1,1,1],output_padding=[1,1]>(x, w, c)",
    ),
    "DequantizeLinear 19": ("int8[2,4,5,6] q", "s = Constant<value_float=0.03>() y = DequantizeLinear(q, s)"),
    "DequantizeLinear axis 19": (
        "int8[2,4,5,6] q, float[4] g, int8[4] z",
        "y = DequantizeLinear<axis=1>(q, g, z)",
    ),
    "QuantizeLinear": (
        X,
        "s = Constant<value_float=0.0117>() z = Constant<value = int8 {0}>() y = QuantizeLinear(x, s, z)",
    ),
    "QuantizeLinear asymmetric": (
        X,
        "s = Constant<value_float=0.0117>() z = Constant<value = uint8 {131}>() y = QuantizeLinear(x, s, z)",
    ),
    "QuantizeLinear ties": (
        "int64[4] i",
        "f = Cast<to=1>(i) s = Constant<value_float=2.0>() z = Constant<value = int8 {0}>() "
        "y = QuantizeLinear(f, s, z)",
    ),
    "QuantizeLinear axis": (
        f"{X}, int8[4] z",
        "s = Constant<value_floats=[0.01,0.1,0.02,0.3]>() y = QuantizeLinear<axis=1>(x, s, z)",
    ),
    "Einsum": (f"{X}, {POSITIVE}", 'y = Einsum<equation="bchw,bdhw->bcd">(x, p)'),
    "Equal": ("int64[4] i, int64[4] j", "y = Equal(i, j)"),
    "Expand": ("float[3,1] e, int64[2] i", "o = Constant<value_ints=[2,1,4]>() y = Expand(e, o)"),
    "Flatten": (X, "y = Flatten<axis=2>(x)"),
    "Gather": (X, "at = Constant<value = int64[2,2] {0,-1,2,1}>() y = Gather<axis=1>(x, at)"),
    "Gather scalar": (X, "at = Constant<value_int=-2>() y = Gather<axis=2>(x, at)"),
    "Gemm": (
        "float[5,3] a, float[4,5] w, float[4] c",
        "y = Gemm<transA=1,transB=1,alpha=0.5,beta=2.0>(a, w, c)",
    ),
    "GlobalAveragePool": (X, "y = GlobalAveragePool(x)"),
    "InstanceNormalization": (f"{X}, float[4] g, float[4] h", "y = InstanceNormalization<epsilon=0.001>(x, g, h)"),
    "LayerNormalization": (f"{X}, float[5,6] g, float[5,6] h", "y = LayerNormalization<axis=2>(x, g, h)"),
    "MatMul": (f"{X}, float[6,3] w", "y = MatMul(x, w)"),
    "Mod": ("int64[4] i, int64[4] j", "n = Neg(i) y = Mod(n, j)"),
    "Mod fmod": (f"{X}, {POSITIVE}", "y = Mod<fmod=1>(x, p)"),
    "Div integers": ("int64[4] i, int64[4] j", "n = Neg(i) y = Div(n, j)"),
    "Not": ("bool[3,4] b", "y = Not(b)"),
    "Pad": (X, "n = Constant<value_ints=[0,1,2,0,0,0,1,3]>() v = Constant<value_float=2.5>() y = Pad(x, n, v)"),
    "Pad reflect": (X, 'n = Constant<value_ints=[0,0,2,1,0,0,1,3]>() y = Pad<mode="reflect">(x, n)'),
    "Pad axes": (
        X,
        "n = Constant<value_ints=[1,2,0,1]>() at = Constant<value_ints=[-1,2]>() y = Pad(x, n, , at)",
    ),
    "Pow": (POSITIVE, "e = Constant<value_float=1.7>() y = Pow(p, e)"),
    "Range": (
        "int64[4] i",
        "a = Constant<value_int=9>() e = Constant<value_int=-2>() d = Constant<value_int=-3>() y = Range(a, e, d)",
    ),
    "Reshape": (X, "to = Constant<value_ints=[0,2,-1,3]>() y = Reshape(x, to)"),
    "Resize scales": (
        X,
        "k = Constant<value_floats=[1.0,1.0,2.0,2.0]>() "
        'y = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(x, , k)',
    ),
    "Resize sizes": (X, "k = Constant<value_ints=[2,4,7,3]>() y = Resize(x, , , k)"),
    "Resize linear": (X, 'k = Constant<value_ints=[2,4,10,9]>() y = Resize<mode="linear">(x, , , k)'),
    "Shape": (X, "y = Shape<start=1,end=-1>(x)"),
    "Size": (X, "y = Size(x)"),
    "Slice": (
        X,
        "a = Constant<value_ints=[1,-1]>() e = Constant<value_ints=[99,-99]>() at = Constant<value_ints=[1,3]>() "
        "s = Constant<value_ints=[2,-2]>() y = Slice(x, a, e, at, s)",
    ),
    "Softmax": (X, "y = Softmax<axis=1>(x)"),
    "Split": (X, "n = Constant<value_ints=[1,3]>() u, y = Split<axis=1>(x, n)"),
    "Split outputs": (X, "u, v, y = Split<axis=3,num_outputs=3>(x)"),
    "Split uneven": (X, "u, y = Split<axis=2,num_outputs=2>(x)"),
    "Squeeze": ("float[3,1] e", "at = Constant<value_ints=[-1]>() y = Squeeze(e, at)"),
    "Tile": ("float[3,1] e", "n = Constant<value_ints=[2,3]>() y = Tile(e, n)"),
    "Transpose": (X, "y = Transpose<perm=[0,2,3,1]>(x)"),
    "Transpose reversed": (X, "y = Transpose(x)"),
    "Unsqueeze": (X, "at = Constant<value_ints=[-1,1]>() y = Unsqueeze(x, at)"),
    "Where": ("bool[3,4] b, float[3,1] e", "z = Constant<value_float=0.0>() y = Where(b, e, z)"),
    "GroupNormalization 21": (f"{X}, float[4] g, float[4] h", "y = GroupNormalization<num_groups=2>(x, g, h)"),
    "Gelu 21": (X, "y = Gelu(x)"),
    "Gelu tanh 21": (X, 'y = Gelu<approximate="tanh">(x)'),
}  # fmt: skip


def parse(inputs: str, body: str, *, opset: int = 18, output: str = "float") -> onnx.ModelProto:
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({output} y) {{ {body} }}'
    model = parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def feeds_for(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype == np.float32:
            array = rng.standard_normal(shape)
            array = np.abs(array) + 0.1 if value.name == "p" else array
        elif dtype == np.int64:
            array = rng.integers(1, 5, shape)
        else:
            array = rng.integers(0, 2, shape) if dtype == np.dtype(bool) else rng.integers(-100, 100, shape)
        feeds[value.name] = array.astype(dtype)
    return feeds


@pytest.mark.parametrize("case", CASES)
def test_an_operator_equals_the_reference_evaluators(case: str, tmp_path: Path) -> None:
    model = parse(*CASES[case], opset=int(words[-1]) if (words := case.split())[-1].isdigit() else 18)
    feeds = feeds_for(model)
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    onnx.save(model, tmp_path / "op.onnx")
    with open_engine("torch", tmp_path / "op.onnx") as engine:
        found = engine(feeds)["y"]
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if np.issubdtype(expected.dtype, np.floating):
        # Sums of at most 200 terms of order 1 in another order of addition: 200 roundings of 6e-8 at the worst.
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    else:
        np.testing.assert_array_equal(found, expected)


def test_every_operator_of_the_table_is_covered() -> None:
    assert set(OPERATORS) == {case.split()[0] for case in CASES}


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    onnx.save(parse(X, "u = NonZero(x) y = Hardmax(x)"), tmp_path / "op.onnx")
    with pytest.raises(BuildFailed, match=r"op\.onnx: the torch engine has no operator Hardmax, NonZero\.$"):
        open_engine("torch", tmp_path / "op.onnx")


def test_an_unsupported_form_of_an_operator_names_the_node(tmp_path: Path) -> None:
    onnx.save(
        parse(f"{X}, float[6,4,3,3] w", 'y = Conv<auto_pad="SAME_UPPER">(x, w)'),
        tmp_path / "op.onnx",
    )
    with (
        open_engine("torch", tmp_path / "op.onnx") as engine,
        pytest.raises(
            EngineError, match=r"Conv 'y' failed in the torch engine \(auto_pad SAME_UPPER is not supported\)"
        ),
    ):
        engine(feeds_for(onnx.load(tmp_path / "op.onnx")))


def test_old_opsets_and_foreign_files_are_refused(tmp_path: Path) -> None:
    onnx.save(parse(X, "y = Relu(x)", opset=11), tmp_path / "op.onnx")
    with pytest.raises(BuildFailed, match="opset 11, the torch engine knows 13 to 23"):
        open_engine("torch", tmp_path / "op.onnx")
    (tmp_path / "op.onnx").write_bytes(b"not a graph")
    with pytest.raises(BuildFailed, match="not a readable ONNX file"):
        open_engine("torch", tmp_path / "op.onnx")


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_an_exported_unet_equals_its_torch_module(kind: str, backend: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip(backend)
    import onnx_ir as ir
    from export_helpers import feeds_for as unet_feeds
    from export_helpers import run_torch, traced

    module, specs, model = traced(kind)
    ir.save(model, tmp_path / "unet.onnx")
    feeds = unet_feeds(specs, batch=3)
    expected = run_torch(module, feeds)
    with open_engine(backend, tmp_path / "unet.onnx", threads=1) as engine:
        found = engine(feeds)["out"]
    # About 100 layers, each adding a few float32 roundings (6e-8) of values of the output's size: 2e-5 of its maximum.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_tensors_stream_in_the_order_they_are_made_and_nothing_behind_them_is(tmp_path: Path) -> None:
    onnx.save(parse(X, "a = Exp(x) b = Neg(a) c = Sqrt(b) y = Relu(c)"), tmp_path / "op.onnx")
    feeds = feeds_for(onnx.load(tmp_path / "op.onnx"))
    with open_engine("torch", tmp_path / "op.onnx") as engine:
        names, arrays = zip(*engine.stream(feeds, ["b", "x", "a"]), strict=True)
        made = [name for name, _ in engine._values({"x": torch.from_numpy(feeds["x"])})]
        with pytest.raises(EngineError, match=r"op\.onnx: has no tensor 'nowhere'\.$"):
            engine.stream(feeds, ["nowhere"])
    assert names == ("x", "a", "b") and made == ["x", "a", "b", "c", "y"]
    np.testing.assert_array_equal(arrays[0], feeds["x"])
    np.testing.assert_allclose(arrays[2], -np.exp(feeds["x"]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_network_on_another_device_never_mixes_devices(
    kind: str, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's device without memory stands for a GPU: its tensors have shapes, and no values that could be read."""
    pytest.importorskip("diffusers")
    import onnx_ir as ir
    from export_helpers import feeds_for as unet_feeds
    from export_helpers import minmax_plan, traced

    from qncd_deploy.export.passes.insert_qdq import InsertQDQ

    _, specs, model = traced(kind)
    feeds = unet_feeds(specs, batch=3)
    if quantized:
        model = model.clone()
        InsertQDQ(minmax_plan(model, feeds))(model)
    ir.save(model, tmp_path / "unet.onnx")
    away = torch.device("meta")
    monkeypatch.setattr(torch_ref.TorchEngine, "device", away)

    def watched(name: str, run: Operator) -> Operator:
        def operator(*inputs: torch.Tensor | None, **attributes: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
            devices = {x.device for x in inputs if x is not None}
            assert len(devices) < 2 or run in read_as_numbers, name
            return run(*inputs, **attributes)

        return operator

    read_as_numbers = {OPERATORS[op] for op in torch_place.READ_AS_NUMBERS}
    with open_engine("torch", tmp_path / "unet.onnx") as engine:
        given = {name: torch_place.placed(torch.from_numpy(array), away) for name, array in feeds.items()}
        found = dict(engine._values(given, watched))
    assert found["out"].device == away and found["out"].shape == feeds["sample"].shape
    assert {tensor.device.type for tensor in found.values()} == {"cpu", "meta"}


def test_a_gpu_may_hold_half_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_place.torch_device() == torch_place.CPU and torch_place.room(torch_place.CPU, 5) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=64))
    assert torch_place.room(torch_place.torch_device(), 5) == 32


def test_an_error_of_a_weight_moves_the_output_as_much_as_it_says(tmp_path: Path) -> None:
    """The network is linear in each of its weights: the first order is all there is."""
    rng = np.random.default_rng(0)
    weights = {
        "c": rng.standard_normal((6, 3, 3, 3)),
        "m": rng.standard_normal((16, 5)),
        "g": rng.standard_normal((4, 30)),
        "b": rng.standard_normal(4),
    }
    body = """
        h = Conv<pads=[1, 1, 1, 1]>(x, c)
        shape = Constant<value_ints=[0, 6, 16]>()
        tokens = Reshape(h, shape)
        t = MatMul(tokens, m)
        flat = Flatten(t)
        y = Gemm<transB=1, alpha=0.5>(flat, g, b)
    """
    model = parse("float[2,3,4,4] x", body)
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    errors = {name: [rng.standard_normal(w.shape).astype(np.float32) for _ in range(2)] for name, w in weights.items()}
    x, probe = rng.standard_normal((2, 3, 4, 4)).astype(np.float32), rng.standard_normal((2, 4)).astype(np.float32)

    def output(changed: dict[str, np.ndarray]) -> np.ndarray:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        arrays = {**weights, **changed}
        copy.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        onnx.save(copy, tmp_path / "linear.onnx")
        return ReferenceEvaluator(copy).run(None, {"x": x})[0].astype(np.float64)

    exact = output({})
    nodes = {"h": "c", "t": "m", "y": "g"}
    with open_engine("torch", tmp_path / "linear.onnx") as engine:
        found = engine.weight_effects({"x": x}, {n: lambda w=w: errors[w] for n, w in nodes.items()}, probe)
    assert found.keys() == nodes.keys()
    for node, weight in nodes.items():
        moved = [((output({weight: weights[weight] + e}) - exact) * probe).sum(axis=1) for e in errors[weight]]
        # Differences of outputs of a few hundred in float32: 1e-4 absolute, of effects of the order of 100.
        np.testing.assert_allclose(found[node], moved, rtol=1e-4, atol=2e-3)
