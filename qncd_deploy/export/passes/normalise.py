"""Normalise a float graph: whatever exporter wrote it, the same few forms come out.

Constants are initializers, a transposed, reshaped or cast parameter is an initializer under the parameter's own name,
every Reshape has a constant target (the batch stays free), no op is left that does nothing, names are unique, and
nothing tells of the machine that traced the network. Running it twice changes nothing the second time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript import optimizer, version_converter

from qncd_deploy.export.passes.common import Refused, constant, initializer, oldest_ir_version, scalar, weighted_ops

OPSET = 18
NEWEST_OPSET = 20
"""Opset 21 brings GroupNormalization and 4-bit types that the runtimes of older devices do not take."""

_VIEWS = frozenset({"Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"})
_QUANTIZED |= {"MatMulInteger", "DynamicQuantizeLinear"}


def normalise(model: ir.Model) -> ir.Model:
    """Bring a float model into the normal form, in place, and return it.

    Raises: ExportError if it is quantized already, needs operators outside the ONNX standard, has control flow, or
    cannot be brought to opset 18 to 20.
    """
    parameters = frozenset(model.graph.initializers)
    with quiet("onnxscript", "onnx_ir"):
        for step in (UpgradeOpset(), common_passes.RemoveInitializersFromInputsPass(), FoldConstants()):
            step(model)
        for _ in range(_ROUNDS):
            modified = [step(model).modified for step in (common_passes.ShapeInferencePass(), Simplify())]
            common_passes.RemoveUnusedNodesPass()(model)
            if not modified[-1]:
                break
            FoldConstants()(model)
        for step in (
            UntieWeights(),
            ShareConstants(parameters),
            common_passes.CommonSubexpressionEliminationPass(),
            common_passes.RemoveUnusedNodesPass(),
            common_passes.TopologicalSortPass(),
            Forget(),
            NameNodes(),
        ):
            step(model)
    model.ir_version = oldest_ir_version(model.opset_imports[""])
    return model


_ROUNDS = 8  # each makes more constants visible to the next; two or three are enough for the exporters seen


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Only errors from these loggers: exporters warn of missing optional packages and of every op they skip."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class UpgradeOpset(ir.passes.InPlacePass):
    """Inline functions and bring the model to opset 18 to 20, refusing what could not be quantized anyway."""

    def requires(self, model: ir.Model) -> None:
        version = model.opset_imports.get("", 0)
        if version > NEWEST_OPSET:
            raise Refused(
                f"opset {version}: expected {NEWEST_OPSET} at most, which every TensorRT from 10.3 on can read. "
                f"Export the network again with opset_version={OPSET}."
            )
        for node in model.graph.all_nodes():
            if node.op_identifier() in model.functions:
                continue
            if node.domain != "":
                raise Refused(
                    f"{node.name}: operator {node.domain}.{node.op_type} is not part of the ONNX standard. "
                    "Export the network with standard operators only."
                )
            if node.op_type in _QUANTIZED:
                raise Refused(f"{node.name}: {node.op_type}, the graph is quantized already. Give the float network.")
            if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
                raise Refused(f"{node.name}: control flow ({node.op_type}). Export the network with fixed branches.")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = bool(model.functions)
        common_passes.InlinePass()(model)
        if model.opset_imports[""] < OPSET:
            version_converter.ConvertVersionPass(OPSET, fallback=True)(model)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if model.opset_imports[""] < OPSET:
            raise Refused(
                f"opset {model.opset_imports['']}: could not be converted to {OPSET}. "
                f"Export the network again with opset_version={OPSET}."
            )


class FoldConstants(ir.passes.InPlacePass):
    """Evaluate what depends on constants alone; what is only a view of one parameter keeps the parameter's name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        before = len(graph)
        views = _views_of_parameters(graph)
        optimizer.fold_constants(model, should_fold=_is_view)
        common_passes.CommonSubexpressionEliminationPass()(model)
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common_passes.RemoveUnusedNodesPass()(model)
        for value in list(graph.initializers.values()):
            parameter = views.get(value.name)
            if parameter is not None and parameter not in graph.initializers:
                # Every later stage hashes and writes it: a strided array would be copied each time.
                array = np.asarray(value.const_value.numpy(), order="C")
                value.name, value.const_value = parameter, ir.tensor(array, name=parameter)
        return ir.passes.PassResult(model, len(graph) != before)


