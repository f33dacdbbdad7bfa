"""Smoothing from a float graph to the quantized one: found per edge, folded, kept by what the network makes of it."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch", reason="layers are compared with torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers", reason="the helpers make networks with it")

from export_helpers import parsed, run  # noqa: E402

from qncd_deploy.calib.trajectories import CalibSet, load_user_npz  # noqa: E402
from qncd_deploy.cli.exported import smoothing_line  # noqa: E402
from qncd_deploy.errors import CalibrationError  # noqa: E402
from qncd_deploy.export.linears import find_linear_edges  # noqa: E402
from qncd_deploy.pipeline import quantize as quantizing  # noqa: E402
from qncd_deploy.pipeline import smoothing as judging  # noqa: E402
from qncd_deploy.pipeline.network import FloatNetwork, read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.progress import Silent  # noqa: E402
from qncd_deploy.pipeline.quantize import policy_of, quantize  # noqa: E402
from qncd_deploy.pipeline.smoothing import OP_GAIN, Smoothing, find_smoothing, judge  # noqa: E402
from qncd_deploy.quant.plan import Choice  # noqa: E402
from qncd_deploy.quant.smooth import MIN_GAIN, Decision  # noqa: E402

C = 16
LOUD = np.where(np.arange(C) % 8 == 0, 40.0, 1.0).astype(np.float32)
"""The gain of a normalisation that makes two channels forty times as loud as the others."""

GRAPH = """<ir_version: 8, opset_import: ["": 18]>
    denoiser (float[N,16,4,4] x, float[N] t) => (float[N,16,4,4] y)
    {
        first_out = Conv (x, first)
        columns = Reshape (first_out, flat)
        rows = Transpose <perm = [0, 2, 1]> (columns)
        loud = LayerNormalization <axis = -1> (rows, loud_gamma, beta)
        q = MatMul (loud, query)
        k = MatMul (loud, key)
        qk = Mul (q, k)
        even = LayerNormalization <axis = -1> (qk, even_gamma, beta)
        e = MatMul (even, plain)
        shared = LayerNormalization <axis = -1> (e, loud_gamma, beta)
        o = MatMul (shared, out)
        residual = Add (o, shared)
        turned = Transpose <perm = [0, 2, 1]> (residual)
        planes = Reshape (turned, picture)
        joined = Concat <axis = 1> (planes, first_out)
        skip = Conv (joined, shortcut)
        y = Conv (skip, last)
    }"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[FloatNetwork, CalibSet, ExportOptions]:
    rng = np.random.default_rng(0)
    quiet = (1 / LOUD)[:, None]  # what is loud is weighed little, as in a trained network
    arrays = {
        "first": rng.normal(size=(C, C, 1, 1)),
        "query": rng.normal(size=(C, C)) * quiet,
        "key": rng.normal(size=(C, 2 * C))[:, :C] * quiet,
        "plain": rng.choice([-1.0, 1.0], (C, C)),
        "out": rng.normal(size=(C, C)) * quiet,
        "shortcut": rng.normal(size=(C, 2 * C, 1, 1)),
        "last": rng.normal(size=(C, C, 1, 1)),
        "loud_gamma": LOUD,
        "even_gamma": np.ones(C),
        "beta": np.zeros(C),
    }
    constants = {"flat": np.array([0, C, 16]), "picture": np.array([0, C, 4, 4])}
    model = parsed(GRAPH, {name: array.astype(np.float32) for name, array in arrays.items()} | constants)
    folder = tmp_path_factory.mktemp("network")
    ir.save(model, folder / "net.onnx")
    np.savez(
        folder / "data.npz",
        x=rng.standard_normal((64, C, 4, 4), np.float32),
        t=np.repeat(np.arange(32, dtype=np.float32), 2),
    )
    options = ExportOptions(folder / "net.onnx", calib_data=folder / "data.npz", keep_float=0)
    found = read_network(options)
    return found, load_user_npz(folder / "data.npz", found.facts.inputs), options


def tick(done: int, of: int) -> None: ...


def test_linears_are_found_by_the_edge_they_share(network) -> None:
    net, _, _ = network
    edges = find_linear_edges(net.model, net.sites, sample="x")
    found = {tuple(site.name for site in edge.layers): edge.free for edge in edges}
    # the shortcut reads a concatenation; `shared` has another reader, and no normalisation makes what convolutions read
    assert found == {("first",): False, ("query", "key"): True, ("plain",): True, ("out",): False, ("last",): False}


