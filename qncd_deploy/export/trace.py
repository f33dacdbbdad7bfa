"""Trace a torch module to a clean float ONNX graph at opset 18: batch free, parameters under their own names, the sides
of pictures free where that is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import onnx_ir as ir
import torch

from qncd_deploy.errors import ExportError, first_line
from qncd_deploy.export.passes.normalise import OPSET, normalise, quiet
from qncd_deploy.specs import BATCH, SIDES, TensorSpec

_EXAMPLE = 2
"""Pictures in the example that is traced: more than one, since exporters take a size of one for a constant."""


def trace(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    *,
    outputs: Sequence[str] = ("out",),
    sides: tuple[int, int] | None = None,
) -> ir.Model:
    """Export a diffusers UNet (or any module called as module(*inputs)) as a float32 graph in normal form.

    inputs: in the order of the module's positional arguments; a string in a shape becomes a free dimension of that
    name, which may be BATCH or one of SIDES. The argument `class_labels` is passed by name, since UNets take it after
    others. outputs: names for the first ones that the module returns. sides: any valid (height, width), for SIDES.
    Initializers are named like the module's parameters; a Linear weight that feeds a MatMul is stored transposed,
    (K, N).

    Raises: ExportError if torch cannot trace the module, or the graph cannot be brought to the normal form.
    """
    named = {name: tensor for name, tensor in module.named_parameters()}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise ExportError(f"{name}: NaN or infinity in the weights. Use an intact checkpoint.")
    caller = _Caller(module.eval(), tuple(spec.name for spec in inputs), len(outputs))
    example = tuple(_example(spec, sides) for spec in inputs)
    axes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)} or None
        for spec in inputs
    )
    try:
        with warnings.catch_warnings(), quiet("torch", "torch.__trace"), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(caller, example, dynamic_shapes=(axes,), strict=False)
            model = _translate(program, [spec.name for spec in inputs], outputs)
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError) as error:
        raise ExportError(f"{type(module).__name__}: torch cannot trace it ({first_line(error)}).") from error
    _name_sizes(model.graph, inputs)
    _strip_prefix(model.graph, "module.")
    model.graph.name = type(module).__name__
    return _without_module(normalise(model))


def trace_decoder(decoder: torch.nn.Module, latent_shape: Sequence[int], *, any_size: bool = False) -> ir.Model:
    """Export the first stage's decoder: `latents` (batch, C, H, W) -> `images` (batch, c, h, w), both float32.

    any_size: H and W are free, those of latent_shape being an example.
    """
    channels, height, width = latent_shape
    shape = (BATCH, channels, *(SIDES if any_size else (height, width)))
    return trace(decoder, [TensorSpec("latents", "float32", shape)], outputs=["images"], sides=(height, width))


def trace_text_encoder(encoder: torch.nn.Module, max_length: int, outputs: Sequence[str]) -> ir.Model:
    """Export a text encoder: `input_ids` (batch, max_length) int64 -> `outputs`, float32."""
    return trace(encoder, [TensorSpec("input_ids", "int64", (BATCH, max_length))], outputs=outputs)


class _Caller(torch.nn.Module):
    """Positional arguments in graph order to the module's own call, and its first outputs."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...], outputs: int) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.names, tensors, strict=True))
        keywords = {name: named.pop(name) for name in _BY_NAME & named.keys()}
        result = self.module(*named.values(), **keywords)
        if isinstance(result, torch.Tensor):
            return (result,)
        return tuple(result[i] for i in range(self.outputs))


_BY_NAME = frozenset({"class_labels"})


def _translate(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """torch's own translation to ONNX, without its decompositions where they have nothing to do.

    Those trace the whole network twice more, two thirds of the time of an export, for the sake of in-place ops and of
    composite ops that have no translation. A UNet has neither, once a few ops that do nothing at inference are gone; if
    one turns up after all, the translation fails on it and is done again the long way.
    """
    _remove_idle_ops(program.graph)
    program.graph_module.recompile()
    translate = partial(
        torch.onnx.export,
        program,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=list(outputs),
        optimize=False,  # torch's optimizer would fold transposed weights into nameless constants
        verbose=False,
    )
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if not any(target._schema.is_mutable for target in targets):
        program.run_decompositions = lambda table: program  # type: ignore[method-assign]
        try:
            return translate().model
        except torch.onnx.OnnxExporterError:
            del program.run_decompositions
    return translate().model


def _remove_idle_ops(graph: torch.fx.Graph) -> None:
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.to.dtype and node.args[0].meta["val"].dtype != node.args[1]:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
        elif node.target in (aten.contiguous.default, aten.dropout.default, aten.to.dtype):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _example(spec: TensorSpec, sides: tuple[int, int] | None) -> torch.Tensor:
    """Any valid values: tracing depends on shapes and types alone. Sides that are free differ, for exporters take equal
    sizes for one.
    """
    sizes: Mapping[str, int] = {}
    if sides is not None:
        height, width = sides
        sizes = dict(zip(SIDES, (height, 2 * width if 2 * width != height else 3 * width), strict=True))
    shape = [dim if isinstance(dim, int) else sizes.get(dim, _EXAMPLE) for dim in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _name_sizes(graph: ir.Graph, inputs: Sequence[TensorSpec]) -> None:
    """torch calls free dimensions s53 or the like; shapes computed from them are left to shape inference."""
    names = {
        dim.value: size
        for value, spec in zip(graph.inputs, inputs, strict=True)
        for dim, size in zip(value.shape, spec.shape, strict=True)
        if isinstance(dim, ir.SymbolicDim)
    }
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(dim if isinstance(dim, int) else names.get(dim.value) for dim in value.shape)


def _without_module(model: ir.Model) -> ir.Model:
    """The same graph, which no longer holds the traced module: torch leaves its own nodes, and with them the program
    and its weights, in what nodes and values carry along; onnx-ir's containers keep values that have left the graph.
    """
    copy = model.clone()
    graph = copy.graph
    results = (output for node in graph for output in node.outputs)
    for held in (copy, graph, *graph, *results, *graph.inputs, *graph.initializers.values()):
        for key in [key for key, kept in held.meta.items() if isinstance(kept, _OF_TORCH)]:
            del held.meta[key]
    return copy


_OF_TORCH = (torch.fx.Node, torch.fx.GraphModule, torch.export.ExportedProgram)


def _strip_prefix(graph: ir.Graph, prefix: str) -> None:
    for value in list(graph.initializers.values()):
        value.name = value.const_value.name = value.name.removeprefix(prefix)
