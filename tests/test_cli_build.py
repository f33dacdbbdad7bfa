"""qncd build and inspect for TensorRT as a user meets them: ahead of time for real, on a GPU by a stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import contents, qncd
from fake_trt_builder import FakeTensorRT

from qncd_deploy.engines.trt.device import Device
from qncd_deploy.engines.trt.library import Library, parse_version
from qncd_deploy.pipeline import build as pipeline

pytest.importorskip("torch", reason="the bundle of these tests is exported here")

HAS_GPU = Path("/dev/nvidia0").exists() or Path("/dev/nvhost-gpu").exists()
GPU = Device("NVIDIA L4", "sm89", 24 << 30, "12.8")


def test_an_engine_for_other_machines(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    shelf = ("--engine-dir", tmp_path)
    args = ("build", bundle, "--backend", "tensorrt-rtx", "--target", "sm86,sm89", "--batch", "1,2", *shelf, "--json")
    first = qncd(*args)
    assert first.code == 0, first.err
    made = json.loads(first.out)
    layers = json.loads((bundle / "plan.json").read_text())["layers"]
    assert made["planned_layers"] == sum(layer["weight_bits"] is not None for layer in layers)
    assert made["missed"] == [] and made["seconds"] > 0 and made["integer_kernels"] > 0
    unet, decoder = (Path(engine["path"]) for engine in made["engines"])
    assert unet.name.startswith("tensorrt-rtx-f16-1.") and unet.name.endswith("-sm86+sm89-b1+2.engine")
    assert decoder.name.startswith("tensorrt-rtx-f32-1.") and decoder.name.endswith("-sm86+sm89-decoder-b1+2.engine")
    before = contents(tmp_path)
    assert [engine["seconds"] for engine in json.loads(qncd(*args).out)["engines"]] == [None, None]
    assert contents(tmp_path) == before

    unet.write_bytes(unet.read_bytes()[:-1])  # truncated: made again, byte for byte
    again = json.loads(qncd(*args).out)["engines"]
    assert again[0]["seconds"] is not None and again[1]["seconds"] is None
    assert contents(tmp_path) == before

    shown = qncd("inspect", bundle, "--kernels", "--backend", "tensorrt-rtx", *shelf)
    assert shown.code == 0 and f"engine {unet.name}: {made['runs']}" in shown.out
    assert "Convolution" in shown.out and "i8" in shown.out
    assert set(json.loads(qncd("inspect", bundle, *shelf, "--json").out)["engines"]) == {unet.name, decoder.name}
    assert json.loads(qncd("inspect", bundle, "--backend", "tensorrt", *shelf, "--json").out)["engines"] == {}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Full TensorRT 10.3 on an L4. It reads every graph as one convolution over the tiny network's latents; its engines
    cannot run, so none is held against the float network and nothing is fitted.
    """
    fake = FakeTensorRT("10.3.0", [b"unet", b"decoder"], shape=(-1, 3, 8, 8))
    monkeypatch.setattr(pipeline, "open_library", lambda name: Library(name, fake, parse_version(fake.__version__)))
    monkeypatch.setattr(pipeline, "find_device", lambda: GPU)
    monkeypatch.setattr(pipeline, "_gate", lambda *args: "nothing runs here")
    return fake


def test_an_engine_for_this_gpu(bundle: Path, tmp_path: Path, gpu: FakeTensorRT) -> None:
    args = ("build", bundle, "--backend", "tensorrt", "--batch", 2, "--workspace", 512, "--engine-dir", tmp_path)
    done = qncd(*args)
    assert done.code == 0, done.err
    folder = tmp_path / bundle.name
    names = ["tensorrt-f16-10.3.0-sm89-b2.engine", "tensorrt-f32-10.3.0-sm89-decoder-b2.engine"]
    lines = done.out.splitlines()
    assert lines[1::2] == ["  not held against the float network: nothing runs here"] * 2
    for line, name, plan in zip(lines[::2], names, (b"unet", b"decoder"), strict=True):
        assert line.startswith(f"{folder / name}  0.0 MiB  built in ") and line.endswith(
            "1 of 1 planned layers run quantized"
        )
        assert (folder / name).read_bytes() == plan
    # guidance asks the network for every picture twice, the decoder once
    assert [asked["shape"] for asked in gpu.builds] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert [asked["WORKSPACE"] for asked in gpu.builds] == [512 << 20] * 2
    assert (tmp_path / "timing-tensorrt-10.3.0-sm89.cache").read_bytes() == b"++"
    assert "up to date" in qncd(*args).out and len(gpu.builds) == 2
    shown = qncd("inspect", bundle, "--engine-dir", tmp_path).out
    assert shown.count("    not held against the float network: nothing runs here") == 2