def test_each_edge_is_gated_by_its_own_error(network, tmp_path: Path) -> None:
    net, calib, options = network
    found = find_smoothing(net, calib, options, policy_of(options), tmp_path, tick)
    assert set(found.linears) == {"query", "plain", "out"} and not found.blocks
    query, plain, out = (found.linears[name] for name in ("query", "plain", "out"))
    assert query.layers == ("query", "key") and query.min_gain == MIN_GAIN
    assert out.layers == ("out",) and out.min_gain == OP_GAIN
    assert query.kept and query.error_after < query.error_before / 10
    assert not plain.kept  # nothing is loud there
    assert found.folded == ("query", "out")
    everywhere = find_smoothing(net, calib, replace(options, gate=False), policy_of(options), tmp_path, tick)
    assert everywhere.folded == ("query", "plain", "out")


@pytest.mark.parametrize("smooth", ["off", "qncd:paper"])
def test_linears_are_left_alone(network, tmp_path: Path, smooth: str) -> None:
    net, calib, options = network
    found = find_smoothing(net, calib, replace(options, smooth=smooth), policy_of(options), tmp_path, tick)
    assert not found.linears and not found.folded


def test_a_given_alpha_is_used_for_linears_too(network, tmp_path: Path) -> None:
    net, calib, options = network
    found = find_smoothing(net, calib, replace(options, alpha=0.6), policy_of(options), tmp_path, tick)
    assert {decision.label for decision in found.linears.values()} == {"smoothquant alpha 0.6"}


