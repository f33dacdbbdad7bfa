"""The house rule: imports go one way, heavy libraries stay on their islands, the runtime needs NumPy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qncd_deploy"

ORDER = (
    "errors", "specs", "files", "bundle", "prompts", "subjects", "schedule", "timesteps", "steps", "stepping",
    "correct", "sample", "study", "checkpoint", "models", "calib", "quant", "export", "engines", "reconstruct",
    "pictures", "conditions", "sampler", "runtime", "drop_in", "evaluate", "pipeline", "cli",
)  # fmt: skip

EXPORTING = tuple(f"pipeline/{name}.py" for name in (
    "calibrate", "network", "first_token", "samples", "smoothing", "splitting", "draft", "bits", "quantize",
    "output_error", "free_run", "sensitivity", "export", "dry_run", "half_twin",
))  # fmt: skip
"""Parts of the pipeline that only `qncd export` runs, and `qncd bench` where it can."""

ISLANDS = {
    "torch": (
        "checkpoint",
        "models",
        "quant",
        "export/trace.py",
        "engines/torch_",
        "reconstruct",
        "evaluate/perceptual.py",
        "drop_in",
    ),
    "diffusers": ("models", "drop_in"),
    "safetensors": ("checkpoint",),
    "huggingface_hub": ("models/hub.py",),
    "yaml": ("models", "pipeline/network.py"),
    "onnx": ("export", "engines/torch_"),
    "onnx_ir": ("export", "reconstruct", *EXPORTING),
    "networkx": ("export/blocks.py",),
    "onnxscript": ("export",),
    "scipy": ("quant/program.py",),
    "openvino": ("engines/openvino.py",),
    "onnxruntime": ("engines/ort",),
    "jinja2": ("evaluate/report.py",),
    "matplotlib": ("evaluate/plots.py",),
    "lpips": ("evaluate/perceptual.py",),
    "ray": ("evaluate/ray_crew.py",),
    "cupy": ("engines/trt/cuda.py",),
    "tensorrt": ("engines/trt/library.py",),
    "tensorrt_rtx": ("engines/trt/library.py",),
}
"""Where a heavy library may be imported, by the beginning of the path; everywhere else needs NumPy alone."""


def _modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        yield path, place.parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions too; `if TYPE_CHECKING` blocks are not code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_every_module_has_a_place_in_the_order() -> None:
    assert {part for _, part in _modules()} - {"__init__", "__main__"} <= set(ORDER)


@pytest.mark.parametrize(("path", "part"), [pytest.param(p, q, id=str(p.relative_to(PACKAGE))) for p, q in _modules()])
def test_imports_go_left_only(path: Path, part: str) -> None:
    if part in ("__init__", "__main__"):
        return
    for name in _imported(path):
        if name.startswith("qncd_deploy."):
            target = name.split(".")[1]
            if target in ORDER:
                assert ORDER.index(target) <= ORDER.index(part), f"{path}: {part} imports {target}, which comes later"


@pytest.mark.parametrize(("path", "part"), [pytest.param(p, q, id=str(p.relative_to(PACKAGE))) for p, q in _modules()])
def test_heavy_libraries_stay_on_their_islands(path: Path, part: str) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in _imported(path):
        allowed = ISLANDS.get(name.split(".")[0])
        if allowed is not None:
            assert place.startswith(allowed), f"{path} imports {name}: allowed only in {allowed or 'nothing yet'}"


def test_the_runtime_starts_without_torch_onnx_or_diffusers() -> None:
    code = (
        "import sys, qncd_deploy.runtime, qncd_deploy.cli\n"
        "heavy = {'torch', 'onnx', 'diffusers', 'onnx_ir', 'openvino', 'onnxruntime', 'scipy', 'matplotlib'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
