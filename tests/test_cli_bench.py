"""qncd bench as a user meets it: over a baseline on the CPU; on a GPU by a stand-in, with engines that are stored."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import qncd

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from fake_tensorrt import GPU, Machine, install
from test_runtime import ROLES, write_bundle

from qncd_deploy.bundle import read_manifest, write_manifest
from qncd_deploy.engines.ort import OrtEngine
from qncd_deploy.runtime import Bundle

QUICK = ("--rounds", 2, "--eval-size", 2, "--json")


def write_fp16(folder: Path, **changes: Any) -> Path:
    """What `qncd export --format fp16` leaves of the same network: no graph of it is quantized."""
    roles = {**ROLES, "ort": ROLES["float"], "master": ROLES["float"], "trt": ROLES["float"]}
    write_bundle(folder, roles=roles)
    write_manifest(folder, replace(read_manifest(folder), format="fp16", **changes))
    return folder


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "net-w8a8", roles={**ROLES, "trt": ROLES["ort"]})


@pytest.fixture
def fp16(tmp_path: Path) -> Path:
    return write_fp16(tmp_path / "net-fp16")


def rows(printed: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(printed)["rows"]}


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch, quantized: Path, fp16: Path) -> None:
    """The float twin takes a few milliseconds, INT8 20 more, the baseline 60 more."""
    run = OrtEngine._run

    def paced(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "z" not in feeds:  # not the decoder
            time.sleep(0.06 if self.path.parent == fp16 else 0.02 if self.path == quantized / ROLES["ort"] else 0)
        return run(self, feeds)

    monkeypatch.setattr(OrtEngine, "_run", paced)


def test_speedups_and_their_gate_are_over_the_baseline(quantized: Path, fp16: Path, paces: None) -> None:
    command = ("bench", quantized, "--backend", "onnxruntime", *QUICK)
    over_twin = qncd(*command, "--require-speedup", 1.45)
    assert over_twin.code == 3 and over_twin.line.endswith(" times as fast as onnxruntime float.")

    over_it = qncd(*command, "--baseline", fp16, "--require-speedup", 1.45)
    assert over_it.code == 0, over_it.err
    facts, found = json.loads(over_it.out), rows(over_it.out)
    assert (facts["baseline"], facts["reference"]) == ("onnxruntime baseline fp16", "onnxruntime float")
    assert list(found) == ["onnxruntime float", "onnxruntime baseline fp16", "onnxruntime w8a8"]
    assert found["onnxruntime baseline fp16"]["network"] == "fp16"
    assert found["onnxruntime baseline fp16"]["speedup"]["samples"] == [1.0, 1.0]
    assert 1.45 < found["onnxruntime w8a8"]["speedup"]["median"] < found["onnxruntime float"]["speedup"]["median"]
    assert found["onnxruntime baseline fp16"]["figures"]["psnr"]["value"] > 60  # the float network once more

    too_much = qncd(*command, "--baseline", fp16, "--require-speedup", 10)
    assert too_much.code == 3
    assert too_much.line.startswith("qncd: --require-speedup 10: onnxruntime w8a8 is ")
    assert too_much.line.endswith(" times as fast as onnxruntime baseline fp16.")


def test_the_table_says_what_speedups_are_over(quantized: Path, fp16: Path) -> None:
    pytest.importorskip("openvino")
    args = ("--backend", "openvino", "--remainder", "f32", *QUICK[:-1])
    done = qncd("bench", quantized, "--baseline", fp16, *args)
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    for words in ("speedup over openvino baseline fp16", "p90", "pictures / s", "outside", "openvino w8a8, f32 rest"):
        assert words in text
    assert "bf16" not in text
    refused = qncd("bench", quantized, *args[:2], "--remainder", "f16")
    assert refused.code == 1 and "computes its float layers in f32, bf16 only, f16 was asked for" in refused.line


def test_only_what_this_cpu_computes_is_measured_unless_it_is_asked_for(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pytest.importorskip("qncd_deploy.engines.openvino").OpenVINOEngine
    monkeypatch.setattr(engine, "computes", classmethod(lambda cls, remainder: remainder == "f32"))
    done = qncd("bench", quantized, *QUICK)
    assert done.code == 0, done.err
    engines = ["openvino float", "openvino w8a8, f32 rest", "onnxruntime float", "onnxruntime w8a8"]
    assert list(rows(done.out)) == engines
    for backends in ((), ("--backend", "openvino")):
        refused = qncd("bench", quantized, *backends, "--remainder", "bf16", *QUICK)
        assert refused.code == 1 and "this CPU has no bfloat16 arithmetic" in refused.line


def test_a_remainder_alone_is_measured_on_the_engines_that_have_it(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[str]] = []
    monkeypatch.setattr("qncd_deploy.cli.bench.bench", lambda _bundle, variants, *_a, **_k: measured.append(variants))
    monkeypatch.setattr("qncd_deploy.cli.bench._installed", lambda: ("openvino", "onnxruntime"))

    def names(*args: object) -> list[str]:
        with pytest.raises(AttributeError):  # at what bench returned
            qncd("bench", quantized, *args)
        return [variant.name for variant in measured.pop()]

    assert names("--remainder", "bf16") == ["openvino float", "openvino w8a8, bf16 rest"]
    assert names("--remainder", "bf16", "--remainder", "f32") == [
        *("openvino float", "openvino w8a8, bf16 rest", "openvino w8a8, f32 rest"),
        *("onnxruntime float", "onnxruntime w8a8"),
    ]
    refused = qncd("bench", quantized, "--remainder", "f16")
    assert refused.code == 1 and "--remainder f16: openvino, onnxruntime have no such precision" in refused.line
    assert "--backend (tensorrt, " in refused.line and not measured


def test_a_baseline_of_another_network_is_refused_in_one_line(quantized: Path, tmp_path: Path) -> None:
    other = write_fp16(tmp_path / "other-fp16", inputs={"model.ckpt": "cd"})
    done = qncd("bench", quantized, "--baseline", other, "--backend", "onnxruntime", *QUICK)
    assert done.code == 2 and done.out == ""
    assert f"{other}: made from another network than {quantized}" in done.line
    missing = qncd("bench", quantized, "--baseline", tmp_path / "none", "--backend", "onnxruntime", *QUICK)
    assert missing.code == 1 and "no such folder, so it is not a bundle" in missing.line


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("qncd_deploy.evaluate.bench.find_device", lambda: GPU)
    return install(monkeypatch)


def shapes(pictures: int) -> dict[str, tuple[int, ...]]:
    """Guidance asks for every picture twice."""
    return {"x": (2 * pictures, 8, 16, 16), "t": (2 * pictures,), "c": (2 * pictures, 1, 12)}


def store(machine: Machine, shelf: Path, folder: Path, *batches: int) -> Path:
    """The engine that `qncd build --backend tensorrt --batch N,N` leaves of a bundle's network."""
    name = f"tensorrt-f16-10.13.2-sm86-b{'+'.join(map(str, batches))}.engine"
    bundle = Bundle.open(folder)
    path = shelf / folder.name / name
    return machine.store(path, bundle.file("trt"), *map(shapes, batches), source=bundle.graph_id("trt"))


