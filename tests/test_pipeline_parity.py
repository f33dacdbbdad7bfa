"""The gate that an engine passes before it is kept: errors against errors, and the first layer that goes wrong."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import contents, qncd

pytest.importorskip("torch", reason="the bundle of these tests is exported here")
pytest.importorskip("onnx")

import onnx
from fake_tensorrt import Machine, install
from onnx import numpy_helper

from qncd_deploy.cli import build as cli
from qncd_deploy.correct.record import identity_table, save_tables
from qncd_deploy.engines.base import Effort
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError
from qncd_deploy.pipeline import parity
from qncd_deploy.pipeline.fit import FitOptions
from qncd_deploy.pipeline.parity import ALLOWED, ALONE, SLACK, WATCHED, Case, Parity, first_wrong, measure, record
from qncd_deploy.runtime import Bundle


@cache
def recorded(bundle: Path, rows: int) -> dict[str, Case]:
    """The float network's run, once for all tests."""
    return record(Bundle.open(bundle), rows=rows)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(parity, "record", lambda bundle, *, rows, one_size: recorded(bundle.path, rows))
    return install(monkeypatch)


def of(errors: list[float], expected: list[float] | None, largest: float = 1.0, bound: float = 2.0) -> Parity:
    return Parity(tuple(errors), largest, None if expected is None else tuple(expected), "openvino", bound)


