"""Weights in: a checkpoint file becomes named tensors, and named tensors become a float32 module.

    file -> read_checkpoint -> tensors by name -> load_weights(module on "meta", sources) -> float32 module

A checkpoint is untrusted: pickles load with weights_only=True, so nothing in them runs. Files are mapped, not read, and
the module takes the tensors themselves, so a float32 checkpoint is never held twice.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qncd_deploy.errors import CheckpointError, first_line

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_CONTAINERS = ("state_dict", "model_state_dict", "ema", "model_ema", "model", "module")  # the averaged weights first
_INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds: tensors by name, and the numbers beside them (`global_step`, `epoch`)."""

    path: Path
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, int | float]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with the prefix, without it."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read `.ckpt`, `.pt`, `.pth`, `.bin` (torch, weights only) or `.safetensors`; the tensors are mapped, not copied.

    The state dict may be bare, or lie under `state_dict`, `model_state_dict`, `ema`, `model` or `module`; of a list,
    as ermongroup/ddim writes it, the last one is taken: its averaged weights.
    Raises: CheckpointError if the file is missing, truncated, of another kind, or holds anything but weights.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty. Download or copy it again.")
    if head == _LFS_POINTER:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights. Run `git lfs pull` where it came from.")
    if path.suffix == ".safetensors":
        return Checkpoint(path, _safetensors(path), {})
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path}: not a checkpoint name, expected {', '.join(TORCH_SUFFIXES)} or .safetensors. "
            "Rename the file after what it holds."
        )
    data = _unpickled(path, zipped=head.startswith(_ZIP))
    tensors = {name: value for name, value in _state_dict(data).items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors, expected a state dict. Give the model's checkpoint.")
    numbers = data if isinstance(data, Mapping) else {}
    return Checkpoint(path, tensors, {key: value for key, value in numbers.items() if isinstance(value, (int, float))})


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from: tensor `key` of the checkpoint, of shape `shape`, through `take` if given."""

    key: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] | None = None


def own_names(module: nn.Module) -> dict[str, Source]:
    """Sources of a module whose checkpoint uses the module's own names."""
    return {name: Source(name, tuple(value.shape)) for name, value in module.state_dict().items()}


def load_weights(
    module: nn.Module,
    sources: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    prefix: str = "",
    asked_by: str,
    blame: Callable[[str, int | None], str],
) -> None:
    """Fill `module` (built on the meta device) in float32, by `sources`; set it to eval, without gradients.

    Every source must be in `tensors`, every tensor must be used, shapes must agree, and values must be finite.
    Args:   where, prefix: the file and the common prefix of its names, for messages.   asked_by: the config file.
            blame: (tensor name, dimension that differs or None) -> the config entry that most likely is wrong.
    Raises: CheckpointError naming the first tensor at fault.
    """
    for source in sources.values():
        found = tensors.get(source.key)
        if found is not None and tuple(found.shape) != source.shape:
            raise CheckpointError(
                f"{where}: tensor '{prefix}{source.key}' is {_shape(found.shape)}, {asked_by} makes it "
                f"{_shape(source.shape)}. Check {blame(source.key, _first_difference(source.shape, found.shape))}."
            )
    wanted = {source.key: None for source in sources.values()}
    missing = [key for key in wanted if key not in tensors]
    spare = [key for key in tensors if key not in wanted]
    if missing or spare:
        likeliest = Counter(blame(key, None) for key in [*missing, *spare]).most_common(1)[0][0]
        parts = [
            f"{len(names)} {what} ({_first(names, prefix)})"
            for names, what in ((missing, "tensors missing"), (spare, "tensors without a place"))
            if names
        ]
        raise CheckpointError(
            f"{where}: not the network that {asked_by} describes, {' and '.join(parts)}. Check {likeliest}."
        )
    state = {name: _float32(tensors[source.key], source, where, prefix) for name, source in sources.items()}
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def finite_float32(tensor: Tensor, *, where: str, name: str) -> Tensor:
    """The tensor in float32, itself if it already is. Raises CheckpointError on integers, NaN or infinity."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"{where}: tensor '{name}' is {tensor.dtype}, expected floating-point weights.")
    values = tensor.to(torch.float32)
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{where}: tensor '{name}' holds NaN or infinity. The checkpoint is damaged or diverged.")
    return values


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({first_line(error)}). Download or copy it again."
        ) from error


def _unpickled(path: Path, *, zipped: bool) -> Any:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []  # reads, runs nothing
        refused = next((name for name in foreign if not name.startswith(_INERT_PACKAGES)), None)
        if refused is None:
            # Lightning stores objects of its own beside the weights: an inert stand-in replaces them, none is imported.
            with torch.serialization.safe_globals([(_Inert, name) for name in foreign]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of an unusual pickle, then refuses it: one line is enough
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:  # not zipped: code, or another file altogether
        match = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if match is None:
            raise CheckpointError(f"{path}: not a torch checkpoint. Give the model's checkpoint file.") from error
        refused = match[1]
    except Exception as error:  # the reader has no error type of its own: RuntimeError, EOFError, KeyError, ...
        raise CheckpointError(
            f"{path}: not a complete torch checkpoint ({first_line(error)}). Download or copy it again."
        ) from error
    raise CheckpointError(
        f"{path}: asks to run or build '{refused}', expected weights alone; nothing of it was run. "
        "If you trust its maker, ask for the state dict or a safetensors file."
    )


class _Inert:
    """Stands for an object that is not weights: takes any arguments and state, does nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _state_dict(data: Any) -> Mapping[str, Any]:
    """Follow the containers of `_CONTAINERS` down to the mapping that holds the tensors."""
    if isinstance(data, list | tuple):  # [model, optimizer, epoch, step, averaged weights]
        found = [state for state in map(_state_dict, data) if any(isinstance(v, Tensor) for v in state.values())]
        return found[-1] if found else {}
    if not isinstance(data, Mapping):
        return {}
    inner = next((data[key] for key in _CONTAINERS if isinstance(data.get(key), Mapping)), None)
    return data if inner is None else _state_dict(inner)


def _float32(tensor: Tensor, source: Source, where: str, prefix: str) -> Tensor:
    values = finite_float32(tensor, where=where, name=prefix + source.key)
    return values if source.take is None else source.take(values)


def _first_difference(a: tuple[int, ...], b: Iterable[int]) -> int | None:
    b = tuple(b)
    return next((i for i in range(len(a)) if a[i] != b[i]), None) if len(a) == len(b) else None


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _first(names: list[str], prefix: str, count: int = 3) -> str:
    return "first: " + ", ".join(f"'{prefix}{name}'" for name in names[:count])