def _is_view(node: ir.Node) -> bool | None:
    """Fold views of parameters whatever their size; leave the rest to the default limits."""
    return True if node.domain == "" and node.op_type in _VIEWS else None


def _views_of_parameters(graph: ir.Graph) -> dict[str, str]:
    """Names of values that are a parameter seen through views, and that parameter's name."""
    found: dict[str, str] = {}
    for node in graph:
        if _is_view(node) and (source := node.inputs[0]) is not None and len(node.outputs) == 1:
            if source.is_initializer():
                found[node.outputs[0].name] = source.name
            elif source.name in found:
                found[node.outputs[0].name] = found[source.name]
    return found


class Simplify(ir.passes.InPlacePass):
    """Remove ops that do nothing, turn known sizes into constants, pin Reshape targets, and write a swap of the last
    two axes as one Transpose.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.domain != "":
                continue
            if _does_nothing(node) and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                modified = True
            elif node.op_type in ("Gather", "Slice") and (dims := _static_dims(node)) is not None:
                y = node.outputs[0]
                y.replace_all_uses_with(initializer(model.graph, f"{y.name}_dims", dims))
                modified = True
            elif node.op_type == "Reshape":
                modified |= _swap_last_axes(node) or _pin_target(node)
        return ir.passes.PassResult(model, modified)


def _does_nothing(node: ir.Node) -> bool:
    if not node.inputs or node.inputs[0] is None or not node.outputs[0].uses():
        return False
    x, y = node.inputs[0], node.outputs[0]
    match node.op_type:
        case "Identity":
            return True
        case "Dropout":
            return all(not output.uses() for output in node.outputs[1:])
        case "Cast":
            return x.dtype is not None and x.dtype == node.attributes["to"].as_int()
        case "CastLike":
            return x.dtype is not None and node.inputs[1].dtype == x.dtype
        case "Transpose":
            perm = node.attributes.get("perm")
            return perm is not None and list(perm.as_ints()) == sorted(perm.as_ints())
        case "Mul" | "Div":
            return scalar(_before_expand(node.inputs[1])) == 1 and _same_shape(x, y)
        case "Slice":
            steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
            return steps is not None and (steps == 1).all() and _same_shape(x, y)
        case "Expand" | "Reshape":
            return _same_shape(x, y)
    return False


def _before_expand(value: ir.Value) -> ir.Value:
    """`timestep * ones(batch)` is how diffusers spreads one timestep over a batch."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Expand" else value


def _same_shape(x: ir.Value, y: ir.Value) -> bool:
    """Both shapes are known to be equal, symbolic dimensions by name."""
    return x.shape is not None and y.shape is not None and x.shape == y.shape and not any(map(_unknown, x.shape))


