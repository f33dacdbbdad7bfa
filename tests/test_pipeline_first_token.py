"""The first text token: its measured cost, what stays float for it, and that nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from cli_helpers import qncd

for library in ("torch", "diffusers", "transformers", "onnxruntime"):
    pytest.importorskip(library, reason=f"exporting text networks needs {library}")

from export_helpers import Arrays, feeds_for, parsed, saved  # noqa: E402
from test_pipeline_text import SHALLOW  # noqa: E402
from text_models import TWINS  # noqa: E402

from qncd_deploy.bundle import read_manifest  # noqa: E402
from qncd_deploy.calib.trajectories import CalibSet  # noqa: E402
from qncd_deploy.engines.base import open_engine  # noqa: E402
from qncd_deploy.errors import UsageError  # noqa: E402
from qncd_deploy.export.graph import find_inputs, find_sites  # noqa: E402
from qncd_deploy.pipeline.first_token import PROMPTS, FirstTokens, find_first_tokens  # noqa: E402
from qncd_deploy.pipeline.network import FloatNetwork, condition_rows, read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.progress import Silent  # noqa: E402
from qncd_deploy.pipeline.quantize import Quantized, policy_of, quantize  # noqa: E402
from qncd_deploy.quant.first_token import FirstToken, first_token  # noqa: E402
from qncd_deploy.quant.plan import LayerSite  # noqa: E402
from qncd_deploy.quant.policy import Policy  # noqa: E402
from qncd_deploy.quant.smooth import Reader  # noqa: E402

TEXT = "encoder_hidden_states"
TIMES = 30
READERS = 2 * 4
"""Keys and values of the twin's four transformer blocks."""
PLAIN = {"smooth": "off", "keep_float": 0.0}


def louder(rows: np.ndarray, times: float = TIMES) -> np.ndarray:
    """Text whose first token is so many times as large."""
    return np.concatenate([rows[:, :1] * np.float32(times), rows[:, 1:]], axis=1)


# What is measured -----------------------------------------------------------------------------------------------------


def readers(seed: int = 0) -> tuple[list[Reader], list[np.ndarray]]:
    """A MatMul, and a Gemm that holds its weight transposed; and both weights (inputs, outputs)."""
    weights = [np.random.default_rng(seed + i).standard_normal((32, 24)).astype(np.float32) for i in range(2)]
    stored = [("MatMul", weights[0], 1), ("Gemm", weights[1].T, 0)]
    found = [Reader(LayerSite(op, op, w.shape, "x", f"y{op}", axis), w) for op, w, axis in stored]
    return found, weights