def test_a_shelf_that_is_not_there_is_made_and_one_that_cannot_be_is_told_before_the_build(
    bundle: Path, tmp_path: Path, gpu: FakeTensorRT
) -> None:
    done = qncd("build", bundle, "--backend", "tensorrt", "--engine-dir", tmp_path / "new/shelf")
    assert done.code == 0 and (tmp_path / "new/shelf/timing-tensorrt-10.3.0-sm89.cache").is_file(), done.err
    gpu.builds.clear()
    (tmp_path / "file").touch()
    done = qncd("build", bundle, "--backend", "tensorrt", "--engine-dir", tmp_path / "file")
    assert done.code == 1 and "cannot be written" in done.line and gpu.builds == []


def test_what_the_engine_misses_is_told_layer_by_layer(bundle: Path, tmp_path: Path, gpu: FakeTensorRT) -> None:
    gpu.layers = [{"Name": "copy", "LayerType": "Reformat"}]
    done = qncd("build", bundle, "--backend", "tensorrt", "--engine-dir", tmp_path)
    assert "0 of 1 planned layers run quantized" in done.out
    assert "\n  planned quantized, but runs otherwise: w (nothing that multiplies)\n" in done.out


def test_a_failed_build_leaves_nothing(bundle: Path, tmp_path: Path, gpu: FakeTensorRT) -> None:
    gpu._script[:] = [["Error Code 4: types disagree"]]
    done = qncd("build", bundle, "--backend", "tensorrt", "--engine-dir", tmp_path / "engines")
    assert done.code == 1 and done.line.endswith("TensorRT cannot build it (Error Code 4: types disagree).")
    assert contents(tmp_path) == {}


def test_the_vendors_commands(bundle: Path, tmp_path: Path, gpu: FakeTensorRT) -> None:
    done = qncd("build", bundle, "--backend", "tensorrt", "--trtexec", "--level", 4, "--engine-dir", tmp_path)
    unet, decoder = done.out.splitlines()
    assert unet.startswith(f"trtexec --onnx={bundle}/unet-trt.onnx --saveEngine={tmp_path}/{bundle.name}/tensorrt-f16-")
    assert "--stronglyTyped" in unet and "--builderOptimizationLevel=4" in unet and "vae-decoder.onnx" in decoder
    assert gpu.builds == [] and contents(tmp_path) == {}
    refused = qncd("build", bundle, "--backend", "openvino", "--trtexec")
    assert refused.code == 2 and refused.line.endswith("--trtexec: openvino is not TensorRT. Leave it out.")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["tensorrt", "--target", "sm86"], 2, "--target sm86: tensorrt builds for the GPU it runs on"),
        (["tensorrt", "--threads", "2"], 2, "--threads: tensorrt runs on the GPU"),
        (["tensorrt", "--remainder", "bf16"], 1, "computes its float layers in f16, f32 only"),
        (["openvino", "--no-check"], 2, "--no-check: openvino does not have it"),
        (["openvino", "--level", "2"], 2, "--level: openvino does not have it"),
        (["openvino", "--target", "sm86"], 2, "--target: openvino does not have it"),
        (["openvino", "--hardware-compatibility", "ampere-plus"], 2, "--hardware-compatibility: openvino does not"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_in_one_line(
    bundle: Path, tmp_path: Path, gpu: FakeTensorRT, args: list[str], code: int, words: str
) -> None:
    done = qncd("build", bundle, "--engine-dir", tmp_path, "--backend", *args)
    assert (done.code, contents(tmp_path)) == (code, {}), done.err
    assert words in done.line


@pytest.mark.parametrize("args", [["--batch", "0"], ["--batch", "1,,2"], ["--level", "6"]])
def test_wrong_usage(bundle: Path, args: list[str]) -> None:
    done = qncd("build", bundle, "--backend", "tensorrt", *args)
    assert done.code == 2 and args[0] in done.err


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_there_must_be_targets(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    done = qncd("build", bundle, "--backend", "tensorrt-rtx")
    assert done.code == 2
    assert done.line.endswith(
        "--target: there is no GPU here to build for. Name those it is for, of sm75, sm80, sm86, sm89, sm120, sm121."
    )


def test_doctor_says_what_can_be_built_ahead_of_time() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    text, facts = qncd("doctor"), json.loads(qncd("doctor", "--json").out)
    assert facts["ahead_of_time"] == {"tensorrt-rtx": ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]}
    assert "sm75, sm80, sm86, sm89, sm120, sm121, ahead of time, with tensorrt-rtx" in text.out
