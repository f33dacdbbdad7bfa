"""Timing: ratios round by round, time inside and outside the network, sizes of graphs."""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import numpy_helper, parser  # noqa: E402
from rich.console import Console  # noqa: E402
from test_runtime import FACTS, write_bundle  # noqa: E402
from test_sampler import Gaussian  # noqa: E402

from qncd_deploy.bundle import read_manifest, write_manifest  # noqa: E402
from qncd_deploy.correct.record import CorrectionTable, StepFix, save_tables  # noqa: E402
from qncd_deploy.errors import EngineError, QncdError, UsageError  # noqa: E402
from qncd_deploy.evaluate.bench import _Entrant, _Turn, bench  # noqa: E402
from qncd_deploy.evaluate.bench_result import bench_table  # noqa: E402
from qncd_deploy.evaluate.compare import Draw, Variant  # noqa: E402
from qncd_deploy.evaluate.measure import Measurement, Stopwatch, graph_bytes, resident_bytes  # noqa: E402
from qncd_deploy.files import canonical_json  # noqa: E402
from qncd_deploy.runtime import Bundle, Sampling  # noqa: E402
from qncd_deploy.stepping import Stepping, StepRange, save_stepping  # noqa: E402

HEAD = '<ir_version: 9, opset_import: ["" : 18]> '


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8"))


def test_a_measurement_keeps_its_samples_and_says_when_it_is_noisy() -> None:
    calm = Measurement("call_ms", "ms", (10.0, 10.2, 9.9, 10.1, 30.0), {"engine": "x"})
    assert calm.median == 10.1
    assert calm.iqr == pytest.approx(0.2)
    assert calm.warnings == ()  # one outlier is what the median is for
    noisy = Measurement("call_ms", "ms", (10.0, 12.0, 9.0, 14.0, 11.0), {})
    (warning,) = noisy.warnings
    assert "18 % of the median apart" in warning
    (warning,) = Measurement("call_ms", "ms", (10.0, 10.0), {}).warnings
    assert "2 samples show no spread" in warning
    assert calm.to_json()["samples"] == [10.0, 10.2, 9.9, 10.1, 30.0]
    assert str(calm) == "10.1 ms ± 0.1"


def test_a_stopwatch_times_the_engine_and_changes_nothing() -> None:
    class Slow(Gaussian):
        def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            time.sleep(0.02)
            return super()._run(feeds)

    engine = Slow(labels=False)
    watch = Stopwatch(engine)
    feeds = {"sample": np.ones((2, 3, 4, 4), np.float32), "timestep": np.full(2, 5, np.float32)}
    np.testing.assert_array_equal(watch(feeds)["out"], engine(feeds)["out"])
    watch(feeds)
    assert len(watch.seconds) == 2
    assert all(0.02 <= seconds < 0.2 for seconds in watch.seconds)
    watch.close()
    assert engine.closed == 1


def test_rows_come_in_order_with_ratios_taken_round_by_round(bundle: Bundle) -> None:
    done: list[tuple[int, int]] = []
    variants = [Variant("w8a8", "onnxruntime"), Variant("float", "onnxruntime", float_twin=True)]
    draw = Draw(3, batch_size=2, threads=1)
    found = bench(bundle, variants, draw, rounds=3, on_progress=lambda n, of: done.append((n, of)))
    assert [row.name for row in found.rows] == ["w8a8", "float"]
    assert found.baseline == found.reference == "float"
    quick, exact = found["w8a8"], found["float"]
    ratios = [b / a for a, b in zip(quick.call_ms.samples, exact.call_ms.samples, strict=True)]
    assert quick.speedup.samples == pytest.approx(ratios)
    assert exact.speedup.samples == (1.0,) * 3
    for row in found.rows:
        assert len(row.call_ms.samples) == 3
        assert all(0 < share < 1 for share in row.host.samples)
        # a picture takes four calls of two pictures each, and what the host does
        assert row.picture_ms.median > 0.5 * 4 * row.call_ms.median / 2
    assert (quick.network, exact.network) == ("w8a8", "float")
    assert exact.figures is None
    assert quick.figures is not None and quick.figures.psnr is not None and quick.figures.psnr.n == 3
    assert quick.integer_kernels is None  # ONNX Runtime does not tell
    assert found.context["rows a call"] == "4"
    assert done == [(n, 8) for n in range(1, 9)]
    assert json.loads(canonical_json(found.to_json()))["rows"][0]["call_ms"]["samples"] == list(quick.call_ms.samples)


