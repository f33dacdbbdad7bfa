"""A machine that only runs bundles: Python 3.10 with NumPy 1.26, as JetPack 6 has them, and the `cpu` extra, without
torch, onnx or diffusers.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ROOT

pytest.importorskip("torch", reason="the bundle that is sampled is exported here")

pytestmark = pytest.mark.slow


def python310() -> str | None:
    """A Python 3.10 that runs: pyenv's shims are found on PATH but may refuse."""
    found = [shutil.which("python3.10"), *sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.10*/bin/python")))]
    for path in filter(None, found):
        asked = [path, "-c", "import sys; raise SystemExit(sys.version_info[:2] != (3, 10))"]
        if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = python310()
    if python is None:
        pytest.skip("no Python 3.10 on this machine")
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "qncd_deploy", source / "qncd_deploy")
    pip = [folder / "venv/bin/pip", "install", "--quiet", "--disable-pip-version-check"]
    reachable = subprocess.run([*pip, "--dry-run", "numpy"], capture_output=True, text=True, check=False)
    if reachable.returncode:
        pytest.skip("no package index in reach")
    subprocess.run([*pip, f"{source}[cpu]", "numpy==1.26.4", "pytest", "hypothesis"], check=True)
    return folder / "venv"


def run(venv: Path, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([venv / "bin" / str(args[0]), *map(str, args[1:])], cwd=cwd, env=clean, text=True,
                          capture_output=True, check=False)  # fmt: skip


def test_a_bundle_samples_without_what_made_it(venv: Path, bundle: Path, tmp_path: Path) -> None:
    for library in ("torch", "onnx", "onnx_ir", "diffusers", "transformers"):
        absent = run(venv, "python", "-c", f"import {library}", cwd=tmp_path)
        assert f"No module named '{library}'" in absent.stderr
    latents = []
    for backend in ("openvino", "onnxruntime"):
        done = run(venv, "qncd", "sample", bundle, "-n", 3, "--backend", backend, "-o", "p.npz", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "p.npz") as found:
            latents.append(found["latents"])
    # Two INT8 engines that round some ties differently, over four calls; another network would differ by its size.
    assert np.abs(latents[0] - latents[1]).max() < 0.1 * np.abs(latents[0]).max()
    for verb in (("verify", bundle), ("inspect", bundle), ("doctor",), ("eval", bundle, "-n", 2, "-o", "quality.json")):
        done = run(venv, "qncd", *verb, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    refused = run(venv, "qncd-export", "model.ckpt", "--int8", cwd=tmp_path)
    assert refused.returncode == 1
    assert "pip install" in refused.stderr and "Traceback" not in refused.stderr


def test_prompts_are_drawn_there(venv: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("tokenizers")
    from text_bundle import write_text_bundle

    words = write_text_bundle(tmp_path / "words-w8a8", encoders=2)
    for number, backend in enumerate(("openvino", "onnxruntime")):
        done = run(
            venv, "qncd", "sample", words, "--prompt", "a red dog", "--prompt", "mars", "--negative-prompt", "cat",
            "--vae-tiling", "--backend", backend, "-o", f"{number}.npz", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "0.npz") as first, np.load(tmp_path / "1.npz") as second:
        assert first["prompts"].tolist() == second["prompts"].tolist() == ["a red dog", "mars"]
        # Float networks on both engines: sums in another order, four guided calls.
        size = np.abs(first["latents"]).max()
        np.testing.assert_allclose(first["latents"], second["latents"], rtol=0, atol=1e-4 * size)


RUNTIME_TESTS = (
    "bundle", "correct_record", "correct_rules", "engines_decoder", "engines_eps_model", "engines_trt_cuda",
    "engines_trt_library", "engines_trt_store", "files", "pictures", "sample", "sampler", "schedule", "steps", "study",
)  # fmt: skip
"""Those of the modules that a board runs; what in them needs an absent library skips itself."""


def test_the_runtimes_own_tests_pass_there(venv: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    files = [f"tests/test_{name}.py" for name in RUNTIME_TESTS]
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
    done = run(venv, "python", "-W", "ignore", "-m", "pytest", *options, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    numpy = run(venv, "python", "-c", "import numpy; print(numpy.__version__)", cwd=tmp_path)
    assert numpy.stdout.strip() == "1.26.4"
