"""Batches on disk: what they are keyed by, what survives a kill, what is swept."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_sampler import TEN, make

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cli_helpers import environment
from test_evaluate_compare import with_features
from test_runtime import write_bundle

from qncd_deploy.bundle import read_manifest, write_manifest
from qncd_deploy.correct.record import StepFix
from qncd_deploy.errors import BundleError
from qncd_deploy.evaluate.batches import Batch, Draw, Job, draw_batch, plan_jobs
from qncd_deploy.evaluate.compare import compare
from qncd_deploy.evaluate.crew import Task
from qncd_deploy.evaluate.features import Description, Lens
from qncd_deploy.evaluate.store import Store, batch_facts, key_of
from qncd_deploy.evaluate.variants import Variant
from qncd_deploy.runtime import Bundle, Sampling

OFF = Variant("off", "onnxruntime", correction="off")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(with_features(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8")))


def batch_of(*, traced: bool = True) -> Batch:
    return draw_batch(make(TEN, batch_size=2), Draw(2), Job(range(2), 2, traced=traced), Lens())


def arrays_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


@pytest.mark.parametrize("part", ["all", "bare"])
def test_a_batch_survives_the_round_trip(tmp_path: Path, part: str) -> None:
    batch = batch_of(traced=part == "all")
    if part == "all":
        description = Description(np.ones((2, 3), np.float32), None, np.zeros((2, 4), np.float32))
        batch = replace(batch, description=description, extra_calls=2, free=np.ones((2, 20)), forced=np.zeros((2, 20)))
    with Store.open(tmp_path / "eval", [], keep=True) as store:
        shelf = store.shelf({"source": "a"})
        shelf["0-2"] = batch
        found = shelf["0-2"]
        assert list(shelf) == ["0-2"] and "0-2" in shelf and "2-2" not in shelf
    expected, arrays = batch.to_arrays(), found.to_arrays()
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    assert (found.trace is None) == (part == "bare")
    assert found.extra_calls == batch.extra_calls


def test_batches_are_whole_traced_first_and_named_by_their_pictures() -> None:
    jobs = plan_jobs(Draw(10, first=5), batch_size=4, traced=5)
    assert [job.indices for job in jobs] == [range(5, 9), range(9, 13), range(13, 15)]
    assert [job.traced for job in jobs] == [True, True, False]
    assert {job.size for job in jobs} == {4}
    assert len({job.name for job in jobs}) == 3
    more = plan_jobs(Draw(12, first=5), batch_size=4, traced=5)
    assert [job.name for job in more[:2]] == [job.name for job in jobs[:2]]  # a larger draw starts from these
    assert more[2].name != jobs[2].name


def test_the_key_knows_all_that_decides_a_batch(bundle: Bundle, tmp_path: Path) -> None:
    draw = Draw(6, batch_size=3, threads=1)

    def key(draw: Draw = draw, variant: Variant = OFF, exact: str | None = "ab", **task: object) -> str:
        with variant.open(bundle, draw) as sampler:
            return key_of(batch_facts(Task(bundle, draw, "onnxruntime", **task), variant, sampler, exact))

    other = tmp_path / "features.onnx"
    other.write_bytes(bundle.file("features").read_bytes() + b"\0")
    same = (key(replace(draw, threads=2)), key(replace(draw, count=60)), key(replace(draw, first=30)))
    assert set(same) == {key()}  # which pictures is in the names of the files
    pytest.importorskip("openvino")
    changed = [
        key(replace(draw, seed=1)),
        key(replace(draw, labels=(1,))),
        key(replace(draw, batch_size=2)),
        key(replace(draw, sampling=Sampling(n_steps=5))),
        key(replace(draw, sampling=Sampling(scheduler="euler"))),
        key(replace(draw, sampling=Sampling(eta=0.5))),
        key(replace(draw, sampling=Sampling(guidance_scale=1.0))),
        key(variant=replace(OFF, backend="openvino")),
        key(variant=replace(OFF, backend="openvino", remainder="bf16")),
        key(variant=Variant("float", "onnxruntime", float_twin=True)),
        key(exact=None),
        key(exact="cd"),
        key(teacher_forced=False),
        key(features=other),
    ]
    assert len({key(), *changed}) == 1 + len(changed)


def test_the_key_knows_what_a_correction_does_and_not_its_name(bundle: Bundle) -> None:
    draw = Draw(2, threads=1)
    task = Task(bundle, draw, "onnxruntime")
    found = []
    for fixes in (
        [StepFix()] * 20,
        [StepFix(b=np.full(3, 1e-3))] * 20,
        [StepFix(b=np.full(3, 2e-3))] * 20,
        [StepFix(b=np.full((3, 4, 4), 1e-3))] * 20,
        [StepFix(refresh=True), *[StepFix()] * 19],
    ):
        sampler = make(TEN, fixes=tuple(fixes))
        found.append(key_of(batch_facts(task, OFF, sampler, None)))
    assert len(set(found)) == len(found)
    assert key_of(batch_facts(task, OFF, make(TEN), None)) == found[0]


def test_a_changed_bundle_is_not_mixed_in_and_swept(bundle: Bundle, tmp_path: Path) -> None:
    work = tmp_path / "eval"
    draw = Draw(4, batch_size=2, threads=1)
    with Store.open(work, [bundle], keep=True) as store:
        first = compare(bundle, [OFF], draw, store=store)
    held = arrays_of(work)
    assert len(held) == 4
    foreign = work / "notes"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")

    folder = write_bundle(tmp_path / "net-w8a8")
    (folder / "unet-float.onnx").write_bytes((folder / "unet-float.onnx").read_bytes() + b"\x52\x00")  # field 10: empty
    (folder / "unet-ort.onnx").write_bytes((folder / "unet-ort.onnx").read_bytes() + b"\x52\x00")
    write_manifest(folder, read_manifest(folder))
    changed = Bundle.open(with_features(folder))
    with Store.open(work, [changed], keep=True) as store:
        assert not arrays_of(work)
        again = compare(changed, [OFF], draw, store=store)
    assert len(arrays_of(work)) == 4 and not held.keys() & arrays_of(work).keys()
    assert again.to_json() == first.to_json()  # the same network under other bytes
    assert (foreign / "mine.txt").exists()
    with Store.open(work, [changed]) as store:
        compare(changed, [OFF], draw, store=store)
    assert [path.name for path in work.iterdir()] == ["notes"]


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(bundle: Bundle, tmp_path: Path) -> None:
    work = tmp_path / "eval"
    draw = Draw(6, batch_size=2, threads=1)
    alone = compare(bundle, [OFF], draw, traced=2)
    with Store.open(work, [bundle], keep=True) as store:
        compare(bundle, [OFF], replace(draw, count=4), store=store, traced=2)
    held = {path: path.stat().st_mtime_ns for path in work.rglob("*.npz")}
    assert len(held) == 4
    damaged = next(path for path in held if path.name == "000000002-2.npz")
    damaged.write_bytes(damaged.read_bytes()[:100])
    done: list[tuple[int, int]] = []
    with Store.open(work, [bundle], keep=True) as store:
        found = compare(bundle, [OFF], draw, store=store, traced=2, on_progress=lambda n, of: done.append((n, of)))
    assert found.to_json() == alone.to_json()
    assert done[-1][0] == done[-1][1]
    assert len(list(work.rglob("*.npz"))) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in held.items() if path != damaged)


def test_an_error_keeps_what_was_drawn(bundle: Bundle, tmp_path: Path) -> None:
    work = tmp_path / "eval"

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Store.open(work, [bundle]) as store:
        compare(bundle, [OFF], Draw(8, batch_size=2, threads=1), store=store, on_progress=fail)
    assert arrays_of(work)


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qncd_deploy.evaluate.store import Store\n"
        "with Store.open(Path(sys.argv[1]), []): pass\n"
    )
    words = r"eval: process \d+ is writing it"
    with Store.open(tmp_path / "eval", []), pytest.raises(BundleError, match=words), Store.open(tmp_path / "eval", []):
        pass
    with Store.open(tmp_path / "eval", []):
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "eval")],
            capture_output=True, text=True, env=environment(), timeout=60, check=False,
        )  # fmt: skip
    assert ran.returncode == 1 and "is writing it" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_about_says_what_a_shelf_is(bundle: Bundle, tmp_path: Path) -> None:
    with Store.open(tmp_path / "eval", [bundle], keep=True) as store:
        compare(bundle, [OFF], Draw(2, threads=1), store=store)
    abouts = [json.loads(path.read_text()) for path in (tmp_path / "eval").glob("*/about.json")]
    assert {about["engine"] for about in abouts} == {"onnxruntime-f32"}
    assert sorted(about["exact"] is None for about in abouts) == [False, True]
    assert {key_of(about) for about in abouts} == {path.name for path in (tmp_path / "eval").iterdir()}