def test_a_float_twin_is_put_in_front_where_there_is_none(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    found = bench(bundle, [Variant("w8a8", "openvino")], Draw(2, batch_size=2, threads=1), rounds=1)
    assert [row.name for row in found.rows] == ["float", "w8a8"]
    assert found["float"].engine == "openvino-f32"
    integers = found["w8a8"].integer_kernels
    assert integers is not None and integers >= 2
    assert found["float"].integer_kernels == 0
    assert len(found.warnings) == 2  # one round shows no spread
    out = io.StringIO()
    Console(file=out, width=140).print(bench_table(found))
    text = out.getvalue()
    assert found["w8a8"].figures is not None and found["w8a8"].figures.psnr is not None
    for words in (
        "openvino-f32",
        "reference",
        f"{found['w8a8'].figures.psnr.value:.2f}",
        f"{found['w8a8'].speedup.median:.2f}",
        "2 pictures a batch",
        "speedup over float",
    ):
        assert words in text


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_what_diverges_is_timed_and_said_beside_the_others(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = bundle.key(Sampling(), "onnxruntime-f32")
    wild = CorrectionTable("map", key, (StepFix(b=np.full(8, 1e38)),) * len(key.timesteps))
    save_tables(tmp_path / "wild.npz", [wild], auto={})
    variants = [
        Variant("wild", "onnxruntime", correction="map", tables=(tmp_path / "wild.npz",)),
        Variant("w8a8", "onnxruntime", correction="off"),
    ]
    found = bench(bundle, variants, Draw(2, batch_size=2, threads=1), rounds=1)
    assert found["wild"].figures is not None and "are not finite" in str(found["wild"].figures.diverged)
    assert found["wild"].figures.psnr is None and found["wild"].call_ms.median > 0
    assert found["w8a8"].figures is not None and found["w8a8"].figures.psnr is not None
    assert "correction map gave latents that are not finite" in caplog.text
    out = io.StringIO()
    Console(file=out, width=140).print(bench_table(found))
    assert "diverged" in out.getvalue()


def test_ratios_against_another_baseline(bundle: Bundle) -> None:
    variants = [Variant("exact", "onnxruntime", float_twin=True), Variant("w8a8", "onnxruntime")]
    found = bench(bundle, variants, Draw(1, batch_size=1), rounds=1, baseline="w8a8")
    assert (found.baseline, found.reference) == ("w8a8", "exact")
    assert found["w8a8"].speedup.samples == (1.0,)
    assert found["exact"].figures is None
    with pytest.raises(UsageError, match=r"baseline w4a8: nothing of that name .* Choose one of exact, w8a8\."):
        bench(bundle, variants, Draw(1), baseline="w4a8")
    with pytest.raises(UsageError, match="0 rounds: expected 1 or more"):
        bench(bundle, variants, Draw(1), rounds=0)


def test_calls_that_take_longer_now_and_then(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four calls the first does not count, the others take at least 5, 5 and 80 ms."""
    from qncd_deploy.engines.ort import OrtEngine

    run = OrtEngine._run

    def slow(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if (t := feeds.get("t")) is not None:
            time.sleep(0.08 if t[0] < 100 else 0.005)  # the last step's timestep alone is that low
        return run(self, feeds)

    monkeypatch.setattr(OrtEngine, "_run", slow)
    found = bench(bundle, [Variant("float", "onnxruntime", float_twin=True)], Draw(1, batch_size=2), rounds=1)
    (row,) = found.rows
    assert 5 <= row.call_ms.median < 60
    assert row.call_p90_ms.median >= 5 + 0.8 * (80 - row.call_ms.median)  # between the last two of three
    (loop,) = row.picture_ms.samples
    assert row.pictures_per_second.samples == pytest.approx((1e3 / loop,))
    assert row.host_ms.median == pytest.approx(row.host.median * 2 * loop / 4)  # 2 pictures, 4 calls


def one_row_at_a_time(folder: Path) -> Path:
    """The graphs of a bundle as one exported them who did not know of dynamic axes."""
    for name in ("unet-ort.onnx", "unet-float.onnx"):
        model = onnx.load(folder / name)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(model, folder / name)
    inputs = tuple(replace(spec, shape=(1, *spec.shape[1:])) for spec in FACTS.inputs)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, model=replace(manifest.model, inputs=inputs)))
    return folder


def test_a_graph_of_one_row_takes_several_calls_of_the_engine_for_one_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qncd_deploy.engines.ort import OrtEngine

    run = OrtEngine._run

    def slow(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.005 if "t" in feeds else 0)
        return run(self, feeds)

    monkeypatch.setattr(OrtEngine, "_run", slow)
    fixed = Bundle.open(one_row_at_a_time(write_bundle(tmp_path / "net-w8a8")))
    found = bench(fixed, [Variant("w8a8", "onnxruntime")], Draw(2, batch_size=2, threads=1), rounds=1)
    for row in found.rows:
        assert row.extra_calls == 0
        # two pictures with guidance are four rows
        assert 4 * 5 <= row.call_ms.median <= 2 * row.picture_ms.median / 4 * 1.5
        assert row.host_ms.median == pytest.approx(row.host.median * 2 * row.picture_ms.median / 4)


def test_calls_of_the_corrections_own_are_counted(bundle: Bundle, tmp_path: Path) -> None:
    key = bundle.key(Sampling(), "onnxruntime-f32")
    table = CorrectionTable("qncd", key, (StepFix(refresh=True), StepFix(refresh=True), StepFix(), StepFix()))
    save_tables(tmp_path / "c.npz", [table], auto={})
    variant = Variant("w8a8", "onnxruntime", correction="qncd", tables=(tmp_path / "c.npz",))
    found = bench(bundle, [variant], Draw(2, batch_size=2, threads=1), rounds=1)
    assert [row.extra_calls for row in found.rows] == [0, 2]
    row = found["w8a8"]
    assert row.host_ms.median == pytest.approx(row.host.median * 2 * row.picture_ms.median / 6)


def test_of_networks_that_take_turns_all_are_warm_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qncd_deploy.engines.ort import OrtEngine

    folder = write_bundle(tmp_path / "net-w8a8")
    others = {"ort": "unet-ort.onnx", "master": "unet.onnx", "plan": "plan.json"}
    narrow = {f"{role}-a4": f"a4-{name}" for role, name in others.items()}
    for role, name in others.items():
        shutil.copyfile(folder / name, folder / narrow[f"{role}-a4"])
    # four steps are at 751, 501, 251 and 1: the wider network has the last alone
    save_stepping(folder / "stepping.json", Stepping((StepRange(100.0, 4), StepRange(0.0, 8))))
    manifest = read_manifest(folder)
    roles = {**manifest.roles, **narrow, "stepping": "stepping.json"}
    write_manifest(folder, replace(manifest, roles=roles))

    called: list[str] = []
    run, turn = OrtEngine._run, _Entrant.turn

    def noted(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        called.append(self.path.name)
        return run(self, feeds)

    def timed(self: _Entrant, draw: Draw) -> _Turn:
        called.append("timed")
        return turn(self, draw)

    monkeypatch.setattr(OrtEngine, "_run", noted)
    monkeypatch.setattr(_Entrant, "turn", timed)
    bench(Bundle.open(folder), [Variant("stepped", "onnxruntime")], Draw(1, batch_size=1, threads=1), rounds=1)
    assert {"a4-unet-ort.onnx", "unet-ort.onnx"} <= {*called[: called.index("timed")]}


def test_another_bundle_is_sampled_as_the_one_that_is_measured(bundle: Bundle, tmp_path: Path) -> None:
    facts = replace(FACTS, guidance_scale=1.0, sampler={"scheduler": "plms", "n_steps": 6, "eta": 0.0})
    other = Bundle.open(write_bundle(tmp_path / "net-fp16", facts))
    variants = [Variant("same", "onnxruntime"), Variant("other", "onnxruntime", bundle=other)]
    found = bench(bundle, variants, Draw(2, batch_size=1, threads=1), rounds=1, baseline="other")
    assert found.baseline == "other" and found["other"].speedup.samples == (1.0,)
    same, of_other = (found[name].figures for name in ("same", "other"))
    assert same is not None and of_other is not None
    assert of_other.calls == same.calls == 4
    assert of_other.psnr == same.psnr  # the same graph, the same guidance


def test_a_bundle_of_another_network_is_refused_before_anything_is_opened(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle(tmp_path / "net-fp16")
    write_manifest(folder, replace(read_manifest(folder), inputs={"model.ckpt": "cd"}))
    monkeypatch.setattr(Bundle, "sampler", None)
    variants = [Variant("w8a8", "onnxruntime"), Variant("other", "onnxruntime", bundle=Bundle.open(folder))]
    with pytest.raises(UsageError, match=r"net-fp16: made from another network than .* \(model\.ckpt differs\)"):
        bench(bundle, variants, Draw(1))


@pytest.mark.parametrize("correction", ["ptqd", "off"])
def test_engines_are_closed_when_one_cannot_be_opened_or_run(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, correction: str
) -> None:
    from qncd_deploy.engines.ort import OrtEngine

    closed: list[str] = []
    close, run = OrtEngine._close, OrtEngine._run

    def run_float_only(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.path.name == "unet-ort.onnx":
            raise EngineError("it fails while running")
        return run(self, feeds)

    monkeypatch.setattr(OrtEngine, "_close", lambda self: (closed.append(self.path.name), close(self)))
    monkeypatch.setattr(OrtEngine, "_run", run_float_only)
    with pytest.raises(QncdError, match=r"no table for correction 'ptqd'|it fails while running"):
        bench(bundle, [Variant("w8a8", "onnxruntime", correction=correction)], Draw(1), rounds=1)
    opened = ["unet-float.onnx", "vae-decoder.onnx"]  # a missing table is found before anything of it is opened
    assert sorted(closed) == sorted(opened if correction == "ptqd" else [*opened, "unet-ort.onnx", "vae-decoder.onnx"])


@pytest.mark.parametrize("external", [False, True])
def test_the_size_of_a_graph_is_what_it_reads(tmp_path: Path, external: bool) -> None:
    text = "n (float[n,300] x) => (float[n,300] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    model = parser.parse_model(HEAD + text)
    for name in "wv":
        model.graph.initializer.append(numpy_helper.from_array(np.ones((300, 300), np.float32), name))
    onnx.save(model, tmp_path / "n.onnx", save_as_external_data=external, location="n.data", size_threshold=0)
    weights = 2 * 300 * 300 * 4
    alone = (tmp_path / "n.onnx").stat().st_size
    assert graph_bytes(tmp_path / "n.onnx") == (alone + weights if external else alone)
    assert (alone > weights) != external


def test_shared_weights_count_for_each_graph_and_once(tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    from qncd_deploy.export.save import save_siblings

    def graph(**weights: np.ndarray) -> ir.Model:
        chain = " ".join(f"h{i + 1} = MatMul(h{i}, {name})" for i, name in enumerate(weights))
        text = f"n (float[n,40] h0) => (float[n,40] h{len(weights)}) {{ {chain} }}"
        model = parser.parse_model(HEAD + text)
        model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in weights.items())
        return ir.from_proto(model)

    one, two, three = (np.full((40, 40), value, np.float32) for value in (1, 2, 3))
    models = {"a.onnx": graph(w=one, v=two), "b.onnx": graph(w=one, u=three, again=three.copy())}
    save_siblings(models, tmp_path)
    for name in models:
        inside = (tmp_path / name).stat().st_size
        assert graph_bytes(tmp_path / name) == inside + 2 * 40 * 40 * 4  # equal tensors lie in one place


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    held = np.ones(1 << 27, np.uint8)  # far beyond what the process gives back meanwhile
    after = resident_bytes()
    assert after is not None and after - before > 0.9 * held.nbytes
