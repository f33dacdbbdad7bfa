"""What an engine really computes in: the kernels it was given, held against what its network asked for.

The network, once parsed, says which convolutions and matrix products take quantized operands (a DequantizeLinear feeds
them) and where attention is (a softmax). The engine says what became of each: TensorRT's inspector in JSON; TensorRT
for RTX, whose inspector wants a GPU, in the same words in its builder's log. Both name the ONNX nodes that a kernel
stands for, so every layer can be followed; elementwise kernels name the nodes whose scale or bias they apply, too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qncd_deploy.engines.base import Kernel
from qncd_deploy.engines.trt.library import Library, LogLine
from qncd_deploy.errors import EngineError

QUANTIZED = ("i8", "i4")
PRODUCTS = ("Convolution", "MatMul")


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of a network. node: its ONNX name;  layer: its weight's name, else its own;
    output: its result's name;  data, weight: types its operands are stored in, such as "i8" behind a DequantizeLinear;
    unpack: that of the weight, by its ONNX name, if there is one.
    """

    node: str
    layer: str
    output: str
    data: str
    weight: str
    unpack: str = ""

    @property
    def planned(self) -> bool:
        """Whether its weights are quantized."""
        return self.weight in QUANTIZED

    @property
    def weight_only(self) -> bool:
        """Whether they alone are: it multiplies floats."""
        return self.planned and self.data not in QUANTIZED


@dataclass(frozen=True)
class Demands:
    """What a network asks of its engine. attentions: the ONNX names of its softmaxes."""

    products: tuple[Product, ...]
    attentions: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine as its library tells it. kind: such as "correlation" (a convolution), "gemm", "kgen" (a
    generated kernel);  data, weights: types of its inputs and of its constants;  nodes: the ONNX nodes it stands for;
    profile: the optimization profile that its name or its tensors' tell, None where they tell none, as in the first.
    """

    name: str
    kind: str
    tactic: str
    data: tuple[str, ...]
    weights: tuple[str, ...]
    nodes: frozenset[str]
    profile: int | None = None

    @property
    def region(self) -> str | None:
        """The compiled region that it is part of, None outside of any."""
        found = _REGION.search(self.name)
        return None if found is None else found[1]

    @property
    def op(self) -> str:
        """Convolution, MatMul or Attention for what multiplies, else its kind."""
        if "mha" in self.name or "mha" in self.tactic:
            return "Attention"
        if self.kind == "correlation" or "conv" in self.kind.lower():
            return "Convolution"
        if re.search("gemm|mat(rix)?mul|fullyconnected", self.kind, re.I) or _FUSED_PRODUCT.match(self.name):
            return "MatMul"
        return self.kind

    @property
    def multiplies(self) -> bool:
        return self.op in PRODUCTS

    @property
    def operands(self) -> tuple[str, str]:
        """Types of the two that it multiplies; "" where it does not tell.

        A second input is what a convolution adds to its result, where constants are there to multiply with. A matrix
        product may multiply two inputs and have its factors alpha and beta for constants, which are never quantized.
        """
        first, second, *_ = (*self.data, *self.weights, "", "")
        if self.weights and (len(self.data) == 1 or self.op == "Convolution" or self.weights[0] in QUANTIZED):
            second = self.weights[0]
        return first, second

    @property
    def precision(self) -> str:
        """Of its arithmetic: that of its first operand."""
        return self.operands[0]


_REGION = re.compile(r"_myl(\d+)(?:_\d+)?$")
_FUSED_PRODUCT = re.compile(r"__myl_\w*Fc")  # TensorRT's names of kernels made of several operations: ...FcAddSilu


@dataclass(frozen=True)
class KernelTable:
    """What runs, and how far it is what was asked for.

    planned: products with quantized weights;  missed: those that no kernel takes as they are stored, each with what it
    runs in;  weight_only: how many of the planned multiply floats;  packed: in how many of these the kernel that
    multiplies takes the weights as they are stored;  float_products: kernels that multiply float32;  attentions, fused:
    softmaxes, and how many of them lie in one kernel with their products;  known: whether the library told its kernels
    in a form that can be read. Of several optimization profiles, kernels and float_products are the first one's.
    """

    kernels: tuple[Kernel, ...] = ()
    planned: int = 0
    missed: tuple[str, ...] = ()
    float_products: tuple[str, ...] = ()
    attentions: int = 0
    fused: int = 0
    weight_only: int = 0
    packed: int = 0
    known: bool = True

    @property
    def integer_kernels(self) -> int:
        """How many convolutions and products run on 8-bit integers."""
        return sum(kernel.count for kernel in self.kernels if kernel.integer and kernel.op in PRODUCTS)

    def line(self) -> str:
        """The table in one line."""
        if not self.known:
            return f"{self.planned} layers planned quantized, kernels not known"
        done = f"{self.planned - len(self.missed)} of {self.planned} planned layers"
        parts = [f"{done} run quantized"] * (self.planned > self.weight_only)
        if self.weight_only:
            parts = [f"{done} are stored as planned, the products of {self.packed} take packed weights"]
        if self.attentions:
            parts.append(f"{self.fused} of {self.attentions} attentions in one kernel")
        if self.float_products:
            parts.append(f"{len(self.float_products)} products of float32")
        return ", ".join(parts) or "nothing is quantized"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelTable:
        values = {
            **data,
            "kernels": tuple(Kernel(**kernel) for kernel in data["kernels"]),
            "missed": tuple(data["missed"]),
            "float_products": tuple(data["float_products"]),
        }
        return cls(**values)


def demands_of(library: Library, network: Any) -> Demands:
    """Read a parsed network (trt.INetworkDefinition)."""
    kinds = library.module.LayerType
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producer = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def stored(tensor: Any) -> tuple[str, str]:
        """Type that a tensor has where it is stored, and that place's name."""
        while True:
            layer = producer.get(tensor.name)
            if layer is None or layer.type not in (kinds.DEQUANTIZE, kinds.SHUFFLE):
                return _short(str(tensor.dtype)), tensor.name
            if layer.type == kinds.DEQUANTIZE:
                return _short(str(layer.get_input(0).dtype)), layer.get_output(0).name
            tensor = layer.get_input(0)

    products, attentions = [], []
    for layer in layers:
        if layer.type in (kinds.CONVOLUTION, kinds.MATRIX_MULTIPLY):
            data, _ = stored(layer.get_input(0))
            weight, place = stored(layer.get_input(1)) if layer.num_inputs > 1 else (data, layer.name)
            # The exporter names a weight's DequantizeLinear after the weight.
            name = place.removesuffix("_dq") if weight in QUANTIZED else layer.name
            unpack = producer[place].name if weight in QUANTIZED and place in producer else ""
            products.append(Product(layer.name, name, layer.get_output(0).name, data, weight, unpack))
        elif layer.type == kinds.SOFTMAX:
            attentions.append(layer.name)
    return Demands(tuple(products), tuple(attentions))


