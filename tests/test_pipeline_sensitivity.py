"""The predicted cost of quantizing one tensor equals what quantizing that tensor alone does to the output."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch", reason="gradients of the graph need torch")
pytest.importorskip("onnxruntime")

from export_helpers import parsed  # noqa: E402

from qncd_deploy.calib.observe import observe  # noqa: E402
from qncd_deploy.calib.observers import TensorStats  # noqa: E402
from qncd_deploy.calib.trajectories import CalibSet, load_user_npz  # noqa: E402
from qncd_deploy.export.graph import find_inputs, find_sites  # noqa: E402
from qncd_deploy.export.passes.common import constant, initializer  # noqa: E402
from qncd_deploy.export.passes.insert_qdq import InsertQDQ  # noqa: E402
from qncd_deploy.pipeline.calibrate import in_batches, probing  # noqa: E402
from qncd_deploy.pipeline.network import FloatNetwork, read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.output_error import output_errors, running  # noqa: E402
from qncd_deploy.pipeline.sensitivity import edge_costs, unmeasured, weight_noise  # noqa: E402
from qncd_deploy.quant.budget import LARGEST_BUDGET, LEAST_SHARE, TOO_NOISY, EdgeCost, keep_float, output_noise  # noqa: E402
from qncd_deploy.quant.decide import decide, make_plan  # noqa: E402
from qncd_deploy.quant.grid import Grid, fake_quantize  # noqa: E402
from qncd_deploy.quant.mixed import WIDTHS  # noqa: E402
from qncd_deploy.quant.plan import Choice, LayerSite  # noqa: E402
from qncd_deploy.quant.policy import Policy  # noqa: E402
from qncd_deploy.quant.ranges import sqnr_db, stats_sqnr_db  # noqa: E402
from qncd_deploy.specs import TensorSpec  # noqa: E402


def test_the_prediction_is_the_squared_projection_of_the_rounding_error() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 4)).astype(np.float32)
    gradients = [rng.standard_normal(x.shape).astype(np.float32) for _ in range(2)]
    signal = rng.uniform(1, 2, 5)
    grid = Grid(np.float32(0.1), -128, 127)
    error = fake_quantize(x, grid).astype(np.float64) - x
    expected = np.mean([np.vdot(error[i], gradients[0][i] + gradients[1][i]) ** 2 / signal[i] for i in range(5)])
    assert output_noise(x, gradients, grid, signal) == pytest.approx(expected, rel=1e-6)


def test_over_random_probes_it_is_the_noise_of_a_linear_network() -> None:
    rng = np.random.default_rng(1)
    jacobian, x = rng.standard_normal((7, 12)), rng.standard_normal((1, 12)).astype(np.float32)
    grid = Grid(np.float32(0.25), -128, 127)
    exact = np.square(jacobian @ (fake_quantize(x, grid) - x)[0]).sum()
    probes = rng.standard_normal((4000, 7))
    found = [output_noise(x, [(jacobian.T @ v)[None]], grid, np.ones(1)) for v in probes]
    # (g . d)^2 is exact * chi2_1: a standard deviation of sqrt(2 / 4000) = 2.2 %.
    assert np.mean(found) == pytest.approx(exact, rel=0.09)


TIMED = """<ir_version: 8, opset_import: ["": 18]>
    timed (float[BATCH] t, float[BATCH,4,4,4] x) => (float[BATCH,4,4,4] y)
    { a = Conv (x, first) b = Cos (t) c = Reshape (b, column) d = Add (a, c) y = Conv (d, second) }"""


@pytest.mark.parametrize("size", [4, 16])  # of 10 rows: two of the last 4, six of the only 16 fill the batch up
def test_rows_that_only_fill_a_fixed_batch_up_count_nowhere(size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = {name: rng.standard_normal((4, 4, 1, 1)).astype(np.float32) for name in ("first", "second")}
    arrays["column"] = np.array([-1, 1, 1, 1])
    x = rng.standard_normal((10, 4, 4, 4)).astype(np.float32)
    x[-1] *= 30  # the row that is repeated
    calib = CalibSet({"t": np.linspace(0, 6, 10, dtype=np.float32), "x": x}, "test")
    found = {}
    for batch in ("N", size):
        model = parsed(TIMED.replace("BATCH", str(batch)), arrays)
        inputs = find_inputs(model)
        specs = (TensorSpec("t", "float32", (batch,)), TensorSpec("x", "float32", (batch, 4, 4, 4)))
        network = SimpleNamespace(inputs=inputs, facts=SimpleNamespace(sized_inputs=specs))
        sites = [site for site in find_sites(model, inputs) if site.name == "second"]
        with probing(model, tmp_path) as probe:
            stats = observe(probe, in_batches(calib, specs), ["d"])
        (cost,) = edge_costs(model, network, sites, calib, stats, POLICY, tmp_path)
        noise = weight_noise(model, network, sites, calib, POLICY, tmp_path)["second"]
        found[batch] = (stats["d"].count, stats["d"].mean_square, cost.noise, noise[4], noise[8])
    # every row meets the same numbers of the random probe; sums of float32 differ by their order
    assert found[size] == pytest.approx(found["N"], rel=1e-4)


def costs(*rows: tuple[str, float, int]) -> list[EdgeCost]:
    return [EdgeCost(name, (f"{name}.weight",), noise, macs) for name, noise, macs in rows]


def test_the_noisiest_per_multiplication_go_first_while_they_fit() -> None:
    rows = costs(("a", 5e-4, 10), ("b", 4e-4, 2), ("c", 1e-4, 1000), ("d", 3e-4, 988))
    chosen = keep_float(rows, budget=0.006)  # 12 multiplications of 2,000
    assert set(chosen) == {"a.weight", "b.weight"}
    assert "38%" in chosen["a.weight"].reason and "0.5%" in chosen["a.weight"].reason
    assert set(keep_float(rows, budget=0.002)) == {"b.weight"}
    assert set(keep_float(rows, budget=1.0)) == {f"{name}.weight" for name in "abcd"}
    assert keep_float(rows, budget=0.0) == {}


def test_a_network_that_would_be_too_noisy_gets_more_but_no_more_than_it_needs() -> None:
    rows = costs(("a", 6 * TOO_NOISY, 10), ("b", 0.7 * TOO_NOISY, 10), ("c", 0.6 * TOO_NOISY, 10), ("d", 0, 970))
    assert set(keep_float(rows, budget=0.01)) == {"a.weight", "b.weight"}  # what is left is quiet enough
    assert set(keep_float(rows, budget=0.03)) == {"a.weight", "b.weight", "c.weight"}
    loud = costs(*((f"{i}", 1.0, 9) for i in range(100)))
    assert len(keep_float(loud, budget=0.01)) == 0  # none makes LEAST_SHARE of the error
    louder = costs(*((f"{i}", 1.0, 9) for i in range(25)))
    assert len(keep_float(louder, budget=0.01)) == int(25 * LARGEST_BUDGET)


def test_what_makes_little_of_the_error_is_no_exception_however_cheap() -> None:
    rows = costs(("much", 1e-3, 1000), ("little", 0.99e-3 * LEAST_SHARE, 1))
    assert keep_float(rows, budget=0.5) == {}


def test_layers_asked_for_by_name_use_up_nothing_of_the_budget() -> None:
    rows = costs(("a", 5e-4, 10), ("b", 4e-4, 10), ("c", 1e-4, 980))
    assert set(keep_float(rows, budget=0.01)) == {"a.weight"}
    assert set(keep_float(rows, budget=0.01, pinned=["a.weight"])) == {"b.weight"}
    shared = [EdgeCost("x", ("q", "k"), 9.0, 3), EdgeCost("y", ("w",), 1.0, 97)]
    assert keep_float(shared, budget=0.03, pinned={"k"}) == {}


def test_no_noise_and_no_layers() -> None:
    assert keep_float(costs(("a", 0.0, 5)), budget=1.0) == {}
    assert keep_float([], budget=1.0) == {}


def test_layers_that_read_one_tensor_are_kept_together() -> None:
    rows = [EdgeCost("x", ("q", "k", "v"), 9.0, 3), EdgeCost("y", ("w",), 1.0, 97)]
    assert set(keep_float(rows, budget=0.03)) == {"q", "k", "v"}


@pytest.fixture(scope="module")
def network(bundle: Path, calibration: Path) -> FloatNetwork:
    return read_network(ExportOptions(bundle / "unet-float.onnx", calib_data=calibration))


POLICY = Policy(weight_method="minmax")


@pytest.fixture(scope="module")
def sites(network: FloatNetwork) -> list[LayerSite]:
    return [site for site in network.sites if decide(site, POLICY)[0]]


@pytest.fixture(scope="module")
def calib(network: FloatNetwork, calibration: Path) -> CalibSet:
    return load_user_npz(calibration, network.facts.inputs)


@pytest.fixture(scope="module")
def stats(
    network: FloatNetwork, sites: list[LayerSite], calib: CalibSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TensorStats]:
    edges = list(dict.fromkeys(site.input for site in sites))
    with probing(network.model, tmp_path_factory.mktemp("ranges")) as probe:
        return observe(probe, calib.batches(8), edges)


def test_prediction_against_quantizing_one_tensor_at_a_time(
    network: FloatNetwork, sites: list[LayerSite], calib: CalibSet, stats: dict[str, TensorStats], tmp_path: Path
) -> None:
    policy, edges = POLICY, list(dict.fromkeys(site.input for site in sites))
    predicted = edge_costs(network.model, network, sites, calib, stats, policy, tmp_path)
    assert [cost.edge for cost in predicted] == edges
    assert sorted(name for cost in predicted for name in cost.layers) == sorted(site.name for site in sites)
    weights = {site.name: constant(network.model.graph.initializers[site.name]) for site in network.sites}
    # Attention over a single token gives every query the same answer: rounding queries and keys changes nothing.
    heard = [cost for cost in sorted(predicted, key=lambda cost: cost.noise) if cost.noise > 0]
    tried = heard[:: len(heard) // 6]
    forms = []
    for cost in tried:
        exceptions = {site.name: Choice(None, "not this one") for site in sites if site.input != cost.edge}
        plan = make_plan(network.sites, weights, stats, policy, exceptions=exceptions)
        model = network.model.clone()
        InsertQDQ(plan)(model)
        for layer in plan.quantized:  # its activation alone: the weight keeps its float values
            assert layer.name in cost.layers
            (quantized,) = (node for node in model.graph if node.outputs[0].name == f"{layer.name}_dq")
            exact = initializer(model.graph, f"{layer.name}_exact", weights[layer.name])
            ir.convenience.replace_all_uses_with(quantized.outputs[0], exact)
        forms.append((model, plan))
    rows = calib.take(np.unique(np.linspace(0, len(calib) - 1, 32).astype(int)))
    exact, *rounded = (partial(running, *form, tmp_path) for form in [(network.model, None), *forms])
    measured = [error.relative for error in output_errors(exact, rounded, network.facts.inputs, rows)]
    ratio = np.array([cost.noise for cost in tried]) / measured
    # One probe per row and 32 rows: chi-squared with 32 degrees, a standard deviation of 25 %, more where few rows
    # carry the noise; a factor of two either way is three of them.
    assert np.all((ratio > 0.5) & (ratio < 2)), ratio
    assert measured[-1] > 10 * measured[0]  # the layers differ, and the order is right


@pytest.mark.parametrize("width", WIDTHS)
def test_prediction_against_rounding_one_weight_at_a_time(
    network: FloatNetwork, sites: list[LayerSite], calib: CalibSet, tmp_path: Path, width: int
) -> None:
    found = weight_noise(network.model, network, sites, calib, POLICY, tmp_path)
    assert list(found) == [site.name for site in sites]
    heard = sorted((site for site in sites if found[site.name][width] > 0), key=lambda site: found[site.name][width])
    tried = heard[:: len(heard) // 6]
    assert {site.op for site in tried} > {"Conv"}
    forms = []
    for site in tried:
        model = network.model.clone()
        weight = model.graph.initializers[site.name]
        exact = constant(weight)
        rounded = fake_quantize(exact, POLICY.weight_grid(exact, site.out_axis, bits=width))
        weight.const_value = ir.tensor(rounded, name=site.name)
        forms.append((model, None))
    rows = calib.take(np.unique(np.linspace(0, len(calib) - 1, 32).astype(int)))
    plain, *others = (partial(running, *form, tmp_path) for form in [(network.model, None), *forms])
    measured = [error.relative for error in output_errors(plain, others, network.facts.inputs, rows)]
    ratio = np.array([found[site.name][width] for site in tried]) / measured
    assert np.all((ratio > 0.5) & (ratio < 2)), ratio  # as above
    assert measured[-1] > 10 * measured[0]


def test_a_network_too_large_to_differentiate_is_judged_by_what_each_layer_loses_itself(
    network: FloatNetwork,
    sites: list[LayerSite],
    calib: CalibSet,
    stats: dict[str, TensorStats],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qncd_deploy.pipeline.sensitivity.MEMORY_BYTES", 1)
    assert edge_costs(network.model, network, sites, calib, stats, POLICY, tmp_path) == []
    assert weight_noise(network.model, network, sites, calib, POLICY, tmp_path) == {}
    edges, weights = unmeasured(network.model, sites, stats, POLICY)
    alone = next(edge for edge in edges if len(edge.layers) == 1)
    (site,) = (site for site in sites if site.name in alone.layers)
    weight = constant(network.model.graph.initializers[site.name])
    for width in WIDTHS:
        lost = 10 ** (-sqnr_db(weight, fake_quantize(weight, POLICY.weight_grid(weight, 0, bits=width))) / 10)
        assert weights[site.name][width] == pytest.approx(lost)
    seen = stats[alone.edge]
    lost = 10 ** (-stats_sqnr_db(seen, POLICY.act_grid(seen)) / 10)
    assert alone.noise == pytest.approx(lost)
