"""--step-bits on a tiny network: what is chosen and measured, what lies in the bundle, and that all commands run it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Finished, qncd

pytest.importorskip("torch", reason="the bundle of these tests is exported here")
onnx = pytest.importorskip("onnx")

from ldm_checkpoint import BASE, Written  # noqa: E402

from qncd_deploy.bundle import Manifest, read_manifest, write_manifest  # noqa: E402
from qncd_deploy.errors import UsageError  # noqa: E402
from qncd_deploy.evaluate.measure import graph_bytes  # noqa: E402
from qncd_deploy.pipeline.fit import FitOptions, fit_into  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.parity import record  # noqa: E402
from qncd_deploy.pipeline.stepping import FIRST_PICTURE  # noqa: E402
from qncd_deploy.quant.plan import QuantPlan  # noqa: E402
from qncd_deploy.runtime import Bundle  # noqa: E402
from qncd_deploy.stepping import Stepping, StepRange, save_stepping  # noqa: E402

NETWORK = {**BASE, "channel_mult": [1, 2], "attention_resolutions": [], "num_heads": 2}
FIT = 3
ENGINE = "onnxruntime"
"""The one that opens quickest."""
QUICK = ("--n-steps", "6", "--calib-size", "4", "--calib-steps", "3", "--fit-size", FIT, "--eval-size", "2")
PLAIN = ("--smooth", "off", "--keep-float", "0", "--correction", "off", "--recon", "off", "--split", "off")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The bundle, and what the export said."""
    home = tmp_path_factory.mktemp("stepping")
    (home / "tiny").mkdir()
    checkpoint = Written(home / "tiny", NETWORK).save()
    shelves = ("--calib-dir", home / "calib", "--onnx-dir", home / "export")
    done = qncd("export", checkpoint, "--format", "w4a8", "--step-bits", "8,4", *QUICK, *PLAIN, *shelves)
    assert done.code == 0, done.err
    return home / "export/tiny-w4a8", done


@pytest.fixture(scope="module")
def bundle(made: tuple[Path, Finished]) -> Bundle:
    return Bundle.open(made[0])


def plan_of(bundle: Bundle, role: str) -> QuantPlan:
    return QuantPlan.from_json(json.loads(bundle.file(role).read_text()))


def integers(graph: Path) -> dict[str, bytes]:
    """The quantized weights, by name."""
    model = onnx.load(graph)
    return {t.name: t.raw_data for t in model.graph.initializer if t.name.endswith("_q")}


def draw(bundle: Bundle, backend: str, **options: object) -> np.ndarray:
    with bundle.sampler(backend, threads=1, correction="off", **options) as sampler:
        return sampler.sample(3, seed=1).latents


def test_the_widths_differ_in_the_grids_of_activations_alone(bundle: Bundle) -> None:
    own, narrow = plan_of(bundle, "plan"), plan_of(bundle, "plan-a4")
    assert (own.format, narrow.format) == ("w4a8", "w4a4") and own.quantized
    inputs = ("act_bits", "act_scale", "act_zero", "act_sqnr_db", "act_method")
    for a, b in zip(own, narrow, strict=True):
        assert replace(b, **{name: getattr(a, name) for name in inputs}) == a
        assert (b.act_bits, a.act_bits) == ((4, 8) if a.quantized else (None, None))
    for role in ("master", "trt", "ort"):
        assert integers(bundle.file(role)) == integers(bundle.file(f"{role}-a4")) != {}