def layers_from_log(lines: Iterable[LogLine]) -> tuple[Layer, ...]:
    """The layers that a builder of detailed verbosity logs when it is done."""
    text = next((line.text for line in reversed(list(lines)) if line.text.startswith("Layers:")), "")
    return tuple(
        Layer(
            name=match["name"],
            kind=match["kind"],
            tactic=match["tactic"],
            data=_types(match["data"]),
            weights=_types(match["weights"]),
            nodes=frozenset(_NODE.findall(match["metadata"])),
            profile=_profile(match[0]),
        )
        for match in _LAYER.finditer(text)
    )


_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<data>.*?)\], Constants: \[(?P<weights>.*?)\], "
    r"Outputs: \[.*?\], TacticName: (?P<tactic>.*?), StreamId: .*?Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")


def layers_from_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in an engine inspector's JSON of the whole engine. Its keys are compared without their case: what
    TensorRT 10 calls "Datatype" is "DataType" in 11.

    Raises: EngineError if it is not that, or names the layers alone, as engines of less than detailed verbosity do.
    """
    try:
        entries = json.loads(text, object_pairs_hook=_lower)["layers"]
        if any(isinstance(entry, str) for entry in entries):
            raise EngineError("engine: tells nothing but layers' names.")
        return tuple(_inspected(entry) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(f"engine: the inspector's answer cannot be read ({exc}).") from exc


def kernel_table(demands: Demands, layers: Sequence[Layer]) -> KernelTable:
    """Hold what runs against what was asked for. layers: of all optimization profiles; () if they are not known."""
    planned = sum(product.planned for product in demands.products)
    if not layers:
        return KernelTable(planned=planned, attentions=len(demands.attentions), known=False)
    working = [layer for layer in layers if layer.kind not in _IDLE]
    counted = _of_first_profile(working)
    counts = Counter((layer.op, layer.precision, _implementation(layer)) for layer in counted)
    products = {product.node for product in demands.products}
    weight_only = [product for product in demands.products if product.weight_only]
    return KernelTable(
        kernels=tuple(Kernel(*key, count=count) for key, count in sorted(counts.items())),
        planned=planned,
        missed=tuple(_missed(demands, working)),
        float_products=tuple(
            layer.name for layer in counted if layer.multiplies and set(layer.operands) - {""} == {"f32"}
        ),
        attentions=len(demands.attentions),
        fused=sum(
            any(softmax in layer.nodes and layer.nodes & products for layer in working)
            for softmax in demands.attentions
        ),
        weight_only=len(weight_only),
        packed=sum(
            any(layer.multiplies and {product.node, product.unpack} <= layer.nodes for layer in working)
            for product in weight_only
        ),
    )


_IDLE = ("signal", "wait")  # between streams: nothing is computed


def _of_first_profile(layers: Sequence[Layer]) -> list[Layer]:
    """Every profile has kernels of its own. A compiled region's belong to one, though not each of them tells which:
    tensors within a region have names of its own.
    """
    others = {layer.region for layer in layers if layer.profile} - {None}
    return [layer for layer in layers if not layer.profile and layer.region not in others]


def _missed(demands: Demands, layers: Sequence[Layer]) -> Iterator[str]:
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.multiplies:
            for node in layer.nodes:
                by_node.setdefault(node, []).append(layer)
    for product in demands.products:
        found = [layer.operands for layer in by_node.get(product.node, ())]
        if (
            product.weight_only
            and product.weight == "i8"
            and any(product.unpack in layer.nodes and "i8" in layer.weights for layer in layers)
        ):
            continue  # TensorRT has no kernel that multiplies them packed: one of its own unpacks them in every run
        if product.planned and (not found or any(types != (product.data, product.weight) for types in found)):
            runs = " and ".join(sorted({" x ".join(types) for types in found})) or "nothing that multiplies"
            yield f"{product.layer} ({runs})"


def _implementation(layer: Layer) -> str:
    """A tactic's name without the hash of its arguments; generated kernels have a name each, and go by their kind."""
    tactic = re.sub(r"_?0x[0-9a-f]+$", "", layer.tactic)
    return layer.kind if not tactic or tactic.startswith("__my") else tactic


