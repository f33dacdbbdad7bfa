"""qncd sample, fit, build, bench, inspect, verify and doctor as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ROOT, contents, qncd, qncd_process
from PIL import Image

pytest.importorskip("torch", reason="the bundle of these tests is exported here")


def test_pictures_in_every_form(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    facts = []
    for out in ("grid.png", "all.npz", "folder"):
        done = qncd("sample", bundle, "-n", 5, "--seed", 3, "-o", tmp_path / out, "--json")
        assert done.code == 0, done.err
        facts.append(json.loads(done.out))
        assert facts[-1]["output"] == str(tmp_path / out)
    assert all({**f, "output": ""} == {**facts[0], "output": ""} for f in facts)
    assert facts[0]["pictures"] == 5 and facts[0]["network_calls"] >= 4
    with np.load(tmp_path / "all.npz") as found:
        assert found["images"].shape == (5, 16, 16, 3) and found["images"].dtype == np.uint8
        assert found["latents"].shape == (5, 3, 8, 8)
        np.testing.assert_array_equal(found["labels"], [0, 1, 2, 3, 4])
        for i, picture in enumerate(found["images"]):
            np.testing.assert_array_equal(Image.open(tmp_path / f"folder/{i:06d}.png"), picture)
    assert Image.open(tmp_path / "grid.png").size == (3 * 18 - 2, 2 * 18 - 2)


def test_labels_take_turns(bundle: Path, tmp_path: Path) -> None:
    for label, expected in (("3", [3, 3, 3]), ("4,1", [4, 1, 4]), ("all", [0, 1, 2])):
        out = tmp_path / "p.npz"
        assert qncd("sample", bundle, "-n", 3, "--class-label", label, "-o", out).code == 0
        with np.load(out) as found:
            np.testing.assert_array_equal(found["labels"], expected)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--class-label", "6"], 1, "class 6"),
        (["--class-label", "-1"], 1, "Use 0 to 4"),
        (["--class-label", "5"], 1, "null class"),
        (["--class-label", "dress"], 2, "dress"),
        (["--class-label", "1,,2"], 2, "expected a class number"),
        (["--n-steps", "1000"], 1, "1000"),
        (["--n-steps", "0"], 1, "0"),
        (["--eta", "2"], 1, "eta"),
        (["--correction", "magic"], 2, "correction magic: expected auto, off or one of qncd, "),
        (["--n-steps", "3", "--correction", "qncd"], 1, "qncd fit"),
        (["--float", "--correction", "qncd"], 2, "float twin"),
        (["-o", "no/such/folder/grid.png"], 1, "no/such/folder"),
        (["-o", "grid.jpg"], 2, "grid.jpg"),
        (["--guidance-scale", "nan"], 2, "--guidance-scale nan"),
    ],
)
def test_what_the_bundle_cannot_do_is_refused_in_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = qncd("sample", bundle, "-n", 2, *args)
    assert done.code == code, done.err
    assert words in done.line
    assert done.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [["-n", "0"], ["--seed", "-1"], ["--batch-size", "0"], ["--backend", "tpu"], ["-z"]])
def test_wrong_usage_is_exit_code_2(bundle: Path, args: list[str]) -> None:
    done = qncd("sample", bundle, *args)
    assert done.code == 2 and "Traceback" not in done.err and done.out == ""


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        for verb in ("sample", "inspect", "verify", "fit", "build", "bench"):
            done = qncd(verb, tmp_path / name)
            assert done.code == 1, verb
            assert name in done.line and "qncd export" in done.line


def test_a_flipped_byte_is_found_by_every_command(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny-w8a8"
    shutil.copytree(bundle, copy)
    for path in sorted(copy.iterdir()):
        if path.name in ("manifest.json", "report.html"):
            continue
        held = path.read_bytes()
        middle = len(held) // 2
        path.write_bytes(held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :])
        for verb in (("verify",), ("sample", "-n", 1, "-o", tmp_path / "x.png")):
            done = qncd(verb[0], copy, *verb[1:])
            assert done.code == 1 and path.name in done.line and "changed on disk" in done.line
        path.write_bytes(held)
    assert qncd("verify", copy).code == 0


def test_verify_names_what_is_missing_and_what_is_foreign(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny-w8a8"
    shutil.copytree(bundle, copy)
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt" in qncd("verify", copy).line
    (copy / "notes.txt").unlink()
    (copy / "unet.onnx").unlink()
    done = qncd("verify", copy, "--json")
    assert done.code == 1 and "unet.onnx" in done.line
    assert any("unet.onnx" in problem for problem in json.loads(done.out)["problems"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1}', "\0\0"])
def test_a_manifest_that_is_none(bundle: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    done = qncd("inspect", tmp_path)
    assert done.code == 1 and "manifest.json" in done.line


def test_auto_without_a_table_says_so_in_one_line_and_samples(bundle: Path, tmp_path: Path) -> None:
    done = qncd_process("sample", bundle, "-n", 1, "--n-steps", 3, "-o", tmp_path / "grid.png", "--json")
    assert done.code == 0, done.err
    assert "qncd fit" in done.line and "--n-steps 3" in done.line
    assert json.loads(done.out)["correction"] == "off"


def test_what_fit_writes_is_what_sample_then_takes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    way = ("--n-steps", 12, "--backend", "onnxruntime")
    few = ("--fit-size", 4)
    done = qncd("fit", bundle, *way, *few, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert Path(facts["output"]) == Path("engines/tiny-w8a8/corrections-onnxruntime-f32.npz")
    assert "off" in facts["figures"] and "map" in facts["refused"]
    told = json.loads(qncd("inspect", bundle, "--json").out)["corrections"]
    assert told[0]["file"] == facts["output"]  # looked into before the bundle's own
    assert told[0]["contest"] == {name: value for name, value in facts.items() if name != "output"}
    assert told[0]["n_steps"] == 12 and told[-1]["file"] == str(bundle / "corrections.npz")
    text = " ".join(qncd("inspect", bundle).out.split())  # lines are folded
    assert text.count(" auto takes ") == len(told) and f"12 steps, guidance 1.5, in {facts['output']}" in text
    for method in ("qncd", "qncd:paper"):
        used = json.loads(qncd("sample", bundle, "-n", 1, *way, "--correction", method, "--json").out)
        assert used["correction"] == method
        assert used["network_calls"] == 12 + used["extra_calls"] and used["extra_calls"] == 1
    before = contents(tmp_path / "engines")
    assert qncd("fit", bundle, *way, *few).code == 0
    assert contents(tmp_path / "engines") == before
    other = qncd("sample", bundle, "-n", 1, "--n-steps", 12, "--backend", "openvino", "--correction", "qncd")
    assert other.code == 1 and "--backend openvino" in other.line


def test_a_second_build_does_nothing(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    args = ("build", bundle, "--backend", "openvino", "--batch-size", 2, "--engine-dir", tmp_path / "engines", "--json")
    first, second = (json.loads(qncd(*args).out) for _ in range(2))
    assert first["seconds"] is not None and second["seconds"] is None
    assert first["integer_kernels"] > 0
    sampled = qncd(
        *("sample", bundle, "-n", 2, "--backend", "openvino", "--batch-size", 2),
        *("--engine-dir", tmp_path / "engines", "-o", tmp_path / "g.png"),
    )
    assert sampled.code == 0, sampled.err
    refused = qncd("build", bundle, "--backend", "onnxruntime", "--engine-dir", tmp_path / "engines")
    assert refused.code == 1 and "onnxruntime" in refused.line


def test_inspect_lists_every_layer_of_the_plan(bundle: Path) -> None:
    names = [layer["name"] for layer in json.loads((bundle / "plan.json").read_text())["layers"]]
    text = qncd("inspect", bundle)
    assert text.code == 0 and all(name in text.out for name in names)
    assert [layer["name"] for layer in json.loads(qncd("inspect", bundle, "--json").out)["plan"]["layers"]] == names


def test_bench_times_and_gates(bundle: Path, tmp_path: Path) -> None:
    quick = ("--backend", "onnxruntime", "--rounds", 1, "--eval-size", 2)
    done = qncd("bench", bundle, *quick, "--json", "-o", tmp_path / "speed")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((tmp_path / "speed/bench.json").read_text())
    assert "onnxruntime float" in (tmp_path / "speed/report.html").read_text()
    assert "neither a .json file nor a folder" in qncd("bench", bundle, *quick, "-o", tmp_path / "speed.txt").err
    gated = qncd("bench", bundle, *quick, "--require-speedup", 1e9)
    assert gated.code == 3 and "--require-speedup" in gated.line


def test_doctor_says_what_runs_here() -> None:
    text, facts = qncd("doctor"), json.loads(qncd("doctor", "--json").out)
    assert text.code == 0
    assert all(name in text.out for name in facts["engines"])


def test_a_backend_that_is_not_installed_names_its_installation(bundle: Path, tmp_path: Path) -> None:
    for name in ("openvino", "onnxruntime"):  # a module of that name that cannot be imported hides the real one
        (tmp_path / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name}", name="{name}")')
    done = qncd_process(
        *("sample", bundle, "-n", 1, "--backend", "openvino", "-o", tmp_path / "x.png"), PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert done.code == 1, done.err
    assert "openvino" in done.line and "pip install" in done.line
