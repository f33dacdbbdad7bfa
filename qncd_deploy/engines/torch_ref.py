"""The yardstick: an ONNX graph run node by node in torch, with no fusion, folding or rewriting.

Plain, so that what the other engines return can be held against it: every Q/DQ pair rounds where the graph says, and
every tensor between two nodes can be read. On a GPU it computes the same in float32 (no TF32), which is what exporting
a large network there runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import external_data_helper, numpy_helper
from torch import Tensor

from qncd_deploy.engines.base import Backend, BaseEngine, Remainder, check_feeds
from qncd_deploy.engines.torch_ops import OPERATORS, Operator, torch_dtype
from qncd_deploy.engines.torch_place import CPU, READ_AS_NUMBERS, exactly, placed, together
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError, first_line
from qncd_deploy.specs import TensorSpec

OPSETS = range(13, 24)

Wrap = Callable[[str, Operator], Operator]


def _unwrapped(name: str, run: Operator) -> Operator:
    return run


class TorchEngine(BaseEngine):
    """Interprets an ONNX graph with the table in torch_ops; tensors are dropped after their last use."""

    device = CPU

    def __init__(self, path: Path, *, engine_id: str, remainder: Remainder, threads: int | None) -> None:
        assert remainder == "f32"
        try:
            model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
        except Exception as exc:  # protobuf and onnx raise unrelated classes
            raise BuildFailed(f"{path}: not a readable ONNX file ({first_line(exc)}).") from exc
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if opset not in OPSETS:
            raise BuildFailed(f"{path}: opset {opset}, the torch engine knows {OPSETS.start} to {OPSETS.stop - 1}.")
        graph = model.graph
        if unknown := sorted({n.op_type for n in graph.node if n.domain or n.op_type not in OPERATORS}):
            raise BuildFailed(f"{path}: the torch engine has no operator {', '.join(unknown)}.")
        nibbles = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT4}
        if any(n.op_type == "QuantizeLinear" and nibbles & {*n.input} for n in graph.node):
            raise BuildFailed(f"{path}: the torch engine reads 4-bit tensors, it makes none.")
        try:
            numbers = {name for node in graph.node if node.op_type in READ_AS_NUMBERS for name in node.input[1:]}
            weights = {tensor.name: _weight(tensor, path.parent) for tensor in graph.initializer}
            values = {name: placed(weight, self.device) for name, weight in weights.items() if name not in numbers}
            self._weights = {**weights, **values}
            self._nodes = [(node, _attributes(node)) for node in graph.node]
            given = [value for value in graph.input if value.name not in self._weights]
            inputs = {value.name: _spec(value) for value in given}
            outputs = {value.name: _spec(value) for value in graph.output}
        except (ValueError, OSError, torch.OutOfMemoryError) as exc:
            raise BuildFailed(f"{path}: {first_line(exc)}.") from exc
        self._threads = threads
        self._expired = _last_uses(graph)
        super().__init__(engine_id, path, inputs, outputs)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = dict(self._computed(feeds, self.outputs))
        return {name: found[name] for name in self.outputs}

    def stream(self, feeds: Mapping[str, np.ndarray], names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors of the graph by name, inner ones too, each as soon as it is computed; nothing behind the last of them
        is computed. Raises EngineError as a call does, and for a name that is not there.
        """
        known = self.inputs.keys() | self._weights.keys() | {name for node, _ in self._nodes for name in node.output}
        if unknown := sorted(set(names) - known):
            raise EngineError(f"{self.path}: has no tensor {unknown[0]!r}.")
        return self._computed(check_feeds(self.path, self.inputs, feeds), names)

    def _computed(self, feeds: Mapping[str, np.ndarray], names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        wanted = set(names)
        values = self._values({name: placed(torch.tensor(array), self.device) for name, array in feeds.items()})
        while wanted:
            with self._settings(), torch.inference_mode():  # not while the caller has the turn
                name, tensor = next(values)
                array = tensor.cpu().numpy() if name in wanted else None
            if array is not None:
                wanted.remove(name)
                yield name, array

    def input_gradients(
        self, feeds: Mapping[str, np.ndarray], nodes: Collection[str], cotangent: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What some nodes read, and the gradient of sum(cotangent * out) with respect to it, by name of their output.

        A tensor that several nodes read has one gradient for each of them: of the path through that node alone.
        out: the graph's only output. Nodes that the float inputs do not reach are left out.
        """
        taps: dict[str, Tensor] = {}

        def tapped(name: str, run: Operator) -> Operator:
            def operator(x: Tensor, *others: Tensor | None, **attributes: Any) -> Tensor | tuple[Tensor, ...]:
                taps[name] = x.view_as(x)
                return run(taps[name], *others, **attributes)

            return operator if name in nodes else run

        with self._settings(), torch.enable_grad():
            (out,) = self._interpret(self._differentiable(feeds), tapped).values()
            reached = {name: tensor for name, tensor in taps.items() if tensor.requires_grad}
            weights = placed(torch.from_numpy(cotangent), self.device)
            found = torch.autograd.grad(out, list(reached.values()), weights, allow_unused=True)
        return {
            name: (tensor.detach().cpu().numpy(), gradient.cpu().numpy())
            for (name, tensor), gradient in zip(reached.items(), found, strict=True)
            if gradient is not None
        }

    def weight_effects(
        self,
        feeds: Mapping[str, np.ndarray],
        errors: Mapping[str, Callable[[], Sequence[np.ndarray]]],
        cotangent: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """How far errors of a node's weight, its second input, move each row of cotangent * out, to first order.

        errors: by name of a node's output, what makes the errors, arrays of the weight's shape, when they are needed.
        Returns (errors, rows) float64 by the same names: the inner product in each row of op(x, error) and the gradient
        at the node's output. out: the graph's only output. Nodes that it does not depend on are left out.
        """
        found: dict[str, np.ndarray] = {}

        def watched(name: str, run: Operator) -> Operator:
            def operator(x: Tensor, *others: Tensor | None, **attributes: Any) -> Tensor | tuple[Tensor, ...]:
                def measure(gradient: Tensor) -> None:
                    given = (placed(torch.from_numpy(error), self.device) for error in errors[name]())
                    moved = (run(x.detach(), error, **attributes) for error in given)
                    rows = [(gradient * each).reshape(len(cotangent), -1).sum(1, dtype=torch.float64) for each in moved]
                    found[name] = torch.stack(rows).cpu().numpy()

                y = run(x, *others, **attributes)
                assert isinstance(y, Tensor)
                y.requires_grad_().register_hook(measure)  # required where no float input of the graph reaches it, too
                return y

            return operator if name in errors else run

        with self._settings(), torch.enable_grad():
            (out,) = self._interpret(self._differentiable(feeds), watched).values()
            out.backward(placed(torch.from_numpy(cotangent), self.device))
        return found

    def _differentiable(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        checked = check_feeds(self.path, self.inputs, feeds)
        given = {name: placed(torch.tensor(array), self.device) for name, array in checked.items()}
        return {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in given.items()}

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """torch's own, which are the program's, as this engine computes."""
        usual = torch.get_num_threads()
        torch.set_num_threads(self._threads or usual)
        try:
            with exactly(self.device):
                yield
        finally:
            torch.set_num_threads(usual)

    def _interpret(self, values: dict[str, Tensor], wrap: Wrap = _unwrapped) -> dict[str, Tensor]:
        """Outputs by name. wrap: what to run for a node, from the name of its first output and its operator."""
        found = {name: tensor for name, tensor in self._values(values, wrap) if name in self.outputs}
        return {name: found[name] for name in self.outputs}

    def _values(self, values: dict[str, Tensor], wrap: Wrap = _unwrapped) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name: weights and inputs, then what each node puts out."""
        values = {**self._weights, **values}
        yield from list(values.items())
        for (node, attributes), expired in zip(self._nodes, self._expired, strict=True):
            inputs = together(node.op_type, [values[name] if name else None for name in node.input], self.device)
            try:
                results = wrap(node.output[0], OPERATORS[node.op_type])(*inputs, **attributes)
            except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as exc:
                where = f"{node.op_type} {node.name or node.output[0]!r}"
                raise EngineError(f"{self.path}: {where} failed in the torch engine ({first_line(exc)}).") from exc
            several = results if isinstance(results, tuple) else (results,)
            made = dict(zip(node.output, several, strict=False))  # optional outputs at the end may be left out
            values |= made
            yield from made.items()
            for name in expired:
                values.pop(name, None)

    def _close(self) -> None:
        self._weights.clear()
        self._nodes.clear()


class TorchCudaEngine(TorchEngine):
    """The same on an NVIDIA GPU."""

    device = torch.device("cuda")

    @classmethod
    def library_version(cls, backend: Backend) -> str | None:
        if not torch.cuda.is_available():
            raise BackendMissing(
                f"{backend.name}: torch {torch.__version__} finds no CUDA device. It needs an NVIDIA GPU and a torch "
                "built for CUDA: pip install torch"
            )
        return super().library_version(backend)


def _last_uses(graph: onnx.GraphProto) -> list[list[str]]:
    """For each node, the tensors that no later node reads and that the graph does not return."""
    kept = {value.name for value in graph.output}
    expired: list[list[str]] = []
    for node in reversed(graph.node):
        ended = {name for name in [*node.input, *node.output] if name} - kept
        expired.append(sorted(ended))
        kept |= ended
    return expired[::-1]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    return value.decode() if isinstance(value, bytes) else value


def _weight(tensor: onnx.TensorProto, folder: Path) -> Tensor:
    """A float weight that lies outside is mapped, not read: it may be gigabytes."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return _tensor(tensor)
    if tensor.data_type == onnx.TensorProto.FLOAT:
        info = external_data_helper.ExternalDataInfo(tensor)
        # written to, a page becomes the process's own
        array = np.memmap(folder / info.location, "<f4", "c", info.offset or 0, tuple(tensor.dims))
        return torch.from_numpy(np.asarray(array))
    external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    return _tensor(tensor)


def _tensor(tensor: onnx.TensorProto) -> Tensor:
    dtype = torch_dtype(tensor.data_type)  # before reading: NumPy has stand-ins for types that torch lacks
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor).astype(_stand_in(dtype)))).to(dtype)


def _stand_in(dtype: torch.dtype) -> type | np.dtype:
    return np.dtype(np.float32) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dims = enumerate(kind.shape.dim)
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or f"dim{axis}" for axis, d in dims)
    return TensorSpec(value.name, str(torch_dtype(kind.elem_type)).removeprefix("torch."), shape)
