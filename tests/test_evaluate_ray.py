"""Batches spread over processes with Ray, on this machine: the same figures, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="batches are spread with ray")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import ray
from cli_helpers import qncd_process
from test_evaluate_compare import with_features
from test_runtime import write_bundle

from qncd_deploy.errors import BundleError, EngineError
from qncd_deploy.evaluate.batches import Batch, Draw, Job, plan_jobs
from qncd_deploy.evaluate.compare import compare
from qncd_deploy.evaluate.crew import Task
from qncd_deploy.evaluate.features import Lens
from qncd_deploy.evaluate.ray_crew import RayCrew, _crew_size
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.runtime import Bundle

VARIANTS = [
    Variant("off", "onnxruntime", correction="off"),
    Variant("twin", "onnxruntime", float_twin=True),
]
DRAW = Draw(10, batch_size=2, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(with_features(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8")))


@pytest.fixture(scope="module")
def crew() -> Iterator[RayCrew]:
    with RayCrew(threads=1) as crew:
        yield crew


def drawn(crew: RayCrew, bundle: Bundle, variant: Variant) -> list[tuple[Job, Batch]]:
    jobs = plan_jobs(DRAW, batch_size=2, traced=0)
    task = Task(bundle, DRAW, "onnxruntime")
    with VARIANTS[0].open(bundle, DRAW) as sampler:
        return list(crew.draw(task, variant, jobs, sampler=sampler, lens=Lens(), tick=lambda pictures: None))


def test_figures_do_not_depend_on_who_draws(crew: RayCrew, bundle: Bundle) -> None:
    done: list[tuple[int, int]] = []
    alone = compare(bundle, VARIANTS, DRAW, traced=4)
    spread = compare(bundle, VARIANTS, DRAW, traced=4, crew=crew, on_progress=lambda n, of: done.append((n, of)))
    assert spread.to_json() == alone.to_json()
    assert done[-1] == (4 * (10 + 2 * (10 + 4)),) * 2


def test_every_batch_is_drawn_once(crew: RayCrew, bundle: Bundle) -> None:
    found = drawn(crew, bundle, VARIANTS[0])
    assert sorted(job.indices[0] for job, _ in found) == [0, 2, 4, 6, 8]
    assert all(batch.pictures.indices.tolist() == list(job.indices) for job, batch in found)


@pytest.mark.parametrize(
    ("cpus", "threads", "expected"),
    [
        ((3, 3), 2, (2, 2)),  # not three: no machine has room for half of one
        ((2, 8), 4, (4, 2)),
        ((3, 2), 4, (3, 1)),
        ((0, 5), 1, (1, 5)),
        ((), 2, (1, 1)),
    ],
)
def test_a_worker_is_on_one_machine(cpus: tuple[int, ...], threads: int, expected: tuple[int, int]) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": float(each)} if each else {}} for each in cpus]
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    assert _crew_size([gone, *nodes], threads) == expected


def test_workers_that_never_start_get_nothing_to_do(
    crew: RayCrew, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as larger:
        larger.setattr(crew, "_size", crew._size + 2)
        assert len(drawn(crew, bundle, VARIANTS[0])) == 5
    monkeypatch.setattr(crew, "_threads", 1 << 10)
    monkeypatch.setattr("qncd_deploy.evaluate.ray_crew._START_S", 0.5)
    with pytest.raises(
        EngineError, match=r"ray: no worker started within 0\.5 s\. Are all CPUs of the cluster taken\?"
    ):
        drawn(crew, bundle, VARIANTS[0])


def test_an_error_of_a_worker_is_the_error_itself(crew: RayCrew, bundle: Bundle, tmp_path: Path) -> None:
    folder = with_features(write_bundle(tmp_path / "net-w8a8"))
    held = Bundle.open(folder)
    graph = bytearray((folder / "unet-ort.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (folder / "unet-ort.onnx").write_bytes(graph)  # as on a machine that holds another bundle
    with pytest.raises(BundleError, match=r"unet-ort\.onnx: changed on disk") as caught:
        drawn(crew, held, VARIANTS[0])
    assert type(caught.value) is BundleError and "\n" not in str(caught.value)


def test_a_worker_that_dies_is_one_line(crew: RayCrew, bundle: Bundle) -> None:
    drawn(crew, bundle, VARIANTS[0])
    for worker in crew._workers:
        ray.kill(worker)
    with pytest.raises(EngineError, match=r"ray: a worker died.*What was drawn is kept") as caught:
        drawn_again(crew, bundle)
    assert "\n" not in str(caught.value)
    assert len(drawn(crew, replace(bundle), VARIANTS[0])) == 5  # another comparison hires others


def drawn_again(crew: RayCrew, bundle: Bundle) -> None:
    """The same task, so the same workers."""
    jobs = plan_jobs(DRAW, batch_size=2, traced=0)
    assert crew._task is not None
    with VARIANTS[0].open(bundle, DRAW) as sampler:
        list(crew.draw(crew._task, VARIANTS[0], jobs, sampler=sampler, lens=Lens(), tick=lambda pictures: None))


@pytest.mark.slow
def test_the_command_line_spreads_and_finds_no_cluster_that_is_not_there(bundle: Bundle, tmp_path: Path) -> None:
    args = (
        "eval",
        bundle.path,
        "--backend",
        "onnxruntime",
        "--batch-size",
        2,
        "-n",
        6,
        "--correction",
        "off",
        "--json",
    )
    spread = qncd_process(*args, "--workers", "ray", cwd=tmp_path)
    assert spread.code == 0 and spread.err == "", spread.err
    assert json.loads(spread.out) == json.loads(qncd_process(*args, "--threads", 1, cwd=tmp_path).out)
    absent = qncd_process(*args, "--workers", "ray", "--ray-address", "127.0.0.1:1", cwd=tmp_path)
    assert absent.code == 1 and absent.line.startswith("qncd: ray: ") and "ray start --head" in absent.line