def _lower(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name.lower(): value for name, value in pairs}


def _inspected(entry: Mapping[str, Any]) -> Layer:
    def types(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        return tuple(_short(tensor.get("datatype") or tensor.get("format/datatype", "")) for tensor in tensors)

    weights = types(entry.get("constants", ()))
    if not weights and "weights" in entry:  # of layers outside of its compiled regions
        weights = (_short(entry["weights"].get("type", "")),)
    nodes = {*_NODE.findall(entry.get("metadata", "")), *re.split(r"\s*\+\s*", entry["name"])}
    return Layer(
        name=entry["name"],
        kind=entry.get("layertype", "other"),
        tactic=entry.get("tacticname", ""),
        data=types(entry.get("inputs", ())),
        weights=weights,
        nodes=frozenset(nodes),
        profile=_profile(json.dumps(entry)),
    )


def _profile(told: str) -> int | None:
    found = _PROFILE.search(told)
    return None if found is None else int(found[1])


def _types(tensors: str) -> tuple[str, ...]:
    return tuple(_short(name) for name in re.findall(r"Datatype: (\w+)", tensors))


def _short(text: str) -> str:
    """ "DataType.HALF", "Half", "Channel major FP16 format where channel % 8 == 0" -> "f16"; "" for none of ours."""
    found = _TYPE.search(text)
    return "" if found is None else _TYPES[found[0].lower()]


_TYPES = {
    "bfloat16": "bf16", "bf16": "bf16", "fp8": "f8", "fp16": "f16", "half": "f16", "fp32": "f32", "float": "f32",
    "uint8": "u8", "int8": "i8", "int4": "i4", "int32": "i32", "int64": "i64", "bool": "bool",
}  # fmt: skip
_TYPE = re.compile("|".join(_TYPES), re.IGNORECASE)