def _unknown(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is None


def _static_dims(node: ir.Node) -> np.ndarray | None:
    """The sizes that a Gather or Slice picks from a Shape, if none of them is free."""
    shape = node.inputs[0].producer()
    picks = [constant(value) for value in node.inputs[1:]]
    if shape is None or shape.op_type != "Shape" or shape.attributes or any(pick is None for pick in picks):
        return None
    if (of := shape.inputs[0].shape) is None or not node.outputs[0].uses() or node.outputs[0].is_graph_output():
        return None
    dims = np.array([dim if isinstance(dim, int) else -1 for dim in of], np.int64)
    if node.op_type == "Gather":
        chosen = dims[picks[0]]
    else:
        start, end, *rest = (int(pick.item()) for pick in picks)
        step = rest[1] if len(rest) > 1 else 1
        chosen = dims[slice(start, end, step)]
    return None if (np.asarray(chosen) < 0).any() else np.asarray(chosen, np.int64)


def _pin_target(node: ir.Node) -> bool:
    """Give a Reshape of known output shape a constant target: 0 keeps a free axis in place, -1 is the one rest."""
    x, y = node.inputs[0], node.outputs[0]
    if node.inputs[1].is_initializer() or y.shape is None:
        return False
    target = [dim if isinstance(dim, int) else -1 for dim in y.shape]
    if target.count(-1) > 1 and x.shape is not None:
        for axis, (before, after) in enumerate(zip(x.shape, y.shape, strict=False)):
            if isinstance(after, ir.SymbolicDim) and before == after and not _unknown(after):
                target[axis] = 0
    if target.count(-1) > 1 or 0 in y.shape:
        return False
    node.attributes.pop("allowzero", None)
    node.replace_input_with(1, _target(node.graph, target))
    return True


def _target(graph: ir.Graph, target: list[int]) -> ir.Value:
    return initializer(graph, "shape." + "x".join(map(str, target)), np.array(target, np.int64))


def _swap_last_axes(node: ir.Node) -> bool:
    """Reshape(Transpose(Reshape(x, (-1, L, D)), (0, 2, 1)), (..., D, L)) is Transpose(x, (..., n, n - 1)).

    torch's exporter writes the transposed keys of attention this way; runtimes recognise attention in the short form.
    """
    turn = node.inputs[0].producer()
    flat = turn.inputs[0].producer() if turn is not None and turn.op_type == "Transpose" else None
    if flat is None or flat.op_type != "Reshape" or list(turn.attributes["perm"].as_ints()) != [0, 2, 1]:
        return False
    x, y = flat.inputs[0], node.outputs[0]
    if x.shape is None or y.shape is None or flat.outputs[0].shape is None or len(x.shape) < 3:
        return False
    *outer, rows, columns = x.shape
    if list(y.shape) != [*outer, columns, rows] or list(flat.outputs[0].shape[1:]) != [rows, columns]:
        return False
    perm = [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2]
    swapped = ir.node("Transpose", [x], {"perm": perm}, name=node.name)
    swapped.outputs[0].name, swapped.outputs[0].shape, swapped.outputs[0].type = f"{y.name}_swapped", y.shape, y.type
    node.graph.insert_before(node, swapped)
    y.replace_all_uses_with(swapped.outputs[0])
    return True


class UntieWeights(ir.passes.InPlacePass):
    """Give every weighted op an initializer of its own (the bytes stay shared), so that a weight names one op."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        seen: dict[ir.Value, int] = {}
        for node, weight in weighted_ops(model.graph):
            seen[weight] = seen.get(weight, 0) + 1
            if seen[weight] > 1:
                node.replace_input_with(1, initializer(model.graph, f"{weight.name}.{seen[weight]}", constant(weight)))
        return ir.passes.PassResult(model, any(count > 1 for count in seen.values()))

    def ensures(self, model: ir.Model) -> None:
        weights = [weight.name for _, weight in weighted_ops(model.graph)]
        assert len(weights) == len(set(weights))


class ShareConstants(ir.passes.InPlacePass):
    """One initializer for equal constants; the parameters named in keep stay apart, as each is a layer's own."""

    def __init__(self, keep: frozenset[str]) -> None:
        super().__init__()
        self.keep = keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        first: dict[tuple[object, ...], ir.Value] = {}
        graph = model.graph
        before = len(graph.initializers)
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if value.name in self.keep or value.is_graph_output() or tensor.nbytes > _LARGE:
                continue
            kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                del graph.initializers[value.name]
        return ir.passes.PassResult(model, len(graph.initializers) != before)


_LARGE = 1 << 16  # bytes; what is larger is a weight


class Forget(ir.passes.InPlacePass):
    """Drop metadata and doc strings: source lines, paths and module names of the machine that traced the network."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = common_passes.ClearMetadataAndDocStringPass()(model).modified
        graph = model.graph
        outputs = (output for node in graph for output in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *outputs):
            modified |= bool(value.metadata_props or value.doc_string)
            value.metadata_props.clear()
            value.doc_string = None
        model.producer_name = "qncd-deploy"
        model.producer_version = model.domain = model.model_version = model.doc_string = None
        model.metadata_props.clear()
        return ir.passes.PassResult(model, modified)


class NameNodes(ir.passes.InPlacePass):
    """Unique names: values keep theirs where they can, nodes are named after their first output and their op."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = common_passes.NameFixPass()(model).modified
        for node in model.graph:
            name = f"{node.outputs[0].name}/{node.op_type}"
            modified |= node.name != name
            node.name = name
        return ir.passes.PassResult(model, modified)
