"""A budget of bits from the command line to the plan: what is handed out, said and recorded, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import pytest
from cli_helpers import Finished, qncd

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("scipy")

from export_helpers import feeds_for, saved, traced

from qncd_deploy.bundle import read_manifest
from qncd_deploy.calib.observe import observe
from qncd_deploy.calib.trajectories import load_user_npz
from qncd_deploy.cli.options import Size, bits_line
from qncd_deploy.errors import PlanError, UsageError
from qncd_deploy.pipeline.bits import Bits, choose_bits
from qncd_deploy.pipeline.calibrate import probing
from qncd_deploy.pipeline.dry_run import dry_run
from qncd_deploy.pipeline.network import read_network
from qncd_deploy.pipeline.options import SPARE_BITS, ExportOptions
from qncd_deploy.pipeline.quantize import policy_of
from qncd_deploy.quant.decide import decide
from qncd_deploy.quant.plan import LayerSite, QuantPlan

AVERAGE = 5.5


@dataclass(frozen=True)
class OwnGraph:
    """A float graph of the user's own with its calibration data."""

    graph: Path
    calibration: Path

    def export(self, home: Path, *more: object) -> Finished:
        """Export it in four bits, plainly but for what `more` says."""
        shelves = ("--calib-dir", home / "calib_data", "--onnx-dir", home / "export", "--calib-data", self.calibration)
        plainly = ("--smooth", "off", "--recon", "off")
        return qncd("export", self.graph, "--format", "w4a8", *plainly, *shelves, *more)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnGraph:
    _, specs, model = traced("additive")
    folder = saved({"own.onnx": model}, tmp_path_factory.mktemp("own") / "graph")
    np.savez(folder / "inputs.npz", **feeds_for(specs, 16))
    return OwnGraph(folder / "own.onnx", folder / "inputs.npz")


