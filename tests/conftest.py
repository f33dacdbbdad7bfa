"""What the tests of the command line and the pipeline share: tiny networks, exported once by every worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _take_own_cores() -> None:
    """Every worker of pytest-xdist has cores of its own: libraries start a thread for each that they see, and threads
    that wait for another worker's are many times slower than fewer threads.
    """
    workers, worker = (os.environ.get(f"PYTEST_XDIST_{name}") for name in ("WORKER_COUNT", "WORKER"))
    if workers is None or worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: int(workers)])


_take_own_cores()  # before NumPy is loaded, whose threads are started then

from cli_helpers import SMALL, Export  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Networks are exported for the CPU's engines, where there is a GPU too, but for the tests that ask for one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional CompVis checkpoint with random weights: five classes and a null class, 3x8x8 latents."""
    for library in ("torch", "diffusers", "onnx_ir", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"exporting needs {library}")
    from ldm_checkpoint import UNETS, Written

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    folder.mkdir()
    return Written(folder, UNETS["transformer-head-channels"]).save()


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`qncd export` of the tiny checkpoint, to be read only."""
    options = (*SMALL, "--require-psnr", "1")
    return Export(checkpoint, options, tmp_path_factory.mktemp("exported"), "tiny").made()


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Path:
    """The bundle of the tiny checkpoint, to be read only; or the one that QNCD_TEST_BUNDLE names, for boards that can
    run engines and cannot export.
    """
    named = os.environ.get("QNCD_TEST_BUNDLE")
    if named:
        return Path(named).resolve()
    exported: Export = request.getfixturevalue("exported")
    return exported.bundle


@pytest.fixture(scope="session")
def calibration(exported: Export) -> Path:
    """The calibration set of the tiny checkpoint: an npz that fits its float twin."""
    (path,) = (exported.home / "calib_data").rglob("calibration-*.npz")
    return path


@pytest.fixture(scope="session")
def own_graph(exported: Export, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`qncd export` of a graph of the user's own, here the tiny network's float twin without a schedule.

    Seconds quicker than that of a checkpoint, since nothing is traced, and to be read only as well.
    """
    options = ("--name", "own", "--calib-data", calibration)
    home = tmp_path_factory.mktemp("own")
    return Export(exported.bundle / "unet-float.onnx", options, home, "own").made()
