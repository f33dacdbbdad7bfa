"""qncd build and inspect --kernels for OpenVINO: bundles of graphs that cannot sample, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import contents, qncd

pytest.importorskip("onnx")
pytest.importorskip("openvino")

from test_runtime import FACTS, ROLES, write_bundle

BACKEND = ("--backend", "openvino")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of the user's own graph with a condition, exported without a schedule."""
    facts = replace(FACTS, schedule=None, sampler=None, condition=None, guidance_scale=1.0, image_shape=None)
    roles = {role: ROLES[role] for role in ("master", "ort", "float", "plan")}
    return write_bundle(tmp_path_factory.mktemp("export") / "own-w8a8", facts, roles)


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8")


@pytest.mark.parametrize("name", ["bare", "sampling"])
def test_what_is_built_is_what_runs_and_is_built_once(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(name)
    args = ("build", bundle, *BACKEND, "--engine-dir", tmp_path, "--batch", 2, "--json")
    done = qncd(*args)
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["seconds"] is not None and made["integer_kernels"] >= 2
    before = contents(tmp_path)
    again = json.loads(qncd(*args).out)
    assert again == {**made, "seconds": None, "engines": [{**made["engines"][0], "seconds": None}]}
    assert contents(tmp_path) == before

    blob = Path(made["path"])
    blob.write_bytes(blob.read_bytes()[:-1])
    assert json.loads(qncd(*args).out)["seconds"] is not None

    shown = json.loads(qncd("inspect", bundle, *BACKEND, "--kernels", "--json").out)["kernels"]
    assert sum(each["count"] for each in shown if each["precision"] == "i8" and each["op"] != "Convert") >= 2


def test_a_blob_is_of_the_rows_that_sampling_asks_for(sampling: Path, tmp_path: Path) -> None:
    """Guidance asks for every picture twice."""
    assert qncd("build", sampling, *BACKEND, "--engine-dir", tmp_path, "--batch", 3).code == 0
    (facts,) = (json.loads(path.read_text()) for path in tmp_path.rglob("*.json"))
    assert sorted(map(tuple, facts["shapes"])) == [(6,), (6, 1, 12), (6, 8, 16, 16)]


def test_a_precision_without_kernels_is_refused(bare: Path) -> None:
    refused = qncd("inspect", bare, *BACKEND, "--remainder", "f32")
    assert refused.code == 2 and "--remainder f32 is about --kernels. Give both, or neither." in refused.err
    unknown = qncd("inspect", bare, *BACKEND, "--remainder", "f16", "--kernels")
    assert unknown.code == 1 and "computes its float layers in f32, bf16 only" in unknown.line
