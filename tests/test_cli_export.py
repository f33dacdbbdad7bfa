"""qncd export as a user meets it: what it says, what it writes, what it refuses, and that a refusal leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import SMALL, Export, contents, qncd

from qncd_deploy.bundle import file_problems, read_manifest

torch = pytest.importorskip("torch", reason="exporting needs torch")
yaml = pytest.importorskip("yaml", reason="CompVis configs are YAML")


@pytest.fixture
def shelves(tmp_path: Path) -> tuple[object, ...]:
    return ("--int8", *SMALL, "--calib-dir", tmp_path / "calib", "--onnx-dir", tmp_path / "export")


def nothing_left(folder: Path) -> bool:
    """No bundle, no partial folder, no lock."""
    shelf = folder / "export"
    return not shelf.exists() or not list(shelf.iterdir())


def test_json_is_one_object_of_what_was_made(exported: Export) -> None:
    facts, manifest = exported.facts, read_manifest(exported.bundle)
    assert Path(facts["bundle"]) == exported.bundle
    assert not facts["up_to_date"]
    assert not list(file_problems(exported.bundle, manifest))
    assert manifest.quality["pictures"] == 4
    assert manifest.recipe["--n-steps"] == 4
    assert "corrections" in manifest.roles


def test_a_second_run_changes_nothing_and_is_held_to_its_gates(exported: Export) -> None:
    before = contents(exported.home)
    done = qncd(*exported.again("--require-psnr", "200", "--json"))
    assert done.code == 3
    assert "--require-psnr 200" in done.line
    assert json.loads(done.out)["up_to_date"]
    assert contents(exported.home) == before


def test_a_gate_on_what_was_not_measured_is_not_met(own_graph: Export) -> None:
    for gate in ("--require-psnr", "--require-shift-below"):
        done = qncd(*own_graph.again(gate, "1"))
        assert done.code == 3
        assert gate in done.line and "not measured" in done.line
        assert "up to date" in done.out


def test_another_recipe_is_refused_by_the_flag_that_differs(own_graph: Export) -> None:
    before = contents(own_graph.home)
    for flag, value in (("--smooth", "off"), ("--seed", "7"), ("--quant-level", "1"), ("--exclude", "conv1")):
        done = qncd(*own_graph.again(flag, value))
        assert done.code == 1
        assert flag in done.line and "--force" in done.line
    assert contents(own_graph.home) == before


def test_other_inputs_under_the_same_name_are_refused(own_graph: Export, calibration: Path, tmp_path: Path) -> None:
    with np.load(calibration) as arrays:
        np.savez(tmp_path / "inputs.npz", **{name: array[:-1] for name, array in arrays.items()})
    done = qncd(*own_graph.again("--calib-data", tmp_path / "inputs.npz"))
    assert done.code == 1
    assert "calib-data" in done.line and "--force" in done.line


def test_a_changed_file_of_an_existing_bundle_is_not_called_up_to_date(own_graph: Export, tmp_path: Path) -> None:
    copy = own_graph.copy(tmp_path / "home")
    graph = copy.bundle / "unet.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    done = qncd(*copy.again())
    assert done.code == 1
    assert "unet.onnx" in done.line and "changed on disk" in done.line


def test_force_replaces(own_graph: Export, tmp_path: Path) -> None:
    copy = own_graph.copy(tmp_path / "home")
    done = qncd(*copy.again("--force", "--smooth", "off"))
    assert (done.code, done.err) == (0, "")
    assert read_manifest(copy.bundle).recipe["--smooth"] == "off"
    assert not list(file_problems(copy.bundle, read_manifest(copy.bundle)))
    assert [path.name for path in (copy.home / "export").iterdir()] == ["own-w8a8"]


def test_a_dry_run_lists_every_layer_and_writes_nothing(own_graph: Export, tmp_path: Path) -> None:
    elsewhere = replace(own_graph, home=tmp_path / "home")
    done = qncd(*elsewhere.again("--dry-run", "--exclude", "attentions", "--json"))
    assert (done.code, done.err) == (0, "")
    listed = {layer["name"]: layer for layer in json.loads(done.out)["layers"]}
    plan = json.loads((own_graph.bundle / "plan.json").read_text())
    whole = [layer["name"].removesuffix(".h") for layer in plan["layers"] if not layer["name"].endswith(".s")]
    assert list(listed) == whole  # what is split is decided by measurement
    excluded = [layer for name, layer in listed.items() if "attentions" in name]
    assert excluded and not any(layer["quantized"] for layer in excluded)
    assert any(layer["quantized"] for layer in listed.values())
    text = qncd(*elsewhere.again("--dry-run"))
    assert text.code == 0 and all(name in text.out for name in listed) and "nothing was written" in text.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--int8", "--format", "w8a8", "--n-steps", "0"], 1, "0"),
        (["--n-steps", "1000"], 1, "1000"),
        (["--calib-size", "0"], 2, "--calib-size 0"),
        (["--keep-float", "101"], 2, "--keep-float"),
        (["--alpha", "2"], 2, "--alpha"),
        (["--percentile", "3"], 1, "percentile"),
        (["--seed", "-1"], 2, "--seed"),
        (["--name", "../elsewhere"], 2, "--name"),
        (["--exclude", "("], 1, "regular expression"),
        (["--null-class", "6"], 2, "--null-class 6"),
        (["--eta", "nan"], 1, "eta"),
        (["--config", "missing.yaml"], 1, "missing.yaml"),
        (["--guidance-scale", "nan"], 2, "--guidance-scale"),
    ],
)
def test_what_contradicts_the_network_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, shelves: tuple[object, ...], args: list[str], code: int, words: str
) -> None:
    done = qncd("export", checkpoint, *shelves, *args)
    assert done.code == code, done.err
    assert words in done.line
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    "args", [["--int8", "--format", "w9a9"], ["--scheduler", "unknown"], ["--no-such-flag"], ["--n-steps", "many"], []]
)
def test_wrong_usage_is_exit_code_2(checkpoint: Path, args: list[str]) -> None:
    done = qncd("export", *([checkpoint] if args else []), *args)
    assert done.code == 2
    assert "Traceback" not in done.err and done.out == ""


def changed(checkpoint: Path, folder: Path, change: Any) -> Path:
    """A copy of the checkpoint whose loaded state went through `change`."""
    copy = folder / "tiny/model.ckpt"
    shutil.copytree(checkpoint.parent, copy.parent)
    state = torch.load(copy, weights_only=True)
    change(state["state_dict"])
    torch.save(state, copy)
    return copy


def test_damaged_checkpoints_are_refused(checkpoint: Path, tmp_path: Path, shelves: tuple[object, ...]) -> None:
    whole = checkpoint.read_bytes()
    for name, data in (("truncated", whole[: len(whole) // 2]), ("foreign", b"not a checkpoint"), ("empty", b"")):
        copy = tmp_path / name / "model.ckpt"
        copy.parent.mkdir()
        copy.write_bytes(data)
        shutil.copy(checkpoint.with_name("config.yaml"), copy.parent)
        done = qncd("export", copy, *shelves)
        assert done.code == 1, done.err
        assert str(copy) in done.line
    missing = qncd("export", tmp_path / "nowhere.ckpt", *shelves)
    assert missing.code == 1 and "nowhere.ckpt" in missing.line
    assert nothing_left(tmp_path)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, shelves: tuple[object, ...], checkpoint: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    copy = tmp_path / "evil/model.ckpt"
    copy.parent.mkdir()
    torch.save({"state_dict": {"w": Evil()}}, copy)
    shutil.copy(checkpoint.with_name("config.yaml"), copy.parent)
    done = qncd("export", copy, *shelves)
    assert done.code == 1 and str(copy) in done.line
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_are_refused(checkpoint: Path, tmp_path: Path, shelves: tuple[object, ...]) -> None:
    def spoil(state: dict[str, Any]) -> None:
        state["model.diffusion_model.middle_block.0.in_layers.2.weight"][0, 0, 0, 0] = float("nan")

    done = qncd("export", changed(checkpoint, tmp_path, spoil), *shelves)
    assert done.code == 1
    assert "middle_block.0.in_layers.2.weight" in done.line and "NaN" in done.line
    assert nothing_left(tmp_path)


def test_a_missing_or_wrong_config_is_refused(checkpoint: Path, tmp_path: Path, shelves: tuple[object, ...]) -> None:
    copy = tmp_path / "tiny/model.ckpt"
    shutil.copytree(checkpoint.parent, copy.parent)
    config = copy.with_name("config.yaml")
    good = yaml.safe_load(config.read_text())
    config.unlink()
    assert "--config" in qncd("export", copy, *shelves).line

    def line_for(text: str) -> str:
        config.write_text(text)
        done = qncd("export", copy, *shelves)
        assert done.code == 1, done.err
        return done.line

    assert "config.yaml" in line_for("model: [unclosed")
    assert "config.yaml" in line_for("just text")
    assert "config.yaml" in line_for("model: {params: {}}")
    unet = good["model"]["params"]["unet_config"]["params"]
    for key, value in (("model_channels", 64), ("image_size", "big"), ("channel_mult", [1, 2, 4]), ("context_dim", 7)):
        held, unet[key] = unet[key], value
        assert str(copy.parent) in line_for(yaml.safe_dump(good)), key
        unet[key] = held
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("size", ["0", "-8", "7.5", "huge"])
def test_sizes_that_are_none_are_refused(
    checkpoint: Path, tmp_path: Path, shelves: tuple[object, ...], size: str
) -> None:
    copy = tmp_path / "tiny/model.ckpt"
    shutil.copytree(checkpoint.parent, copy.parent)
    config = copy.with_name("config.yaml")
    config.write_text(re.sub(r"image_size: 8\b", f"image_size: {size}", config.read_text()))
    done = qncd("export", copy, *shelves)
    assert done.code == 1, done.err
    assert "image_size" in done.line
    assert nothing_left(tmp_path)


@pytest.mark.slow
def test_an_odd_size_works(checkpoint: Path, tmp_path: Path, shelves: tuple[object, ...]) -> None:
    copy = tmp_path / "tiny/model.ckpt"
    shutil.copytree(checkpoint.parent, copy.parent)
    config = copy.with_name("config.yaml")
    config.write_text(re.sub(r"image_size: 8\b", "image_size: 7", config.read_text()))
    assert qncd("export", copy, *shelves).code == 0
    out = tmp_path / "x.npz"
    assert qncd("sample", tmp_path / "export/tiny-w8a8", "-n", 1, "-o", out).code == 0
    with np.load(out) as found:
        assert found["latents"].shape == (1, 3, 7, 7)


def test_fp16_quantizes_nothing_and_is_the_baseline(own_graph: Export, calibration: Path, tmp_path: Path) -> None:
    import onnx

    done = qncd(
        *("export", own_graph.source, "--format", "fp16", "--calib-data", calibration, "--name", "own"),
        *("--onnx-dir", tmp_path, "--calib-dir", tmp_path),
    )
    assert done.code == 0, done.err
    folder = tmp_path / "own-fp16"
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert plan["format"] == "fp16"
    assert {layer["reason"] for layer in plan["layers"]} == {"format fp16"}
    assert not any(layer["weight_bits"] for layer in plan["layers"])
    half = onnx.load(folder / "unet-trt.onnx")
    types = {tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) == 4}
    assert types == {onnx.TensorProto.FLOAT16}


def test_fewer_bits_are_fewer_levels_in_eight(own_graph: Export, calibration: Path, tmp_path: Path) -> None:
    import onnx

    done = qncd(
        *("export", own_graph.source, "--format", "w4a6", "--calib-data", calibration, "--name", "own"),
        *("--onnx-dir", tmp_path, "--calib-dir", tmp_path, "--smooth", "off"),
    )
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "own-w4a6" / "plan.json").read_text(encoding="utf-8"))
    widths = {(layer["weight_bits"], layer["act_bits"]) for layer in plan["layers"]}
    assert (4, 6) in widths and widths <= {(4, 6), (8, 6), (None, None)}
    graph = onnx.load(tmp_path / "own-w4a6" / "unet.onnx").graph
    weights = {t.name: onnx.numpy_helper.to_array(t).astype(int) for t in graph.initializer}
    quantized = [layer for layer in plan["layers"] if layer["weight_bits"]]
    for layer in quantized:
        channels = np.moveaxis(weights[f"{layer['name']}_q"], layer["out_axis"], 0).reshape(
            -1, np.prod(layer["shape"]) // layer["shape"][layer["out_axis"]]
        )
        levels = channels + np.reshape(layer.get("weight_zero") or 0, (-1, 1))
        half = 2 ** (layer["weight_bits"] - 1)
        assert levels.min() >= -half and levels.max() <= half - 1
    assert quantized
    assert sum(node.op_type == "Clip" for node in graph.node) == sum(n.op_type == "QuantizeLinear" for n in graph.node)