def test_errors_are_held_against_the_cpus_errors() -> None:
    assert of([0.1, ALLOWED * 0.1 + SLACK - 1e-6], [0.1, 0.1]).fault is None
    assert of([0.1, ALLOWED * 0.1 + SLACK + 1e-6], [0.1, 0.1]).fault == (
        "call 1 is off by 0.22 of the float network's output, 0.22 is allowed, openvino has 0.1"
    )
    assert of([ALONE - 0.01], None).fault is None
    assert of([ALONE + 0.01], None).fault == "call 0 is off by 0.51 of the float network's output, 0.5 is allowed"
    for bad in (math.nan, math.inf):
        assert of([0.1, bad], [0.1, 0.1]).fault == "call 1 returns numbers that are not finite"
    assert of([0.1], [0.1], largest=2.1).fault == "its largest number is 2.1, the float network's is 1"
    assert of([0.1, 0.3], [0.2, 0.2]).line() == "error against the float network 0.2, at most 0.3 (openvino: 0.2)"
    assert of([0.1, 0.3], None).line().endswith("at most 0.3 (0.5 is allowed, as no engine for a CPU is here)")


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 64, 65, 200])
def test_the_first_wrong_tensor_is_found_in_few_builds(count: int) -> None:
    names = [f"t{index}" for index in range(count)]
    for wrong in {0, count // 3, count // 2, count - 1}:
        builds = []

        def watch(marked: list[str], wrong: int = wrong, builds: list = builds) -> tuple[dict, dict]:
            builds.append(marked)
            exact = {name: np.ones(3) for name in marked}
            return {name: np.full(3, 9.0 if names.index(name) >= wrong else 1.1) for name in marked}, exact

        assert first_wrong(names, watch) == names[wrong]
        assert len(builds) <= 1 + math.ceil(math.log(count, WATCHED)) + 2 and max(map(len, builds)) <= WATCHED
    assert first_wrong(names, lambda marked: ({n: np.ones(3) for n in marked},) * 2) is None


def test_a_sound_branch_does_not_clear_the_one_beside_it() -> None:
    """A shortcut computed after the convolution that it joins: sound, though the convolution before it is not."""
    names, sound = [f"t{index}" for index in range(64)], {"t31", "t33"}

    def watch(marked: list[str]) -> tuple[dict, dict]:
        off = {name: int(name[1:]) >= 30 and name not in sound for name in marked}
        return {name: np.full(3, 9.0 if off[name] else 1.0) for name in marked}, {n: np.ones(3) for n in marked}

    assert first_wrong(names, watch) == "t30"


def test_what_is_recorded_is_the_float_samplers_own(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    cases = recorded(bundle, 4)
    unet = cases["unet"]
    with opened.sampler(float_twin=True) as sampler:
        assert len(unet.feeds) == len(sampler.steps)
        assert sampler.guidance_scale != 1  # so that four rows are two pictures
        pictures = [parity.FIRST_PICTURE, parity.FIRST_PICTURE + 1]
        *_, last = sampler.trajectory(pictures, batch_size=2)
        np.testing.assert_array_equal(next(iter(cases["decoder"].feeds[0].values())), last.x)
        assert measure(sampler.network.unet, unet).errors == (0.0,) * len(unet.feeds)
        fewer = measure(sampler.network.unet, unet.rows(2))
        assert fewer.errors == pytest.approx((0.0,) * len(unet.feeds), abs=1e-5)  # float32, in another order
    assert unet.expected is not None and min(unet.expected) > 0 and max(unet.expected) < 0.5


def build(bundle: Path, folder: Path, *more: object) -> tuple[int, str, str]:
    done = qncd("build", bundle, "--backend", "tensorrt", "--no-fit", "--engine-dir", folder, *more)
    return done.code, done.out, done.err


def test_a_sound_engine_is_kept_with_its_errors(bundle: Path, tmp_path: Path, machine: Machine) -> None:
    code, out, err = build(bundle, tmp_path, "--batch", "1,2", "--json")
    assert code == 0, err
    engines = json.loads(out)["engines"]
    unet, decoder = (engine["parity"] for engine in engines)
    for call, error in enumerate(unet["errors"]):
        assert 0 < error <= ALLOWED * unet["expected"][call] + SLACK
    assert max(decoder["errors"]) < 1e-5  # float32, in another order
    assert machine.watched == []
    assert all(Path(engine["path"]).is_file() for engine in engines)
    assert json.loads(build(bundle, tmp_path, "--batch", "1,2", "--json")[1])["parity"] is None  # not built again


def test_what_is_built_ahead_of_time_is_checked_where_a_target_is_here(
    bundle: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "tensorrt-rtx")
    rtx = ("build", bundle, "--backend", "tensorrt-rtx", "--batch", 2, "--no-fit", "--json", "--engine-dir", tmp_path)
    for targets, checked in (("sm86,sm89", True), ("sm89", False)):
        done = qncd(*rtx, "--target", targets)
        assert done.code == 0, done.err
        assert [engine["parity"] is not None for engine in json.loads(done.out)["engines"]] == [checked] * 2


def test_tables_are_fitted_for_the_engine_that_passed(
    bundle: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, efforts = [], []

    def fit_into(folder: Path, opened: Bundle, options: FitOptions, tick: object) -> tuple[Path, SimpleNamespace]:
        asked.append(options)
        efforts.append(opened.effort)
        if len(asked) == 1:
            raise EngineError("GPU: out of memory.")
        path = folder / "corrections-tensorrt-f16.npz"
        key = opened.key(options.sampling, "tensorrt-f16")
        save_tables(path, [identity_table(key)], auto={key.id: "off"})
        return path, SimpleNamespace(choice="ptqd")

    monkeypatch.setattr(cli, "fit_into", fit_into)
    args = ("build", bundle, "--backend", "tensorrt", "--engine-dir", tmp_path, "--batch", "1,2", "--level", 2)
    assert qncd(*args).line.endswith("GPU: out of memory.")
    done = qncd(*args)
    assert "up to date" in done.out and len(machine.builds) == 4  # two networks of two sizes: nothing was built again
    assert done.code == 0 and done.out.splitlines()[-1].endswith("corrections-tensorrt-f16.npz  auto = ptqd"), done.err
    assert efforts == [Effort(2, None, tmp_path)] * 2  # the float twin is built with the same means
    first, options = asked
    assert first == options
    assert (options.backend, options.batch_size) == ("tensorrt", 2)
    assert [path.parent for path in options.blobs] == [tmp_path / bundle.name] * 2
    assert qncd(*args).code == 0 and len(asked) == 2  # they are there
    assert qncd(*args, "--no-check", "--workspace", 64).code == 0 and len(asked) == 2  # of no engine that may be wrong


def test_an_engine_outlives_a_float_network_that_cannot_be_run(
    bundle: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, folder = parity.record, tmp_path / bundle.name

    def fail(bundle: Bundle, *, rows: int, one_size: bool) -> dict[str, Case]:
        raise BackendMissing("text: tokenizers is not installed. Install it.")

    def kept() -> list[tuple[str, str | None]]:
        facts = {path: json.loads(path.with_suffix(".json").read_text()) for path in folder.rglob("*.engine")}
        return sorted((str(path.relative_to(folder)), facts[path]["unchecked"]) for path in facts)

    monkeypatch.setattr(parity, "record", fail)
    unet, decoder = (f"tensorrt-{name}-b2.engine" for name in ("f16-10.13.2-sm86", "f32-10.13.2-sm86-decoder"))
    for _ in range(2):  # the second time nothing is built
        code, out, err = build(bundle, tmp_path, "--batch", "2")
        assert (code, out) == (1, "")
        assert f"{unet}: built, but not checked. text: tokenizers is not installed. Install it. Then run the" in err
        assert kept() == [(f"unchecked/{unet}", None)] and len(machine.builds) == 1
    code, out, _ = build(bundle, tmp_path, "--batch", "2", "--no-check")
    assert code == 0 and out.count("not held against the float network: --no-check") == 2
    assert kept() == [(unet, "--no-check"), (decoder, "--no-check")] and len(machine.builds) == 2
    monkeypatch.setattr(parity, "record", sound)
    code, out, err = build(bundle, tmp_path, "--batch", "2")
    assert code == 0 and out.count("error against the float network") == 2, err
    assert kept() == [(unet, None), (decoder, None)] and len(machine.builds) == 2
    assert not (folder / "unchecked").exists()


def test_without_a_cpu_engine_the_float_network_is_built_as_asked_before_the_new_engine_is_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(monkeypatch)
    monkeypatch.setattr(parity, "default_backend", lambda: "tensorrt")
    code, out, err = build(bundle, tmp_path, "--batch", "1,2", "--level", 1, "--workspace", 64)
    assert code == 0 and out.count("0.5 is allowed, as no engine for a CPU is here") == 1, (out, err)
    assert {(options.level, options.workspace) for _, options, _ in machine.asked} == {(1, 64 << 20)}
    assert {options.timing_cache for _, options, _ in machine.asked} == {
        tmp_path / "timing-tensorrt-10.13.2-sm86.cache"
    }
    names = [name for name, *_ in machine.asked]
    assert names == ["unet-trt.onnx", "unet-float.onnx", "vae-decoder.onnx", "vae-decoder.onnx"]
    twin = machine.asked[1]
    assert twin[2] == 0 and twin[1].profiles[0]["sample"][0] == 4  # nothing loaded yet; recorded once, for most rows


def spoil(model: onnx.ModelProto) -> str:
    """Give the later half of the quantized convolutions the scales of other channels, and far too large ones. Returns
    the result of the first of them.
    """
    made = {node.output[0]: node for node in model.graph.node}
    scales = {initializer.name: initializer for initializer in model.graph.initializer}
    weights = {node.output[0]: made.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"}
    quantized = {result: w for result, w in weights.items() if w is not None and w.op_type == "DequantizeLinear"}
    later = list(quantized)[len(quantized) // 2 :]
    for result in later:
        scale = scales[quantized[result].input[1]]
        scale.CopyFrom(numpy_helper.from_array(30 * numpy_helper.to_array(scale)[::-1], scale.name))
    return later[0]


def test_a_wrong_engine_is_not_kept_and_its_first_wrong_layer_is_named(
    bundle: Path, tmp_path: Path, machine: Machine
) -> None:
    machine.tamper = spoil
    culprit = spoil(onnx.load(bundle / "unet-trt.onnx"))
    code, out, err = build(bundle, tmp_path / "engines", "--batch", "2")
    assert (code, out) == (3, "")
    (line,) = err.strip().splitlines()
    assert "of the float network's output" in line
    assert f"The first layer that goes wrong is the one that makes {culprit!r}. The engine is not kept." in line
    assert contents(tmp_path) == {}
    assert machine.watched and max(map(len, machine.watched)) <= WATCHED


def test_a_wrong_engine_goes_even_if_nothing_can_be_built_to_look_for_the_layer(
    bundle: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(library: object, path: Path) -> None:
        raise BuildFailed(f"{path}: out of memory.")

    machine.tamper = spoil
    monkeypatch.setattr(parity, "product_tensors", full)
    code, _, err = build(bundle, tmp_path / "engines", "--batch", "2")
    assert code == 3 and "The engine is not kept" in err and "The first layer" not in err
    assert contents(tmp_path) == {}


def test_numbers_that_are_not_finite_are_found(bundle: Path, tmp_path: Path, machine: Machine) -> None:
    def poison(model: onnx.ModelProto) -> None:
        name = next(node.input[2] for node in reversed(model.graph.node) if node.op_type == "Conv")
        (bias,) = (initializer for initializer in model.graph.initializer if initializer.name == name)
        bias.CopyFrom(numpy_helper.from_array(np.full(tuple(bias.dims), np.nan, np.float16), name))

    machine.tamper = poison
    code, _, err = build(bundle, tmp_path / "engines", "--batch", "2")
    assert code == 3 and "call 0 returns numbers that are not finite" in err
    assert contents(tmp_path) == {}


def test_a_case_of_fewer_rows_keeps_scalars() -> None:
    case = Case(({"x": np.zeros((4, 2)), "t": np.float32(3)},), (np.zeros((4, 2)),), None, "openvino").rows(3)
    assert case.feeds[0]["x"].shape == case.exact[0].shape == (3, 2) and case.feeds[0]["t"] == 3