@pytest.mark.parametrize("batches", [(1,), (1, 4)])
def test_on_a_gpu_with_the_engines_that_are_stored(
    quantized: Path, fp16: Path, tmp_path: Path, machine: Machine, batches: tuple[int, ...]
) -> None:
    shelf = tmp_path / "engines"
    stored = [store(machine, shelf, folder, *batches) for folder in (quantized, fp16)]
    store(machine, shelf, quantized, 2)  # not for this batch size, so it is not even loaded
    args = ("--backend", "tensorrt", "--remainder", "f16", "--engine-dir", shelf, *QUICK)
    done = qncd("bench", quantized, "--baseline", fp16, *args)
    assert done.code == 0, done.err
    built = [asked["x"] for asked in machine.builds if "x" in asked]
    assert built == [shapes(1)["x"]], "the float twin's alone is built, at the batch size that is timed"

    loaded = [engine.profiles[0]["x"][0][0] for engine in machine.module.engines if "x" in engine.profiles[0]]
    assert loaded == [2, 2, 2], "two stored engines and the twin's"

    facts, found = json.loads(done.out), rows(done.out)
    assert facts["context"]["gpu"] == "Fake GPU (sm86), driver of CUDA 12.6"
    assert facts["context"]["rows a call"] == "2"
    names = ["tensorrt float", "tensorrt baseline fp16", "tensorrt w8a8, f16 rest"]
    assert list(found) == names
    assert [found[name]["engine"] for name in names] == ["tensorrt-f32", "tensorrt-f16", "tensorrt-f16"]
    sizes = [found[name]["engine_bytes"] for name in reversed(names[1:])]
    assert sizes == [path.stat().st_size for path in stored]
    for row in found.values():
        # the fake engines' own memory is none: what is left are a call's buffers and the loop's arrays
        assert row["device_bytes"] >= 4 * 2 * (2 * 8 * 16 * 16)
        assert row["call_p90_ms"]["median"] >= row["call_ms"]["median"] > 0
        assert row["integer_kernels"] == 2
        assert row["engine_bytes"] > 0
        assert 0 < row["host_ms"]["median"] < row["picture_ms"]["median"]
    assert found[names[1]]["figures"]["psnr"]["value"] > 60
    assert found[names[2]]["figures"]["psnr"]["value"] < 60


