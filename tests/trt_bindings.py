"""What names the vendor's own Python bindings of TensorRT have; asking them takes neither a GPU nor its libraries.

    python tests/trt_bindings.py     writes trt_names.json: which names of engines/trt/library.API each version has

The bindings are wheels of a megabyte from the package index; the libraries that they link to are replaced by empty ones
(a C compiler is needed), since nothing is called.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from qncd_deploy.engines.trt.library import API

RECORD = Path(__file__).with_name("trt_names.json")

WHEELS = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",  # JetPack 6's
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",  # JetPack 7.2's
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}

_ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion",
    "getPluginRegistry", "getBuilderPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip

_LIST = """
import json, sys
import tensorrt_bindings as module
def has(name):
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None
print(json.dumps([module.__version__, [name for name in json.load(sys.stdin) if has(name)]]))
"""


def names_of(requirement: str, folder: Path) -> tuple[str, list[str]]:
    """Version of the bindings that a requirement names, and what they have of API, for this Python.

    Raises: CalledProcessError if they cannot be had or imported.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    subprocess.run([*pip, requirement], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in _ENTRY_POINTS))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        for major in (10, 11):
            target = folder / f"lib{library}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", target, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _LIST],
        input=json.dumps(list(API)),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)},
    )
    version, names = json.loads(done.stdout)
    return version, names


def record(requirements: Sequence[str]) -> dict[str, list[str]]:
    found = {}
    for requirement in requirements:
        folder = Path(tempfile.mkdtemp())
        try:
            version, names = names_of(requirement, folder)
        finally:
            shutil.rmtree(folder)
        found[version] = names
    return found


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(list(WHEELS.values())), indent=1) + "\n", encoding="utf-8")
