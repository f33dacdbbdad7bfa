"""Write sibling graphs with their weights outside, equal weights once, and the same bytes every time.

    unet.onnx, unet-ort.onnx, ...      the graphs, with tensors below 1 KiB inside
    unet.data                          what two or more siblings share, and what only the first needs
    unet-float.data, unet-trt.data     what only that sibling needs
Offsets are multiples of 64 bytes, of a memory page for large tensors, so that runtimes can map the files. One tensor is
in memory at a time; nothing is ever one protobuf of more than 2 GB.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import onnx_ir as ir

INLINE_BYTES = 1024
_PAGE, _PAGED_FROM, _LINE = 4096, 1 << 16, 64

_Content: TypeAlias = tuple[str, int]
"""sha256 and length of a tensor's bytes."""


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int


def save_siblings(models: Mapping[str, ir.Model], folder: Path) -> tuple[Path, ...]:
    """Write every model under its file name into an existing folder, the first one's data file holding what is shared.

    Returns the written files. The models stay as they are. Raises OSError if the disk is full.
    """
    contents = {name: {id(t): _content(t) for t in _large_tensors(model)} for name, model in models.items()}
    files = _files(contents)
    places: dict[_Content, _Place] = {}
    written: list[Path] = []
    for data in dict.fromkeys(files.values()):
        with open(folder / data, "wb") as stream:
            for name, model in models.items():
                for tensor in _large_tensors(model):
                    content = contents[name][id(tensor)]
                    if files[content] == data and content not in places:
                        places[content] = _Place(data, _append(stream, tensor))
        written.append(folder / data)
    for name, model in models.items():
        written.append(folder / name)
        with open(folder / name, "wb") as stream:
            proto = ir.to_proto(_with_external(model, contents[name], places))
            stream.write(proto.SerializeToString(deterministic=True))
    return tuple(written)


def spill(model: ir.Model, data: Path) -> None:
    """Move a graph's large tensors to a new file, from which they are mapped when they are read; what lies in a file of
    that folder already stays there. The file must outlive the graph and its clones. Raises OSError if the disk is full.

    Small tensors become arrays of their own, since as views they would keep a whole checkpoint in memory.
    """
    with open(data, "wb") as stream:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes < INLINE_BYTES:
                value.const_value = ir.tensor(tensor.numpy().copy(), tensor.dtype, name=value.name)
            elif not _lies_in(tensor, data.parent):
                place = _Place(data.name, _append(stream, tensor))
                value.const_value = _external(tensor, place, value.name, folder=data.parent)


@contextmanager
def on_disk(model: ir.Model, folder: Path) -> Iterator[Path]:
    """A graph as a file for as long as the block lasts, beside the files that it was spilled to, which are not copied.

    The model lets go of what it has mapped of them: the next reader maps it anew. Raises OSError if the disk is full.
    """
    handle, name = tempfile.mkstemp(suffix=".onnx", dir=folder)
    path = Path(name)
    try:
        with open(handle, "wb") as stream:
            copy = model.clone()
            spill(copy, path.with_suffix(".data"))
            stream.write(ir.to_proto(copy).SerializeToString())
            del copy
        unmap(model)
        yield path
    finally:
        for file in (path, path.with_suffix(".data")):
            file.unlink(missing_ok=True)


def unmap(model: ir.Model) -> None:
    """Let go of what a graph has mapped of files: whoever reads it next maps it anew."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            place = _Place(tensor.location, tensor.offset)
            value.const_value = _external(tensor, place, value.name, folder=tensor.base_dir)


def _lies_in(tensor: ir.TensorProtocol, folder: Path) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).parent == folder


def _large_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in model.graph.initializers.values():
        if value.const_value.nbytes >= INLINE_BYTES:
            yield value.const_value


def _content(tensor: ir.TensorProtocol) -> _Content:
    return hashlib.sha256(tensor.tobytes()).hexdigest(), tensor.nbytes


def _files(contents: Mapping[str, Mapping[int, _Content]]) -> dict[_Content, str]:
    """Which data file each content goes to."""
    users: dict[_Content, set[str]] = {}
    for name, tensors in contents.items():
        for content in tensors.values():
            users.setdefault(content, set()).add(name)
    shared = _data_file(next(iter(contents)))
    return {content: _data_file(*names) if len(names) == 1 else shared for content, names in users.items()}


def _data_file(model: str) -> str:
    return f"{Path(model).stem}.data"


def _append(stream: BinaryIO, tensor: ir.TensorProtocol) -> int:
    """Pad to the next boundary and write; returns the offset."""
    boundary = _PAGE if tensor.nbytes >= _PAGED_FROM else _LINE
    stream.write(bytes(-stream.tell() % boundary))
    offset = stream.tell()
    stream.write(tensor.tobytes())
    return offset


def _with_external(model: ir.Model, contents: Mapping[int, _Content], places: Mapping[_Content, _Place]) -> ir.Model:
    """A copy of the graph whose large tensors are references to where they were written."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if (content := contents.get(id(tensor))) is not None:
            value.const_value = _external(tensor, places[content], value.name)
    return copy


def _external(tensor: ir.TensorProtocol, place: _Place, name: str, *, folder: Path | str = "") -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape)
    return ir.ExternalTensor(
        place.file, place.offset, tensor.nbytes, tensor.dtype, name=name, shape=shape, base_dir=folder
    )