def test_folding_changes_nothing_but_rounding(network, tmp_path: Path) -> None:
    net, calib, options = network
    found = find_smoothing(net, calib, options, policy_of(options), tmp_path, tick)
    feeds = {name: array[:8] for name, array in calib.arrays.items()}
    expected = run(net.model, feeds)["y"]
    count = [Counter(node.op_type for node in m.graph)["Mul"] for m in (net.model, found.divide(net.model))]
    assert count[1] == count[0] + 2
    folded = found.fold(net.model)
    assert Counter(node.op_type for node in folded.graph)["Mul"] == count[0] + 1  # `out` alone needs an operation
    # a product with S and one with 1 / S more in each of 2 layers of 7: some ten roundings of 6e-8
    np.testing.assert_allclose(run(folded, feeds)["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_quantized_network_has_what_lowers_its_error(network, tmp_path: Path) -> None:
    net, calib, options = network
    made = quantize(net, calib, options, tmp_path / "work", tmp_path, Silent())
    before, after = made.smoothing.network_error
    assert made.smoothing.folded == ("query", "out") and after < before / 2
    assert made.plan["query"].input == made.plan["key"].input == "loud_smooth"
    assert made.plan["plain"].input == "even"
    again = quantize(net, calib, options, tmp_path / "work", tmp_path, Silent())
    assert again.plan == made.plan


def test_rounding_that_cannot_be_learned_is_left_to_the_nearest_level_unless_asked_for(network, tmp_path: Path) -> None:
    net, calib, options = network
    few, four = calib.take(np.arange(7)), replace(options, format="w4a8", smooth="off", split="off")
    made = quantize(net, few, four, tmp_path / "work", tmp_path, Silent())
    assert made.reconstruction is None and made.plan.quantized
    (note,) = made.notes
    assert "rounding is not learned" in note and "7 calibration rows, expected at least 8" in note
    with pytest.raises(CalibrationError, match="7 calibration rows"):
        quantize(net, few, replace(four, recon="fast"), tmp_path / "work", tmp_path, Silent())


def decision(*layers: str) -> Decision:
    return Decision(layers, "s", np.ones(C, np.float32), 1.0, 0.5)


def test_layers_that_forms_have_in_common_are_planned_once(network, tmp_path: Path, monkeypatch) -> None:
    net, calib, options = network
    policy, planned = policy_of(options), []
    search = type(policy).weight_grid

    def counted(self, weight, *args, **kwargs):
        planned.append(weight.shape)
        return search(self, weight, *args, **kwargs)

    monkeypatch.setattr(type(policy), "weight_grid", counted)
    smoothed = find_smoothing(net, calib, options, policy, tmp_path, tick)
    forms = [net.model, smoothed.fold(net.model)]
    seen = quantizing._ranges(net, (net.model, smoothed.divide(net.model)), calib, policy, tmp_path, tick)
    planned.clear()
    apart = [quantizing._drafts(net, [(form, {})], seen, policy)[0].plan for form in forms]
    alone = len(planned)
    planned.clear()
    together = [draft.plan for draft in quantizing._drafts(net, [(form, {}) for form in forms], seen, policy)]
    assert [plan.dumps() for plan in together] == [plan.dumps() for plan in apart]
    assert together[0].dumps() != together[1].dumps()  # smoothing did change some
    changed = sum(len(smoothed.linears[name].layers) for name in smoothed.folded)
    assert alone - len(planned) == len(apart[0].quantized) - changed > 0
    common = apart[0].quantized[0].name
    kept = {common: Choice(None, "rounding it hurts most")}
    plans = [draft.plan for draft in quantizing._drafts(net, [(forms[0], {}), (forms[0], kept)], seen, policy)]
    assert [plan[common].weight_bits for plan in plans] == [8, None]


def test_blocks_and_linears_are_alternatives() -> None:
    found = Smoothing({"b": decision("b")}, {"q": decision("q", "k")}, ("b", "q"))
    assert [each.folded for each in found.alternatives()] == [(), ("b",), ("q",), ("b", "q")]
    assert [each.folded for each in replace(found, folded=("q",)).alternatives()] == [(), ("q",)]
    assert [each.folded for each in replace(found, folded=()).alternatives()] == [()]


ROWS = np.random.default_rng(1).normal(size=20)


@pytest.mark.parametrize(
    ("errors", "gains", "large", "chosen"),
    [
        ((1.0, 0.5, 0.6, 0.4), (0.0, 1.0, 3.0, 2.0), False, 2),  # the closest pictures, not the least error
        ((1.0, 0.5, 0.6, 0.4), (0.0, 1.0, 3.0, 2.0), True, 3),  # the others made no pictures
        ((1.0, 0.5, 0.6, 0.4), (0.0, 1.0, 3.0, 0.1), True, 0),
        ((1.0, 0.5, 0.99, 0.4), (0.0, 1.0, 3.0, 0.5), False, 1),  # a fall of the error within MIN_GAIN is none
        # twenty pictures with a spread of 1 dB: 0.2 dB are chance
        ((1.0, 0.5, 0.6, 0.4), (0.0, 0.1, -1.0, 0.2), False, 0),
        ((1.0, 1.1, 1.2, 1.3), (0.0, 9.0, 9.0, 9.0), False, 0),
        ((1.0, 1.1, 1.2, 1.3), (0.0, 9.0, 9.0, 9.0), True, 0),
    ],
)
def test_the_closest_pictures_win(monkeypatch, network, tmp_path, errors, gains, large, chosen) -> None:
    _, calib, options = network
    drafts = [SimpleNamespace(master=partial(SimpleNamespace, index=i), plan=None) for i in range(4)]
    alternatives = Smoothing({"b": decision("b")}, {"q": decision("q")}, ("b", "q")).alternatives()
    opened: list[int] = []

    @contextmanager
    def running(graph, plan, scratch):
        opened.append(graph.index)
        yield graph

    def entered(forms) -> list[int]:
        with ExitStack() as stack:
            return [stack.enter_context(form()).index for form in forms]

    monkeypatch.setattr(judging, "running", running)
    monkeypatch.setattr(
        judging, "output_errors", lambda exact, forms, *_: [SimpleNamespace(relative=errors[i]) for i in entered(forms)]
    )
    monkeypatch.setattr(
        judging, "latent_snr_db", lambda _, __, forms, **___: [20 + ROWS * (i > 0) + gains[i] for i in entered(forms)]
    )
    net = SimpleNamespace(model=None, schedule="any", facts=SimpleNamespace(sized_inputs=()), is_large=large)
    found, figures = judge(net, alternatives, drafts, calib, options, tmp_path)
    assert found == chosen and figures.folded == alternatives[chosen].folded
    assert figures.network_error[0] == 1.0
    assert (figures.latent_snr_db is None) == (min(errors[1:]) > 1)
    assert opened[:4] == [0, 1, 2, 3]  # one at a time where several would not fit, once where they do
    assert len(opened) == (6 if large and min(errors[1:]) < 1 else 4)


def test_more_attempts_need_more_evidence() -> None:
    gain = ROWS - ROWS.mean() + 2.0 * ROWS.std(ddof=1) / len(ROWS) ** 0.5  # two standard errors: one-sided 2.3 %
    assert judging._beyond_chance(gain, tried=1) and not judging._beyond_chance(gain, tried=3)


def test_the_summary_says_what_gains_and_what_was_folded() -> None:
    found = Smoothing({"b": decision("b")}, {"q": decision("q", "k"), "o": decision("o")}, ("b", "q"), (2e-4, 1e-4))
    assert smoothing_line(found) == (
        "folded into 1 residual blocks and 1 inputs of Linears: 1 of 1 residual blocks and 2 of 2 inputs of Linears "
        "gain by themselves, the network's output error goes from 0.0002 to 0.0001"
    )
    assert smoothing_line(replace(found, blocks={}, folded=())).startswith("refused: 2 of 2 inputs of Linears gain")