def test_the_errors_by_hand() -> None:
    rng = np.random.default_rng(3)
    fit, held_out = (louder(rng.standard_normal((6, 9, 32)).astype(np.float32)) for _ in range(2))
    layers, weights = readers()
    found = first_token("text", layers, fit=fit, held_out=held_out, policy=Policy(act_method="minmax"))

    def rounded(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
        step = np.float32(np.abs(seen).max()) / np.float32(127)
        return np.clip(np.rint(x / step), -128, 127) * step.astype(np.float64)

    def error(x: np.ndarray, q: np.ndarray) -> float:
        shares = [np.sum(((q - x) @ w) ** 2) / np.sum((x @ w) ** 2) for w in (w.astype(float) for w in weights)]
        return float(np.mean(shares))

    head, rest = held_out[:, :1], held_out[:, 1:]
    together = [error(x, rounded(x, fit)) for x in (head, rest)]
    expected = (*together, error(rest, rounded(rest, fit[:, 1:])))
    # The layers run in float32: 32 terms to 2^-24 of the output each, beside errors of 0.2 % of it and more.
    assert (found.error_first, found.error_others, found.error_apart) == pytest.approx(expected, rel=1e-3)
    both = np.abs(np.concatenate([fit, held_out]))
    assert found.times == pytest.approx(both[:, 0].max() / both[:, 1:].max(), rel=1e-6)
    assert found.pays and f"{found.times:.3g} times as large" in found.line("text")


def test_the_errors_in_closed_form() -> None:
    """Rounding to steps of s has a noise of s^2 / 12 whatever is rounded, which weights treat like any other noise."""
    rng = np.random.default_rng(4)
    fit, held_out = (louder(rng.uniform(-1, 1, (64, 9, 32)).astype(np.float32)) for _ in range(2))
    found = first_token("text", readers()[0], fit=fit, held_out=held_out, policy=Policy(act_method="minmax"))
    for error, widest, power in (
        (found.error_first, TIMES, TIMES**2 / 3),
        (found.error_others, TIMES, 1 / 3),
        (found.error_apart, 1, 1 / 3),
    ):
        # Two weights project 32 inputs to 24 outputs: some 5 % of chance in how they treat noise and signal.
        assert error == pytest.approx((widest / 127) ** 2 / 12 / power, rel=0.15)


def test_what_pays() -> None:
    assert FirstToken(30, 1e-4, 0.02, 1e-4).pays
    assert FirstToken(30, 0.5, 1e-4, 1e-4).pays  # a range that cuts the first token off
    assert not FirstToken(1.2, 1e-4, 1.5e-4, 1e-4).pays
    assert not FirstToken(0.01, 0.5, 1e-4, 1e-4).pays  # small, so that nothing of it is missed


# What stays float -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> FloatNetwork:
    folder = tmp_path_factory.mktemp("twin") / "sd15"
    TWINS["sd15"](**SHALLOW).save_pretrained(folder)
    return read_network(ExportOptions(folder))


def calibration(network: FloatNetwork, times: float = 1, seed: int = 0) -> CalibSet:
    """Random latents beside the bundle's own prompts and the empty one, each twice, the first token made larger."""
    given, null = condition_rows(network, range(12))
    assert given is not None and null is not None
    text = louder(np.tile(np.concatenate([given[TEXT], null[TEXT]]), (2, 1, 1)), times)
    return CalibSet({**feeds_for(list(network.facts.sized_inputs), len(text), seed), TEXT: text}, "test")


@pytest.fixture(scope="module")
def quantized(twin: FloatNetwork, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Quantized]:
    """The twin, calibrated with a first token of this size; once for all tests that ask for the same."""

    @cache
    def make(times: float = TIMES, **more: Any) -> Quantized:
        folder = tmp_path_factory.mktemp("quantized")
        options = ExportOptions(Path("sd15"), **{**PLAIN, **more})
        return quantize(twin, calibration(twin, times), options, folder / "work", folder, Silent())

    return make


def snr_db(found: Quantized, feeds: Arrays, folder: Path) -> float:
    saved(found.graphs, folder)
    outputs = []
    for name in ("unet-float.onnx", "unet.onnx"):
        with open_engine("onnxruntime", folder / name, threads=1) as engine:
            outputs += engine(feeds).values()
    exact, rounded = outputs
    return float(10 * np.log10(np.square(exact).sum() / np.square(rounded - exact).sum()))


def float_readers(found: Quantized) -> set[str]:
    return {layer.name for layer in found.plan if "token 0" in layer.reason}


def test_readers_of_a_large_first_token_stay_float(quantized: Callable[..., Quantized]) -> None:
    auto, off = quantized(), quantized(first_token="off")
    read = {layer.name for layer in auto.plan if layer.input == TEXT}
    assert len(read) == READERS and all("attn2.to_k" in name or "attn2.to_v" in name for name in read)
    assert float_readers(auto) == read == set(auto.first_tokens.exceptions)
    assert not any(layer.quantized for layer in auto.plan if layer.input == TEXT)
    assert all(layer.quantized for layer in off.plan if layer.input == TEXT) and off.first_tokens == FirstTokens()
    others = [layer for layer in auto.plan if layer.input != TEXT]
    assert others == [layer for layer in off.plan if layer.input != TEXT]
    (measured,) = auto.first_tokens.found.values()
    assert measured.error_others > 10 * measured.error_apart


@pytest.mark.parametrize(("exclude", "gain"), [((), 0.2), ((r"^(?!.*attn2\.to_[qkv])",), 2)])
def test_float_readers_bring_the_output_closer(
    twin: FloatNetwork, quantized: Callable[..., Quantized], tmp_path: Path, exclude: tuple[str, ...], gain: float
) -> None:
    """A little where the rounding of forty other layers makes most of the error; more where that of these and of the
    queries is all there is: 0.4 and 3.3 dB. Inputs are not those of calibration.
    """
    unseen = calibration(twin, TIMES, seed=1).arrays
    better, worse = (
        snr_db(quantized(first_token=choice, exclude=exclude), unseen, tmp_path / choice) for choice in ("auto", "off")
    )
    assert better > worse + gain


def test_layers_that_stay_float_are_not_smoothed(
    twin: FloatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def watch(network: FloatNetwork, *_: Any) -> None:
        raise Reached({site.name for site in twin.sites} - {site.name for site in network.sites})

    monkeypatch.setattr("qncd_deploy.pipeline.quantize.find_smoothing", watch)
    for times, left_out in ((TIMES, READERS), (1, 0)):
        with pytest.raises(Reached) as reached:
            quantize(twin, calibration(twin, times), ExportOptions(Path("sd15")), tmp_path, tmp_path, Silent())
        (names,) = reached.value.args
        assert len(names) == left_out and all("attn2.to_" in name for name in names)


def test_nothing_changes_without_an_outlier(quantized: Callable[..., Quantized]) -> None:
    auto, off = quantized(1), quantized(1, first_token="off")
    (measured,) = auto.first_tokens.found.values()
    assert not measured.pays and not auto.first_tokens.exceptions and measured.times < 2
    assert auto.plan == off.plan and all(layer.quantized for layer in auto.plan if layer.input == TEXT)


def test_include_overrules(twin: FloatNetwork, quantized: Callable[..., Quantized]) -> None:
    found = quantized(include=(r"attn2\.to_k",))
    assert {name.split(".")[-2] for name in float_readers(found)} == {"to_v"}
    assert all(layer.quantized for layer in found.plan if "attn2.to_k" in layer.name)
    everything = ExportOptions(Path("sd15"), include=("attn2.to_[kv]",))
    assert find_first_tokens(twin, calibration(twin, TIMES), everything, policy_of(everything)) == FirstTokens()


def test_a_budget_of_bits_is_spent_on_the_others(quantized: Callable[..., Quantized]) -> None:
    found = quantized(format="w4a8", recon="off", avg_bits=5.5, keep_float=2.0)
    assert len(float_readers(found)) == READERS and found.bits.assignment is not None
    assert not float_readers(found) & set(found.bits.exceptions)


def test_each_prompt_is_looked_at_once(twin: FloatNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def watch(name: str, readers: Any, *, fit: np.ndarray, held_out: np.ndarray, policy: Policy) -> FirstToken:
        seen.update(fit=fit, held_out=held_out)
        return first_token(name, readers, fit=fit, held_out=held_out, policy=policy)

    monkeypatch.setattr("qncd_deploy.pipeline.first_token.first_token", watch)
    options = ExportOptions(Path("sd15"))
    given, _ = condition_rows(twin, range(32))
    blank = np.concatenate([given[TEXT][:1, :1], np.zeros_like(given[TEXT][:1, 1:])], axis=1)
    for rows, fit, held_out in (
        (np.tile(given[TEXT][:5], (3, 1, 1)), [0, 2, 4], [1, 3]),
        (given[TEXT][:1], [0], [0]),
        (np.concatenate([blank, given[TEXT][:2]]), [0], [1]),
    ):
        find_first_tokens(twin, CalibSet({TEXT: rows}, "test"), options, policy_of(options))
        assert (seen["fit"] == given[TEXT][fit]).all() and (seen["held_out"] == given[TEXT][held_out]).all()
    find_first_tokens(twin, CalibSet({TEXT: given[TEXT]}, "test"), options, policy_of(options))
    assert len(seen["fit"]) + len(seen["held_out"]) == PROMPTS
    assert not find_first_tokens(twin, CalibSet({TEXT: blank}, "test"), options, policy_of(options)).found


OWN = """<ir_version: 8, opset_import: ["": 18]>
    told (float[N,4,8,8] sample, float[SHAPE] text) => (float[N,4,8,8] out)
    {
        a = Conv <pads = [1, 1, 1, 1]> (sample, first)
        rows = Reshape (text, sixteen)
        keys = Gemm (rows, keyed)
        tokens = Reshape (keys, eight)
        mean = ReduceMean <keepdims = 0> (tokens, axis)
        told = Unsqueeze (mean, axes)
        b = Add (a, told)
        c = Conv <pads = [1, 1, 1, 1]> (b, middle)
        out = Conv (c, last)
    }"""


def own(shape: str) -> ir.Model:
    """Convolutions, and between them a Gemm that reads a text of this shape: (N, L, 16), or (N, 16)."""
    rng = np.random.default_rng(0)
    shapes = {"first": (8, 4, 3, 3), "keyed": (16, 8), "middle": (8, 8, 3, 3), "last": (4, 8, 1, 1)}
    arrays = {name: rng.standard_normal(size).astype(np.float32) / 4 for name, size in shapes.items()}
    tokens = int(shape.split(",")[1]) if shape.count(",") > 1 else 1
    constants = {"sixteen": [-1, 16], "eight": [-1, tokens, 8], "axis": [1], "axes": [2, 3]}
    return parsed(OWN.replace("SHAPE", shape), arrays | {name: np.array(value) for name, value in constants.items()})


def own_feeds(*shape: int) -> Arrays:
    rng = np.random.default_rng(1)
    text = louder(rng.standard_normal(shape).astype(np.float32)) if len(shape) > 2 else np.ones(shape, np.float32)
    return {"sample": rng.standard_normal((shape[0], 4, 8, 8)).astype(np.float32), "text": text}


@pytest.mark.parametrize("shape", [(6, 1, 16), (6, 16)])
def test_one_token_or_a_vector_is_not_text(twin: FloatNetwork, shape: tuple[int, ...]) -> None:
    model = own(",".join(["N", *map(str, shape[1:])]))
    inputs = find_inputs(model)
    sites = tuple(replace(site, role="body") for site in find_sites(model, inputs))  # both stay float for other reasons
    network, options = replace(twin, model=model, inputs=inputs, sites=sites), ExportOptions(Path("own"))
    calib = CalibSet(own_feeds(*shape), "test")
    assert find_first_tokens(network, calib, options, policy_of(options)) == FirstTokens()


# From the command line ------------------------------------------------------------------------------------------------


def test_an_export_says_and_writes_what_it_found(tmp_path: Path) -> None:
    """Of a layer behind a reshape, in the user's own graph."""
    folder = saved({"own.onnx": own("N,5,16")}, tmp_path / "graph")
    np.savez(folder / "inputs.npz", **own_feeds(16, 5, 16))

    def export(home: Path, *more: object) -> tuple[Path, str]:
        shelves = ("--calib-dir", home, "--onnx-dir", home, "--calib-data", folder / "inputs.npz")
        done = qncd("export", folder / "own.onnx", "--keep-float", 0, *shelves, *more)
        assert done.code == 0, done.err
        return home / "own-w8a8", done.out

    bundle, said = export(tmp_path / "auto")
    manifest = read_manifest(bundle)
    found = manifest.quality["first_token"]
    measured = found["inputs"]["text"]
    assert found["kept_float"] == 1 and measured["kept_float"] and manifest.recipe["--first-token"] == "auto"
    assert measured["error_others"] > 10 * measured["error_apart"]
    assert all(value == float(f"{value:.6g}") for key, value in measured.items() if key != "kept_float")
    line = f"first token 1 layers that read it stay float: token 0 of text is {measured['times']:.3g} times as large"
    assert line in said and line in qncd("inspect", bundle).out
    layers = {layer["name"]: layer for layer in json.loads((bundle / "plan.json").read_text())["layers"]}
    assert layers["keyed"]["reason"].startswith("token 0 of text") and layers["keyed"]["weight_bits"] is None
    off, quiet = export(tmp_path / "off", "--first-token", "off")
    assert "first token" not in quiet and "first token" not in qncd("inspect", off).out
    plain = read_manifest(off)
    assert "first_token" not in plain.quality and plain.recipe["--first-token"] == "off"
    assert manifest.quality["output_sqnr_db"] > plain.quality["output_sqnr_db"]


def test_another_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="--first-token on: expected one of auto, off"):
        ExportOptions(Path("x"), first_token="on")
