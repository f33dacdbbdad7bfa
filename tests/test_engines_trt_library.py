"""One table of names for every TensorRT; what is missing, too old or broken is said in one line; the GPU, as told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from trt_bindings import RECORD, WHEELS, names_of

from qncd_deploy.engines.base import BACKENDS, backend_status
from qncd_deploy.engines.trt import library as libraries
from qncd_deploy.engines.trt.device import Device, find_device
from qncd_deploy.engines.trt.library import API, Library, LogLine, Span, open_library, parse_version
from qncd_deploy.errors import BackendMissing

RECORDED: dict[str, list[str]] = json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", RECORDED)
def test_every_recorded_version_has_the_names_it_is_used_with(version: str) -> None:
    library = Library("tensorrt", None, parse_version(version))
    used = {name for name in API if library.uses(name)}
    assert used <= set(RECORDED[version])
    assert len(used) > 60
    assert not any(
        name.startswith("BuilderFlag.") and name[12:] in ("FP16", "BF16", "INT8", "INT4", "FP8") for name in API
    )


def test_the_record_is_of_all_names_in_the_table() -> None:
    """A name that no recorded version has, though it is used with one, was added without recording it again."""
    for_full = {name for name in API if "tensorrt" in API[name]}
    assert for_full <= {name for names in RECORDED.values() for name in names}


def test_what_differs_between_versions() -> None:
    def uses(flavour: str, *version: int) -> set[str]:
        return {name for name in API if Library(flavour, None, version).uses(name)}

    old, new, rtx = uses("tensorrt", 10, 3), uses("tensorrt", 11, 4), uses("tensorrt-rtx", 1, 7, 1)
    assert old - new == {"NetworkDefinitionCreationFlag.STRONGLY_TYPED"}
    assert new - old == {"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"}
    assert {"IBuilderConfig.set_compute_capability", "ComputeCapability.SM120"} <= rtx - new
    assert {"IBuilderConfig.set_timing_cache", "BuilderFlag.VERSION_COMPATIBLE"} <= new - rtx
    assert (10, 2) in Span(until=(10, 3)) and (10, 3) not in Span(until=(10, 3)) and (10, 3, 0) in Span((10, 3))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the libraries' stand-ins")
@pytest.mark.parametrize("version", WHEELS)
def test_the_record_is_what_the_vendors_bindings_say(version: str, tmp_path: Path) -> None:
    """Needs the package index."""
    assert names_of(WHEELS[version], tmp_path) == (version, RECORDED[version])


def test_tensorrt_for_rtx_itself_has_what_is_used() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    library = open_library("tensorrt-rtx")
    assert library.lacking == () and library.ahead_of_time
    assert library.version_text == library.module.__version__
    lines: list[LogLine] = []
    log = library.logger(lines)
    log.log(library.module.ILogger.Severity.ERROR, "x")
    assert lines == [LogLine("ERROR", "x")] and lines[0].is_error


def fake_module(version: str, *, without: str = "") -> ModuleType:
    """A module with every name of API but one."""
    module = ModuleType("tensorrt")
    module.__version__ = version
    for name in API:
        if name != without:
            owner, _, member = name.rpartition(".")
            place = vars(module).setdefault(owner, SimpleNamespace()) if owner else module
            setattr(place, member, object())
    return module


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt"), "not installed. Install it: pip install "),
        (
            ImportError("libnvinfer.so.10: cannot open shared object file\nmore"),
            "cannot be loaded (libnvinfer.so.10: cannot open shared object file). Install it: ",
        ),
        (OSError("libcudart.so.12: cannot open"), "cannot be loaded (libcudart.so.12: cannot open). Install it: "),
        (ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"), "cannot be loaded (No module"),
        (fake_module("8.6.2"), "version 8.6.2, expected 10.3 or newer. Install it: pip install "),
        (
            fake_module("10.3.0", without="IExecutionContext.execute_async_v3"),
            "version 10.3.0 lacks IExecutionContext.execute_async_v3. Install it: ",
        ),
    ],
)
def test_what_is_missing_is_one_line(module: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        assert name == "tensorrt"
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(libraries.importlib, "import_module", load)
    with pytest.raises(BackendMissing) as caught:
        open_library("tensorrt")
    assert str(caught.value).startswith(f"tensorrt: {words}") and "\n" not in str(caught.value)
    assert 'pip install ".[tensorrt]" in the checkout' in str(caught.value)


def test_on_a_jetson_it_is_jetpack_that_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libraries, "JETSON", tmp_path)
    monkeypatch.setattr(libraries.importlib, "import_module", lambda name: fake_module("8.6.2"))
    with pytest.raises(BackendMissing, match=r"version 8\.6\.2, expected 10\.3 or newer\. JetPack 6\.1 is the first"):
        open_library("tensorrt")
    monkeypatch.undo()
    monkeypatch.setattr(libraries, "JETSON", tmp_path)
    if open_is_missing("tensorrt"):
        with pytest.raises(BackendMissing, match=r'site-packages`, then pip install "\.\[jetson\]" in the checkout\.'):
            open_library("tensorrt")


def open_is_missing(flavour: str) -> bool:
    try:
        __import__(libraries.MODULES[flavour])
    except (ImportError, OSError):
        return True
    return False


def test_there_is_no_tensorrt_for_rtx_on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'tensorrt_rtx'", name=name)

    monkeypatch.setattr(libraries.importlib, "import_module", load)
    monkeypatch.setattr(libraries.platform, "machine", lambda: "aarch64")
    with pytest.raises(BackendMissing, match=r"not installed\. There is none for aarch64: use --backend tensorrt\.$"):
        open_library("tensorrt-rtx")


def test_post_releases_are_versions_too() -> None:
    assert parse_version("10.14.1.48.post1") == (10, 14, 1, 48)


def test_doctor_says_what_is_missing_of_either() -> None:
    """On a machine without a GPU neither runs, whatever is installed."""
    try:
        find_device()
    except BackendMissing:
        for name in ("tensorrt", "tensorrt-rtx"):
            missing = backend_status(BACKENDS[name]).missing
            assert missing is not None and "\n" not in missing


class Driver:
    """libcuda with one GPU, whose functions write through the pointers they are given."""

    def __init__(self, failing: str = "", code: int = 0) -> None:
        self._failing, self._code = failing, code

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == self._failing:
                return self._code
            if name == "cuDeviceGetName":
                args[0].value = b"NVIDIA L4"
            elif name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: 8, 76: 9}[args[1]]
            elif name == "cuDeviceTotalMem_v2":
                args[0]._obj.value = 24 << 30
            elif name == "cuDriverGetVersion":
                args[0]._obj.value = 12080
            elif name == "cuGetErrorString" and args[0] == 100:
                args[1]._obj.value = b"no CUDA-capable device is detected"
            return 0

        return call


def test_the_driver_tells_the_gpu() -> None:
    assert find_device(lambda name: Driver()) == Device("NVIDIA L4", "sm89", 24 << 30, "12.8")


def test_no_driver_and_no_gpu_are_one_line() -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(
        BackendMissing, match=r"no NVIDIA driver on this machine \(libcuda\.so\.1 was not found\)\. Install"
    ):
        find_device(absent)
    words = (
        r"none that can be used on this machine \(cuInit: no CUDA-capable device is detected\)\. Check `nvidia-smi`\."
    )
    with pytest.raises(BackendMissing, match=words):
        find_device(lambda name: Driver("cuInit", 100))
    with pytest.raises(BackendMissing, match=r"\(cuDeviceGet: code 101\)"):
        find_device(lambda name: Driver("cuDeviceGet", 101))
