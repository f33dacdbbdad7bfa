"""--split from the option to the bundle: what is tried, what is chosen, what is written and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import contents, qncd

pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from skip_network import MAIN, SHORTCUT, skip_feeds, skip_proto  # noqa: E402

from qncd_deploy.bundle import read_manifest  # noqa: E402
from qncd_deploy.calib.trajectories import load_user_npz  # noqa: E402
from qncd_deploy.errors import UsageError  # noqa: E402
from qncd_deploy.pipeline.network import FloatNetwork, read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.quantize import policy_of  # noqa: E402
from qncd_deploy.pipeline.splitting import Splitting, candidates, find_splitting  # noqa: E402

LOUD, EVEN = "loud.onnx", "even.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, one with an encoder's half of thirty times the decoder's range; inputs for both."""
    found = tmp_path_factory.mktemp("skips")
    onnx.save(skip_proto(loudness=30), found / LOUD)
    onnx.save(skip_proto(loudness=1), found / EVEN)
    np.savez(found / "inputs.npz", **skip_feeds(32))
    return found


def options_for(folder: Path, name: str, **more: object) -> ExportOptions:
    return ExportOptions(folder / name, calib_data=folder / "inputs.npz", **more)


def splitting(folder: Path, options: ExportOptions, scratch: Path) -> tuple[FloatNetwork, Splitting]:
    network = read_network(options)
    calib = load_user_npz(folder / "inputs.npz", network.facts.inputs)
    ticks: list[tuple[int, int]] = []
    found = find_splitting(
        network, calib, options, policy_of(options), scratch, lambda done, total: ticks.append((done, total))
    )
    assert ticks == sorted(ticks) and all(done == total for done, total in ticks[-1:])
    assert bool(ticks) == bool(found.errors)
    return network, found


@pytest.mark.parametrize("format", ["w4a8", "w4a4"])
def test_auto_splits_where_it_helps(folder: Path, tmp_path: Path, format: str) -> None:
    network, loud = splitting(folder, options_for(folder, LOUD, format=format), tmp_path)
    assert loud.split == (SHORTCUT,) and loud.errors[SHORTCUT].pays
    weights = loud.apply(network.model).graph.initializers
    assert f"{SHORTCUT}.h" in weights and SHORTCUT not in weights and SHORTCUT in network.model.graph.initializers


def test_auto_leaves_whole_what_gains_too_little(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qncd_deploy.quant.split.MIN_GAIN", 0.9)  # random weights of few bits always gain a little
    _, even = splitting(folder, options_for(folder, EVEN, format="w4a8"), tmp_path)
    assert even.split == () and list(even.errors) == [SHORTCUT]


def test_auto_tries_nothing_at_8_bits(folder: Path, tmp_path: Path) -> None:
    _, loud = splitting(folder, options_for(folder, LOUD), tmp_path)
    assert loud == Splitting({}, ())


def test_the_other_choices_ask_no_error(folder: Path, tmp_path: Path) -> None:
    options = options_for(folder, EVEN)
    for split, expected in (("off", ()), ("shortcut", (SHORTCUT,)), ("all", (MAIN, SHORTCUT))):
        _, found = splitting(folder, replace(options, split=split), tmp_path)
        assert found.split == expected == tuple(found.errors)


def test_what_stays_float_is_not_split(folder: Path) -> None:
    options = options_for(folder, LOUD, split="all", exclude=(f"^{SHORTCUT}$",))
    assert [skip.name for skip in candidates(read_network(options), options, policy_of(options))] == [MAIN]


def test_a_choice_that_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="--split both: expected one of auto, off, shortcut, all"):
        options_for(folder, LOUD, split="both")


def test_an_export_writes_and_says_what_was_split(folder: Path, tmp_path: Path) -> None:
    def export(home: Path, *more: object):
        inputs = ("--calib-data", folder / "inputs.npz", "--onnx-dir", home, "--calib-dir", home, "--keep-float", 0)
        plain = ("--smooth", "off", "--recon", "off")  # so that the difference is splitting's own
        return qncd("export", folder / LOUD, "--format", "w4a8", *plain, *inputs, *more)

    done = export(tmp_path / "a", "--split", "all", "--include", f"^{SHORTCUT}$")
    assert done.code == 0, done.err
    assert f"split       2 of 2 convolutions of skip concatenations; their relative error: {MAIN} " in done.out
    bundle = tmp_path / "a/loud-w4a8"
    layers = {layer["name"]: layer for layer in json.loads((bundle / "plan.json").read_text())["layers"]}
    assert {f"{MAIN}.h", f"{MAIN}.s", f"{SHORTCUT}.h", f"{SHORTCUT}.s"} < set(layers) and SHORTCUT not in layers
    assert layers[f"{SHORTCUT}.s"]["act_scale"] > 10 * layers[f"{SHORTCUT}.h"]["act_scale"]
    manifest = read_manifest(bundle)
    assert manifest.recipe["--split"] == "all"
    found = manifest.quality["splitting"]
    assert found["split"] == 2 and found["convolutions"][SHORTCUT]["split"]
    assert found["convolutions"][SHORTCUT]["error"][1] < found["convolutions"][SHORTCUT]["error"][0]
    again = export(tmp_path / "b", "--split", "all", "--include", f"^{SHORTCUT}$", "--json")
    assert again.code == 0, again.err
    assert contents(tmp_path / "b/loud-w4a8")["plan.json"] == contents(bundle)["plan.json"]
    assert contents(tmp_path / "b/loud-w4a8")["unet.onnx"] == contents(bundle)["unet.onnx"]
    off = export(tmp_path / "c", "--split", "off")
    assert off.code == 0 and "split  " not in off.out
    halves, whole = (read_manifest(path).quality["output_sqnr_db"] for path in (bundle, tmp_path / "c/loud-w4a8"))
    assert halves > whole + 1  # of the network's output, decibels: what the other layers' rounding makes stays
    dry = export(tmp_path / "d", "--split", "shortcut", "--dry-run")
    assert "1 convolutions of skip concatenations to split" in dry.out
