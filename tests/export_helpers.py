"""Small networks, hand-made plans and runners shared by the exporter's tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from qncd_deploy.export.graph import Inputs, find_sites
from qncd_deploy.export.passes.normalise import normalise
from qncd_deploy.export.save import save_siblings
from qncd_deploy.export.trace import trace
from qncd_deploy.quant.plan import LayerPlan, QuantPlan
from qncd_deploy.specs import TensorSpec

Arrays = dict[str, np.ndarray]


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Trained-looking parameters: no norm is the identity and no two tensors are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
    return module.eval()


def instrument(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that puts out the named tensors beside its own outputs; inputs are in the feeds already."""
    copy = model.clone()
    tensors = {output.name: output for node in copy.graph for output in node.outputs}
    known = {value.name for value in (*copy.graph.inputs, *copy.graph.outputs)}
    copy.graph.outputs.extend(tensors[name] for name in dict.fromkeys(names) if name not in known)
    return copy


def conditional_unet() -> tuple[torch.nn.Module, list[TensorSpec]]:
    """Two levels, cross-attention on both, additive blocks."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    specs = [
        TensorSpec("sample", "float32", ("batch", 4, 8, 8)),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 3, 32)),
    ]
    return randomize(unet), specs


def scale_shift_unet() -> tuple[torch.nn.Module, list[TensorSpec]]:
    """Scale-shift blocks, class labels, attention with biased projections."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
        norm_num_groups=16,
        attention_head_dim=16,
    )
    specs = [
        TensorSpec("sample", "float32", ("batch", 3, 8, 8)),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("class_labels", "int64", ("batch",)),
    ]
    return randomize(unet), specs


_NETWORKS = {"additive": conditional_unet, "scale-shift": scale_shift_unet}


@cache
def _traced(kind: str) -> tuple[torch.nn.Module, list[TensorSpec], ir.Model]:
    module, specs = _NETWORKS[kind]()
    return module, specs, trace(module, specs)


def traced(kind: str) -> tuple[torch.nn.Module, list[TensorSpec], ir.Model]:
    """A network, its inputs and a float graph of it that the test may change; traced once a session."""
    module, specs, model = _traced(kind)
    return module, specs, model.clone()


def parsed(text: str, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """A normalised graph written as ONNX text, with the arrays for the names that the text leaves undefined."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    undefined = {value.name: value for node in model.graph for value in node.inputs if value.producer() is None}
    for name, array in arrays.items():
        tensor, value = ir.tensor(array, name=name), undefined[name]
        value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), tensor.shape
        model.graph.register_initializer(value)
    return normalise(model)


def feeds_for(specs: list[TensorSpec], batch: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in specs:
        shape = [batch if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.dtype == "int64":
            feeds[spec.name] = rng.integers(0, 5, shape)
        elif len(shape) == 1:
            feeds[spec.name] = rng.uniform(0, 999, shape).astype(np.float32)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def run_torch(module: torch.nn.Module, feeds: Arrays) -> np.ndarray:
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        found = module(**tensors)
        return (found if isinstance(found, torch.Tensor) else found[0]).numpy()


def run(model: ir.Model, feeds: Arrays, *, fused: Path | None = None) -> Arrays:
    """ONNX Runtime on the CPU; every output by name. Without `fused`, op by op, as the standard defines them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if fused is None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(fused)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def minmax_plan(
    model: ir.Model,
    feeds: Arrays,
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
    asymmetric: bool = False,
    eight_bits_asymmetric: bool = False,
    inputs: Inputs | None = None,
    roles: tuple[str, ...] = ("body",),
) -> QuantPlan:
    """Min-max grids for every site of these roles, written down by hand; a zero channel gets any scale. asymmetric: the
    grids of fewer than 8 bits span [min, max] with zero in it; eight_bits_asymmetric: those of activations always do.
    """
    sites = find_sites(model, inputs)
    edges = {name for site in sites for name in (site.input, site.output)}
    values = {**feeds, **run(instrument(model, edges), feeds)}
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    layers = []
    for site in sites:
        fixed = dict(
            name=site.name,
            op=site.op,
            shape=site.shape,
            input=site.input,
            output=site.output,
            out_axis=site.out_axis,
        )
        if site.role not in roles:
            layers.append(LayerPlan(**fixed, reason=site.role))
            continue
        axes = tuple(axis for axis in range(len(site.shape)) if axis != site.out_axis)
        weight_scale = np.abs(weights[site.name]).max(axes) / (2 ** (weight_bits - 1) - 1)
        weight_scale[weight_scale == 0] = 1e-30
        act_scale = np.float32(np.abs(values[site.input]).max() / (2 ** (act_bits - 1) - 1))
        act_zero, weight_zero = 0, None
        if eight_bits_asymmetric or (asymmetric and act_bits < 8):
            act_scale, act_zero = _between(values[site.input].min(), values[site.input].max(), act_bits)
        if asymmetric and weight_bits < 8:
            weight_scale, zeros = _between(weights[site.name].min(axes), weights[site.name].max(axes), weight_bits)
            weight_zero = tuple(map(int, zeros))
        layers.append(
            LayerPlan(
                **fixed,
                reason=site.role,
                weight_bits=weight_bits,
                act_bits=act_bits,
                weight_scale=tuple(map(float, weight_scale.astype(np.float32))),
                act_scale=float(act_scale),
                act_zero=int(act_zero),
                output_amax=float(np.abs(values[site.output]).max()),
                weight_zero=weight_zero,
            )
        )
    return QuantPlan(f"w{weight_bits}a{act_bits}", tuple(layers))


def _between(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of 2**bits levels from low to high, zero among them."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float32)
    return scale, np.rint(-low / scale) - 2 ** (bits - 1)


SMALL = """<ir_version: 8, opset_import: ["": 18]>
    small (float[N,8,4,4] x) => (float[N,8,4,4] y)
    {
        a = Conv <pads = [1, 1, 1, 1]> (x, conv, conv_bias)
        b = Transpose <perm = [0, 2, 3, 1]> (a)
        c = MatMul (b, left)
        d = MatMul (b, right)
        e = Add (d, right_bias)
        f = Mul (c, e)
        g = Reshape (f, rows)
        h = Gemm <transB = 1> (g, gemm, gemm_bias)
        i = Reshape (h, pixels)
        j = Transpose <perm = [0, 3, 1, 2]> (i)
        k = Add (j, a)
        y = Conv (k, last)
    }"""


def small_network() -> ir.Model:
    """A convolution, two Linears on one edge of which one has a bias, a Gemm, and a convolution; 8 channels."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": (8, 8, 3, 3),
        "conv_bias": (8,),
        "left": (8, 8),
        "right": (8, 8),
        "right_bias": (8,),
        "gemm": (8, 8),
        "gemm_bias": (8,),
        "last": (8, 8, 1, 1),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    arrays |= {"rows": np.array([-1, 8]), "pixels": np.array([-1, 4, 4, 8])}
    return parsed(SMALL, arrays)


def small_plan(model: ir.Model, **bits: int) -> tuple[QuantPlan, Arrays]:
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 8, 4, 4)).astype(np.float32)}
    plan = minmax_plan(model, feeds, inputs=Inputs("x", None), roles=("body", "first", "last"), **bits)
    assert len(plan.quantized) == 5 and len(plan.edges) == 4
    return plan, feeds


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    difference = found.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def saved(models: Mapping[str, ir.Model], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_siblings(models, folder)
    return folder