@pytest.fixture
def planned(quantized: Path) -> Path:
    """A bundle that says it is quantized, with the types in its float graph that an export leaves there."""
    graph = quantized / ROLES["float"]
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(graph)), graph)
    plan = quantized / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "layers": [{"weight_bits": 8, "act_bits": 8}]}))
    write_manifest(quantized, read_manifest(quantized))
    return quantized


def test_on_a_gpu_alone_speedups_are_over_the_same_network_in_float16(
    planned: Path, tmp_path: Path, machine: Machine
) -> None:
    before = sorted(path.name for path in planned.iterdir())
    args = ("--engine-dir", tmp_path / "engines", *QUICK)
    done = qncd("bench", planned, "--backend", "tensorrt", *args)
    assert done.code == 0, done.err
    names = ["tensorrt float", "tensorrt baseline fp16", "tensorrt w8a8, f16 rest", "tensorrt w8a8, f32 rest"]
    found = rows(done.out)
    assert list(found) == names and json.loads(done.out)["baseline"] == names[1]
    built = [name for name, *_ in machine.asked if "decoder" not in name]
    assert built == ["unet-half.onnx", "unet-float.onnx", "unet-ort.onnx", "unet.onnx"]
    assert found[names[1]]["figures"]["psnr"]["value"] > 40  # float16 of the float twin
    assert found[names[2]]["figures"]["psnr"]["value"] < 40
    assert sorted(path.name for path in planned.iterdir()) == before
    machine.asked.clear()
    assert rows(qncd("bench", planned, "--backend", "tensorrt", *args).out).keys() == found.keys()
    assert not any("half" in name for name, *_ in machine.asked), "its engine was kept"
    for more in (["--backend", "onnxruntime"], ["--remainder", "f32"]):
        done = qncd("bench", planned, "--backend", "tensorrt", *more, *args)
        assert not any("baseline" in name for name in rows(done.out)), more


def test_without_the_exporting_libraries_a_line_says_how_to_make_it(
    planned: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "qncd_deploy.pipeline.half_twin", None)
    done = qncd("bench", planned, "--backend", "tensorrt", "--remainder", "f16", "--engine-dir", tmp_path, *QUICK)
    assert done.code == 0 and list(rows(done.out)) == ["tensorrt float", "tensorrt w8a8, f16 rest"]
    assert "Export one with `qncd-export CHECKPOINT --format fp16`, and name it with --baseline." in caplog.text


def test_what_is_built_for_the_run_takes_no_more_than_it_may(
    quantized: Path, fp16: Path, tmp_path: Path, machine: Machine
) -> None:
    args = ("--baseline", fp16, "--remainder", "f16", "--engine-dir", tmp_path, *QUICK, "--level", 1)
    done = qncd("bench", quantized, "--backend", "tensorrt", "--workspace", 64, *args)
    assert done.code == 0, done.err
    asked = {(options.level, options.workspace, options.timing_cache) for _, options, _ in machine.asked}
    assert asked == {(1, 64 << 20, tmp_path / "timing-tensorrt-10.13.2-sm86.cache")}
    done = qncd("bench", quantized, "--backend", "onnxruntime", "--level", 1)
    assert (done.code, done.line) == (
        2,
        "qncd: --level: it is tensorrt and tensorrt-rtx that have it, not onnxruntime. Leave it out.",
    )


def test_an_engine_for_other_rows_is_not_timed(quantized: Path, tmp_path: Path, machine: Machine) -> None:
    """Built for a bundle of the same network that samples without guidance: half the rows."""
    plain = write_fp16(tmp_path / "plain", model=replace(read_manifest(quantized).model, guidance_scale=1.0))
    bundle, half = Bundle.open(plain), {name: (1, *shape[1:]) for name, shape in shapes(1).items()}
    path = tmp_path / "engines/plain/tensorrt-f16-10.13.2-sm86-b1.engine"
    machine.store(path, bundle.file("trt"), half, source=bundle.graph_id("trt"))
    args = ("--backend", "tensorrt", "--remainder", "f16", "--engine-dir", tmp_path / "engines", *QUICK)
    done = qncd("bench", quantized, "--baseline", plain, *args)
    assert done.code == 1
    assert done.line == (
        "qncd: tensorrt baseline fp16: the stored engine takes 1 rows a call, --batch-size 1 with guidance 1.5 asks "
        "for 2. Run `qncd build` for that batch size, or name an empty --engine-dir: engines are then made for the run."
    )


def test_on_the_cpu_there_is_no_memory_of_a_device(quantized: Path) -> None:
    done = qncd("bench", quantized, "--backend", "onnxruntime", *QUICK)
    for row in rows(done.out).values():
        assert row["device_bytes"] is None and row["engine_bytes"] is None and row["graph_bytes"] > 0