@pytest.fixture(scope="module")
def mixed(own: OwnGraph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle of mixed bits and what the command said."""
    home = tmp_path_factory.mktemp("mixed")
    done = own.export(home, "--avg-bits", AVERAGE, "--include", "proj_in")
    assert done.code == 0, done.err
    return home / "export/own-w4a8", done.out


def test_the_plan_holds_the_bits_that_were_bought_and_why(mixed: tuple[Path, str]) -> None:
    bundle, _ = mixed
    plan = QuantPlan.from_json(json.loads((bundle / "plan.json").read_text()))
    bits = read_manifest(bundle).quality["bits"]
    chosen = [layer for layer in plan if "of the output error" in layer.reason]
    kinds = ["float" if layer.weight_bits is None else f"W{layer.weight_bits}" for layer in chosen]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == bits["layers"]
    assert {"W4", "W8"} <= set(kinds)
    held = sum(math.prod(layer.shape) * (layer.weight_bits or 16) for layer in chosen)
    assert bits["average"] == pytest.approx(held / sum(math.prod(layer.shape) for layer in chosen))
    assert AVERAGE - 0.5 < bits["average"] <= AVERAGE
    assert bits["budget"] == f"--avg-bits {AVERAGE:g}" and bits["measured"]
    assert bits["predicted_noise"] < bits["predicted_noise_uniform"]["W4"]
    assert plan.format == "w4a8" and {layer.act_bits for layer in plan.quantized} == {8}
    included = [layer for layer in plan if "proj_in" in layer.name]
    assert included and all(layer.quantized and layer.reason.startswith("--include") for layer in included)
    for layer in plan.quantized:
        assert ("would make" in layer.reason) == (layer.weight_bits == 8)


def test_the_budget_is_shown(mixed: tuple[Path, str]) -> None:
    bundle, said = mixed
    (line,) = (line for line in said.splitlines() if line.startswith("bits"))
    average = read_manifest(bundle).quality["bits"]["average"]
    for words in (f"{average:.2f} a weight on average", "--avg-bits 5.5", "W4", "W8", "predicted error of the output"):
        assert words in line
    assert "first token" not in said  # of three tokens of one size
    assert line.removeprefix("bits").strip() in qncd("inspect", bundle).out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--avg-bits", "3.9"], 2, "--avg-bits 3.9: expected 4 to 16"),
        (["--avg-bits", "17"], 2, "--avg-bits 17: expected 4 to 16"),
        (["--avg-bits", "nan"], 2, "--avg-bits nan: expected 4 to 16"),
        (["--avg-bits", "5", "--max-size", "1MB"], 2, "two budgets for the same weights"),
        (["--avg-bits", "5", "--format", "w8a8"], 2, "which --format w8a8 does not. Choose one of w4a8"),
        (["--max-size", "1MB", "--format", "fp16"], 2, "which --format fp16 does not"),
        (["--max-size", "0"], 2, "expected 1 byte or more"),
        (["--max-size", "1kB"], 1, "Give at least that"),
        (["--avg-bits", "6", "--exclude", "."], 1, "--avg-bits 6: none of "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    own: OwnGraph, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    done = own.export(tmp_path, *args)
    assert done.code == code and words in done.line
    assert not (tmp_path / "calib_data").exists()
    dry = own.export(tmp_path, *args, "--dry-run")
    assert (dry.code, dry.line) == (done.code, done.line)


def test_a_number_of_bits_in_words_is_refused(own: OwnGraph, tmp_path: Path) -> None:
    done = own.export(tmp_path, "--avg-bits", "four")
    assert done.code == 2 and "'four': expected auto, off or a number" in done.err


def test_the_least_size_that_is_named_can_be_met(own: OwnGraph, tmp_path: Path) -> None:
    refused = own.export(tmp_path, "--max-size", "1kB", "--dry-run").line
    needed = refused.partition(" take ")[2].split()[0]
    assert own.export(tmp_path, "--max-size", needed, "--dry-run").code == 0
    assert own.export(tmp_path, "--max-size", int(needed) - 1, "--dry-run").code == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("12MB", 12_000_000), ("1.5 kB", 1500), ("2KiB", 2048), ("3m", 3_000_000), ("1GiB", 2**30), ("700", 700)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["small", "12 parsecs", "-3MB", "1e6", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size like 12MB"):
        Size().convert(text, None, None)


def chooser(options: ExportOptions, scratch: Path) -> tuple[list[LayerSite], Callable[..., Bits]]:
    """The layers to quantize, and choose_bits of any options and any layers that are float already, calibrated once."""
    network, policy = read_network(options), policy_of(options)
    calib = load_user_npz(options.calib_data, network.facts.inputs)
    wanted = [site for site in network.sites if decide(site, policy)[0]]
    with probing(network.model, scratch) as probe:
        stats = observe(probe, calib.batches(8), [site.input for site in wanted])

    def choose(options: ExportOptions, kept: Container[str] = ()) -> Bits:
        return choose_bits(network.model, network, calib, stats, options, policy, scratch, kept=kept)

    return wanted, choose


def test_a_network_too_large_for_a_backward_pass_is_judged_by_its_weights_and_says_so(
    own: OwnGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ExportOptions(own.graph, format="w4a8", calib_data=own.calibration, max_size=500_000)
    _, choose = chooser(options, tmp_path)
    monkeypatch.setattr("qncd_deploy.pipeline.sensitivity.MEMORY_BYTES", 1)
    with caplog.at_level("INFO"):
        found = choose(options).to_json()
    assert not found["measured"] and found["packed_bytes"] <= 500_000 and found["layers"]["W8"] > 0
    assert "too large for a backward pass" in bits_line(found)
    assert "--max-size 500000 is spent by relative weight error" in caplog.text


def test_layers_that_stay_float_for_their_first_token_count_in_the_budget(own: OwnGraph, tmp_path: Path) -> None:
    options = ExportOptions(own.graph, format="w4a8", calib_data=own.calibration, avg_bits=8)
    wanted, choose = chooser(options, tmp_path)
    kept = {max(wanted, key=lambda site: math.prod(site.shape)).name}
    found = choose(options, kept).assignment
    assert found.choices.keys() == {site.name for site in wanted} - kept
    bits = {site.name: 16 if site.name in kept else found.choices[site.name].weight_bits or 16 for site in wanted}
    sizes = {site.name: math.prod(site.shape) for site in wanted}
    assert found.average == pytest.approx(sum(sizes[n] * bits[n] for n in bits) / sum(sizes.values()))
    assert found.average <= 8
    everything = {site.name for site in wanted}
    assert choose(options, everything).assignment is None


@pytest.mark.parametrize(
    ("changes", "preset", "pictures"),
    [
        ({}, None, 32),
        ({"recon": "fast"}, "fast", 64),
        ({"format": "w4a8"}, "fast", 64),
        ({"format": "w4a8", "recon": "off"}, None, 32),
        ({"format": "w4a6", "recon": "paper", "calib_size": 100}, "paper", 100),
        ({"format": "w4a16"}, None, 32),
    ],
)
def test_learning_the_rounding_takes_more_pictures(changes: dict, preset: str | None, pictures: int) -> None:
    options = ExportOptions(Path("model.ckpt"), **changes)
    assert (options.preset and options.preset.name, options.calib_pictures) == (preset, pictures)


def test_a_dry_run_counts_the_blocks_that_smoothing_tries(own: OwnGraph) -> None:
    options = ExportOptions(own.graph, format="w4a8", calib_data=own.calibration)
    every = dry_run(options).residual_blocks
    assert every > 0
    assert dry_run(replace(options, smooth="off")).residual_blocks == 0
    name = read_network(options).resblocks[0].conv2
    assert dry_run(replace(options, exclude=(f"^{re.escape(name)}$",))).residual_blocks == every - 1


def test_a_graph_that_nothing_is_quantized_of_needs_no_data(own: OwnGraph, tmp_path: Path) -> None:
    shelves = ("--calib-dir", tmp_path / "calib_data", "--onnx-dir", tmp_path / "export")
    done = qncd("export", own.graph, "--format", "fp16", *shelves)
    assert done.code == 0 and (tmp_path / "export/own-fp16/unet.onnx").exists(), done.err
    with pytest.raises(UsageError, match="Give --calib-data"):
        ExportOptions(own.graph)


def test_a_budget_is_spent_where_none_is_given_and_leaves_alone_what_is_float_already(
    own: OwnGraph, tmp_path: Path
) -> None:
    options = ExportOptions(own.graph, format="w4a8", calib_data=own.calibration, keep_float=0.0)
    wanted, chosen = chooser(options, tmp_path)
    # so much in float that 4.25 bits on average could not be met, were it to count
    largest = sorted(wanted, key=lambda site: -math.prod(site.shape))
    kept = {site.name for site in largest[: len(wanted) // 2]}
    found = chosen(options, kept)
    sizes = {site.name: math.prod(site.shape) for site in wanted if site.name not in kept}
    assert set(found.exceptions) == set(sizes)
    widths = {name: choice.weight_bits for name, choice in found.exceptions.items()}
    assert set(widths.values()) == {4, 8}
    average = sum(sizes[name] * width for name, width in widths.items()) / sum(sizes.values())
    assert 4 < average <= 4 + SPARE_BITS == found.budget.average
    with pytest.raises(PlanError, match=r"^--avg-bits 4.25: "):
        chosen(replace(options, avg_bits=4 + SPARE_BITS), kept)
    for spends_nothing in ({"avg_bits": "off"}, {"format": "w8a8"}):
        bits = chosen(replace(options, **spends_nothing), kept)
        assert bits.budget is None and not bits.exceptions
    assert chosen(replace(options, max_size=10**9), kept).budget.bytes == 10**9
