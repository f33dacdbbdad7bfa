"""Checkpoint files: what is read, what is refused in one line, and that nothing in a file ever runs."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="reading checkpoints needs torch")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="reading safetensors needs safetensors")

from qncd_deploy.checkpoint import Source, load_weights, own_names, read_checkpoint  # noqa: E402
from qncd_deploy.errors import CheckpointError  # noqa: E402

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        OrderedDict(STATE),
        {"state_dict": STATE, "global_step": 12, "epoch": 1.5},
        {"model": {"x": torch.zeros(1)}, "ema": STATE},
        {"model": STATE, "optimizer": {"state": {}}},
        {"module": {"state_dict": STATE}},
        {"state_dict": {**STATE, "version": 3}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_containers(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert set(checkpoint.tensors) == set(STATE)
    assert all(torch.equal(checkpoint.tensors[name], value) for name, value in STATE.items())
    assert checkpoint.scalars == ({"global_step": 12, "epoch": 1.5} if "global_step" in content else {})


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_torch.save_file(STATE, path)
    assert all(torch.equal(read_checkpoint(path).tensors[name], value) for name, value in STATE.items())


class Payload:
    """Unpickling this runs a command, as a hostile checkpoint would."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle-2", "pickle-4"])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    path, witness = tmp_path / "evil.ckpt", tmp_path / "ran"
    content = {"callbacks": Payload(f"touch {witness}"), "state_dict": STATE}
    # torch reads protocol 2 only; what it cannot even read, it cannot name
    named = r"asks to run or build '\w+\.system', expected weights"
    words = "not a torch checkpoint" if how == "pickle-4" else named

    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    if how.startswith("pickle"):  # the payload is live: an ordinary reader would have run it
        pickle.loads(path.read_bytes())
        assert witness.exists()


def test_lightning_leftovers_are_replaced_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published CompVis files hold Lightning's callbacks, as class and as instance."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    callback = module.ModelCheckpoint()
    callback.best = 3
    path = tmp_path / "x.ckpt"
    with monkeypatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": STATE, "callbacks": {module.ModelCheckpoint: {"object": callback}}}, path)
    assert set(read_checkpoint(path).tensors) == set(STATE)
    assert name not in sys.modules


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


def truncated(path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(STATE, path)
    else:
        torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    "name, write, words",
    [
        ("x.ckpt", lambda path: path.write_bytes(b""), "the file is empty"),
        (
            "x.ckpt",
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid 1"),
            "Git LFS pointer",
        ),
        ("x.ckpt", lambda path: path.write_text("<html>404 not found</html>"), "not a torch checkpoint"),
        ("x.ckpt", lambda path: path.write_text("just some notes\n" * 50), "torch checkpoint"),
        ("x.ckpt", foreign_zip, "not a complete torch checkpoint"),
        ("x.ckpt", truncated, "not a complete torch checkpoint"),
        ("x.ckpt", lambda path: torch.save([1, 2], path), "holds no named tensors"),
        ("x.ckpt", lambda path: torch.save({"state_dict": {}}, path), "holds no named tensors"),
        ("x.safetensors", truncated, "not a complete safetensors file"),
        (
            "x.safetensors",
            lambda path: path.write_text("<html>404 not found</html>"),
            "not a complete safetensors file",
        ),
        ("x.h5", lambda path: path.write_text("x"), "not a checkpoint name, expected .ckpt"),
        ("x.ckpt", lambda path: None, "cannot be read"),
        ("x.ckpt", lambda path: path.mkdir(), "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_gets_one_line(tmp_path: Path, name: str, write: Any, words: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert words in str(caught.value) and str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.ckpt", tmp_path / "x.ckpt"
    torch.save(STATE, whole)
    data = whole.read_bytes()
    for size in range(0, len(data) - 1, 37):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def linear() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})


def load(module: torch.nn.Module, tensors: dict[str, Any], sources: dict[str, Source] | None = None) -> None:
    load_weights(
        module,
        sources or own_names(module),
        tensors,
        where="x.ckpt",
        prefix="net.",
        asked_by="config.yaml",
        blame=lambda key, dim: f"the entry for {key}, dim {dim}",
    )


def test_weights_are_taken_not_copied() -> None:
    module = linear()
    load(module, STATE)
    assert module["a"].weight.data_ptr() == STATE["a.weight"].data_ptr()
    assert not module.training and not module["a"].weight.requires_grad


@pytest.mark.parametrize(
    "tensors, words",
    [
        (
            {**STATE, "a.weight": torch.ones(2, 4)},
            "x.ckpt: tensor 'net.a.weight' is 2x4, config.yaml makes it 2x3. Check the entry for a.weight, dim 1.",
        ),
        (
            {"a.weight": STATE["a.weight"], "b.bias": STATE["a.bias"]},
            "x.ckpt: not the network that config.yaml describes, 1 tensors missing (first: 'net.a.bias') and "
            "1 tensors without a place (first: 'net.b.bias'). Check the entry for a.bias, dim None.",
        ),
        (
            {**STATE, "a.bias": torch.tensor([1.0, torch.inf], dtype=torch.float16)},
            "x.ckpt: tensor 'net.a.bias' holds NaN or infinity. The checkpoint is damaged or diverged.",
        ),
        (
            {**STATE, "a.bias": torch.tensor([1, 2])},
            "x.ckpt: tensor 'net.a.bias' is torch.int64, expected floating-point weights.",
        ),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(linear(), tensors)
    assert str(caught.value) == words


def test_a_double_that_overflows_float32_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'net\.a\.bias' holds NaN or infinity"):
        load(linear(), {**STATE, "a.bias": torch.tensor([1.0, 1e300], dtype=torch.float64)})


def test_take_reads_a_part() -> None:
    module = linear()
    sources = own_names(module) | {"a.bias": Source("a.fused", (4,), lambda tensor: tensor[2:])}
    load(module, {"a.weight": STATE["a.weight"], "a.fused": torch.arange(4, dtype=torch.bfloat16)}, sources)
    assert module["a"].bias.tolist() == [2.0, 3.0] and module["a"].bias.dtype == torch.float32