def test_weights_lie_on_disk_once(bundle: Bundle) -> None:
    names = {role: bundle.manifest.roles[role] for role in ("master-a4", "trt-a4", "ort-a4", "plan-a4", "stepping")}
    assert set(names.values()) == {
        *("unet-a4.onnx", "unet-a4-trt.onnx", "unet-a4-ort.onnx", "plan-a4.json", "stepping.json")
    }
    assert not list(bundle.path.glob("unet-a4*.data"))
    one, both = graph_bytes(bundle.file("master")), graph_bytes(bundle.file("master"), bundle.file("master-a4"))
    # the second graph adds its own nodes, and scales of less than a kilobyte, which are inside of it
    assert both - one == bundle.file("master-a4").stat().st_size
    for role in ("master-a4", "trt-a4", "ort-a4"):
        model = onnx.load(bundle.file(role), load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert max(len(t.raw_data) for t in inside) < 1024


def test_the_snr_of_calls_is_what_the_networks_of_the_bundle_do(bundle: Bundle) -> None:
    """Measured again with the files of the bundle: the same noise, the float sampler's states, norms by hand."""
    measured = bundle.manifest.quality["step_bits"]
    pictures = list(range(FIRST_PICTURE, FIRST_PICTURE + FIT))
    with bundle.sampler(float_twin=True) as exact:
        states = list(exact.trajectory(pictures))
    assert len(measured["calls"]) == len(states) == 6
    abar = bundle.schedule.alphas_cumprod
    with (
        bundle.sampler(correction="off", act_bits=4) as four,
        bundle.sampler(correction="off", act_bits=8) as eight,
    ):
        models = {"4": four.model_for(pictures), "8": eight.model_for(pictures)}
        for facts, state in zip(measured["calls"], states, strict=True):
            t = state.step.t
            assert facts["t"] == t
            # figures are rounded to four digits
            assert facts["snr_forward"] == pytest.approx(abar[int(t)] / (1 - abar[int(t)]), rel=1e-3)
            for bits, model in models.items():
                snr = np.linalg.norm(state.raw) / np.linalg.norm(model(state.x_in, t) - state.raw)
                # the same engine, rows and integers: only the four digits of the manifest differ
                assert facts["snr_quantized"][bits] == pytest.approx(snr, rel=1e-3)


def test_the_ranges_are_the_rules(bundle: Bundle) -> None:
    measured, stepping = bundle.manifest.quality["step_bits"], bundle.stepping
    assert stepping is not None and measured["ranges"] == stepping.to_json()["ranges"]
    calls = measured["calls"]
    for each in calls:
        wanted = [int(b) for b, snr in each["snr_quantized"].items() if snr > each["snr_forward"]]
        assert each["rule"] == min(wanted, default=8)
        assert each["act_bits"] == stepping.act_bits(each["t"]) >= each["rule"]
    assert {each["act_bits"] for each in calls} == {4, 8}  # or the tests below would show nothing
    snr = measured["latent_snr_db"]
    assert snr["4"] < snr["stepped"] < snr["8"]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_the_loop_switches_networks_at_the_ranges_edge(bundle: Bundle, backend: str) -> None:
    pytest.importorskip(backend)
    stepping = bundle.stepping
    assert stepping is not None
    with bundle.sampler(backend, threads=1, correction="off") as sampler:
        states = list(sampler.trajectory([0, 1]))
        for bits in (4, 8):
            with bundle.sampler(backend, threads=1, correction="off", act_bits=bits) as alone:
                model = alone.model_for([0, 1])
                same = [np.array_equal(model(state.x_in, state.step.t), state.raw) for state in states]
                assert same == [stepping.act_bits(state.step.t) == bits for state in states]


def with_ranges(bundle: Bundle, folder: Path, *, same: bool, at: Sequence[StepRange]) -> Bundle:
    """A copy with other ranges; same: the narrower network's graphs are the wider one's."""
    folder.mkdir()
    for path in bundle.path.iterdir():
        if path.name != "stepping.json":
            shutil.copyfile(path, folder / path.name)
    save_stepping(folder / "stepping.json", Stepping(tuple(at)))
    if same:
        for role in ("master", "ort", "trt"):
            own, narrow = (folder / bundle.manifest.roles[each] for each in (role, f"{role}-a4"))
            shutil.copyfile(own, narrow)
    (folder / "manifest.json").unlink()
    write_manifest(folder, bundle.manifest)
    return Bundle.open(folder)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_two_networks_of_the_same_bits_are_one(bundle: Bundle, backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    halves = (StepRange(40.0, 4), StepRange(0.0, 8))
    twin = with_ranges(bundle, tmp_path / "twin", same=True, at=halves)
    np.testing.assert_array_equal(draw(twin, backend), draw(bundle, backend, act_bits=8))


def test_ranges_are_of_timesteps_whatever_the_number_of_steps(bundle: Bundle) -> None:
    stepping = bundle.stepping
    assert stepping is not None
    with bundle.sampler(ENGINE, correction="off", n_steps=10, scheduler="plms") as sampler:
        states = list(sampler.trajectory([0]))
        with bundle.sampler(ENGINE, correction="off", act_bits=4) as alone:
            model = alone.model_for([0])
            same = [np.array_equal(model(state.x_in, state.step.t), state.raw) for state in states]
    assert same == [stepping.act_bits(state.step.t) == 4 for state in states] and len(set(same)) == 2


def test_tables_belong_to_all_plans_and_ranges(bundle: Bundle, tmp_path: Path) -> None:
    other = with_ranges(bundle, tmp_path / "other", same=False, at=(StepRange(77.0, 4), StepRange(0.0, 8)))
    keys = {each.plan_sha for each in (bundle, other)}
    keys |= {bundle.manifest.files[name].sha256 for name in ("plan.json", "plan-a4.json")}
    assert len(keys) == 4
    with bundle.sampler(ENGINE, correction="off") as both, bundle.sampler(ENGINE, correction="off", act_bits=8) as wide:
        assert both.table.key.plan_sha == bundle.plan_sha
        assert wide.table.key.plan_sha == bundle.manifest.files["plan.json"].sha256
        assert both.network.source != wide.network.source == bundle.graph_id("ort")


def test_a_width_that_is_not_there_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="activations of 6 bits were asked for, it has 4, 8"):
        bundle.sampler(ENGINE, act_bits=6)


def test_the_export_and_inspect_say_what_runs_where(made: tuple[Path, Finished], bundle: Bundle) -> None:
    stepping = bundle.stepping
    assert stepping is not None
    (line,) = (line for line in made[1].out.splitlines() if line.startswith("step bits"))
    assert stepping.line() in line and "with 4 bits throughout" in line and "held-out pictures" in line
    assert "each for 2 engines" in made[1].out
    shown = qncd("inspect", bundle.path)
    assert shown.code == 0 and f"activations {stepping.line()} (unet-a4.onnx, unet.onnx;" in shown.out
    assert json.loads(qncd("inspect", bundle.path, "--json").out)["stepping"] == stepping.to_json()["ranges"]
    page = (bundle.path / "report.html").read_text()
    assert "unet-a4.onnx" in page and "Activation bits, call by call" in page
    assert qncd("verify", bundle.path).code == 0


def test_both_networks_are_compiled_and_used(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    shelf = ("--engine-dir", tmp_path)
    build = ("build", bundle.path, "--backend", "openvino", "--batch", "2", *shelf, "--json")
    made = json.loads(qncd(*build).out)["engines"]
    own, narrow = (Path(each["path"]) for each in made)
    assert narrow.name == own.name.replace("-b2.blob", "-a4-b2.blob")
    assert [each["seconds"] for each in json.loads(qncd(*build).out)["engines"]] == [None, None]
    with bundle.sampler("openvino", correction="off", batch_size=2, blobs=[own, narrow]) as sampler:
        assert sampler.compiled_bytes() == own.stat().st_size + narrow.stat().st_size
        stored = sampler.sample(2, seed=1).latents
    np.testing.assert_array_equal(stored, draw(bundle, "openvino")[:2])


def test_both_networks_are_built_ahead_of_time_for_gpus(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed (x86-64 only)")
    target = ("--backend", "tensorrt-rtx", "--target", "sm89", "--batch", "2", "--engine-dir", tmp_path)
    done = qncd("build", bundle.path, *target, "--json")
    assert done.code == 0, done.err
    own, narrow, decoder = json.loads(done.out)["engines"]
    names = [Path(each["path"]).name for each in (own, narrow, decoder)]
    assert names[1:] == [names[0].replace("-b2.", "-a4-b2."), names[2]] and "-decoder-b2." in names[2]
    planned = len(plan_of(bundle, "plan").quantized)
    assert [each["planned_layers"] for each in (own, narrow)] == [planned, planned]
    assert own["missed"] == narrow["missed"] == []


def test_engines_are_held_against_their_own_networks_error(bundle: Bundle) -> None:
    cases = record(bundle, rows=2)
    own, narrow = cases["unet"], cases["unet-a4"]
    assert set(cases) == {"unet", "unet-a4", "decoder"} and own.feeds is narrow.feeds
    assert own.expected is not None and narrow.expected is not None
    assert all(few > many for few, many in zip(narrow.expected, own.expected, strict=True))


def test_it_is_fitted_evaluated_and_timed_as_one_network(bundle: Bundle, tmp_path: Path) -> None:
    shelf = ("--engine-dir", tmp_path)
    folder = tmp_path / bundle.path.name
    _, fitted = fit_into(folder, bundle, FitOptions(ENGINE, methods=("qdrift",), size=2), lambda done, total: None)
    assert fitted.tables[0].key.plan_sha == bundle.plan_sha
    corrections = ("--correction", "qdrift", "--correction", "off")
    done = qncd("eval", bundle.path, "-n", "2", "--backend", ENGINE, *corrections, *shelf, "--json")
    assert done.code == 0, done.err
    assert [each["correction"] for each in json.loads(done.out)["variants"]] == ["qdrift", "off"]
    done = qncd("bench", bundle.path, "--backend", ENGINE, "--rounds", "1", "--eval-size", "2", *shelf, "--json")
    assert done.code == 0, done.err
    _, row = json.loads(done.out)["rows"]
    assert row["graph_bytes"] == graph_bytes(bundle.file("ort"), bundle.file("ort-a4"))


@pytest.mark.parametrize(
    ("format", "bits", "words"),
    [
        ("w4a8", (3, 8), "--step-bits 3,8: expected bits from 4 to 8"),
        ("w4a8", (8, 9), "expected bits from 4 to 8"),
        ("w4a8", (4, 8, 8), "two widths or more, all different"),
        ("w4a8", (8,), "two widths or more, all different"),
        ("w4a6", (4, 8), "the activation bits of the format, which is w4a6. Give --format w8a8 or w4a8 with it."),
        ("fp16", (4, 8), "which is fp16. Give --format w8a8 or w4a8 with it."),
        ("w4a8", (4, 5), "which is w4a8. No format has these."),
    ],
)
def test_widths_that_mean_nothing_are_refused(format: str, bits: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        ExportOptions(Path("model.ckpt"), format=format, step_bits=bits)
    assert words in str(caught.value)


def test_a_graph_without_a_schedule_has_no_steps(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no steps. Give --config scheduler_config.json"):
        ExportOptions(Path("net.onnx"), calib_data=Path("x.npz"), format="w4a8", step_bits=(4, 8))


def test_bits_that_are_no_numbers_are_wrong_usage() -> None:
    done = qncd("export", "model.ckpt", "--format", "w4a8", "--step-bits", "four,8")
    assert done.code == 2 and "expected whole numbers" in done.err


def test_a_manifest_that_is_older_has_one_network(bundle: Bundle) -> None:
    plain = read_manifest(bundle.path)
    roles = {role: name for role, name in plain.roles.items() if role != "stepping" and not role.endswith("-a4")}
    one = Bundle(bundle.path, Manifest(**{**vars(plain), "roles": roles}))
    assert one.stepping is None and one.network_roles("master") == ("master",)
    assert one.plan_sha == plain.files["plan.json"].sha256
