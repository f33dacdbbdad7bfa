"""Whole samplings with TensorRT, on the device, against the host's; and how rows meet the sizes that were built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import fake_cupy
import onnx
from fake_tensorrt import Machine, install
from onnx import numpy_helper, parser

from qncd_deploy.bundle import ConditionFacts, ModelFacts
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, StepFix, identity_table
from qncd_deploy.engines.base import open_engine
from qncd_deploy.engines.eps_model import EngineModel
from qncd_deploy.errors import EngineError
from qncd_deploy.sampler import Network, Sampler
from qncd_deploy.schedule import SCHEDULERS, Prediction, Schedule
from qncd_deploy.steps import SamplerConfig

C, H, W = SHAPE = (4, 6, 5)
SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
N_STEPS = 9
FIVE = ConditionFacts("class-labels", 6, 5)

UNET = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[batch,4,6,5] x, int64[batch] t, int64[batch] labels) => (float[batch,4,6,5] out) {
    y = Conv<pads=[1,1,1,1]>(x, w)
    tf = Cast<to=1>(t)
    wave = Cos(tf)
    shift = Gather(table, labels)
    moved = Mul(wave, tenth)
    moved4 = Unsqueeze(moved, axes)
    shift4 = Unsqueeze(shift, axes)
    y1 = Add(y, moved4)
    y2 = Add(y1, shift4)
    y3 = Tanh(y2)
    most = Mul(x, share)
    out = Add(most, y3)
}
"""
DECODER = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[batch,4,6,5] latents) => (float[batch,3,6,5] images) {
    y = Conv(latents, w)
    images = Tanh(y)
}
"""


def save(path: Path, text: str, **arrays: np.ndarray) -> Path:
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network with classes and a decoder."""
    folder, rng = tmp_path_factory.mktemp("graphs"), np.random.default_rng(1)

    def numbers(*shape: int) -> np.ndarray:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    constants = {"axes": np.array([1, 2, 3]), "tenth": np.float32(0.1), "share": np.float32(0.7)}
    unet = save(folder / "unet.onnx", UNET, w=numbers(4, 4, 3, 3), table=numbers(6), **constants)
    return unet, save(folder / "decoder.onnx", DECODER, w=numbers(3, 4, 1, 1))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(monkeypatch)


# ---------------------------------------------------------------- rows


def test_batches_of_any_size_are_cut_to_the_one_engine_there_is(
    graphs: tuple[Path, Path], machine: Machine, tmp_path: Path
) -> None:
    x, labels = np.random.default_rng(0).standard_normal((5, *SHAPE)).astype(np.float32), np.arange(5)
    stored = machine.store(tmp_path / "net.engine", graphs[0], {"x": (2, *SHAPE), "t": (2,), "labels": (2,)})
    with open_engine("tensorrt", graphs[0]) as engine, open_engine("onnxruntime", graphs[0]) as host:
        engine.load_blob(stored, source="graph")
        found = EngineModel.of(engine, rows=16)(x, 951.0, {"labels": labels})
        np.testing.assert_array_equal(found, EngineModel.of(host, rows=2)(x, 951.0, {"labels": labels}))
    assert machine.builds == []


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("n", "scale", "rows"), [(5, 1.0, [16]), (17, 1.0, [16, 1]), (5, 2.5, [32]), (17, 2.5, [32, 2])]
)
def test_batches_are_filled_up_to_a_size_that_was_built(
    n: int, scale: float, rows: list[int], together: bool, graphs: tuple[Path, Path], machine: Machine, tmp_path: Path
) -> None:
    """Engines of 1 and of 16 pictures, in one file and in two."""
    unet, decoder = graphs
    per = 1 if scale == 1 else 2
    made = sampler("tensorrt", graphs, scale=scale, batch_size=16)
    for engine, graph, factor in ((made.network.unet, unet, per), (made.network.decoder, decoder, 1)):
        names = {"latents"} if graph is decoder else {"x", "t", "labels"}
        profiles = [
            {name: (factor * size, *(SHAPE if name in ("x", "latents") else ())) for name in names} for size in (1, 16)
        ]
        for index, group in enumerate([profiles] if together else [[profile] for profile in profiles]):
            engine.load_blob(machine.store(tmp_path / f"{graph.stem}{index}.engine", graph, *group), source="graph")
        assert engine.row_sizes == (factor, 16 * factor)
    found = made.sample(n, seed=7)
    host = sampler("onnxruntime", graphs, scale=scale, batch_size=16).sample(n, seed=7)
    np.testing.assert_allclose(found.latents, host.latents, rtol=0, atol=1e-4)  # over nine steps
    assert np.abs(found.images.astype(int) - host.images).max() <= 1
    asked = {size for engine in machine.module.engines for context in engine.contexts for size in context.seen}
    assert asked == {*rows, *(size // per for size in rows)}
    assert made.kernels() != () and made.compiled_bytes() is not None


def test_rows_are_filled_up_on_the_device(graphs: tuple[Path, Path], machine: Machine) -> None:
    x, labels = np.random.default_rng(0).standard_normal((5, *SHAPE)).astype(np.float32), np.arange(5)
    with open_engine("tensorrt", graphs[0]) as engine, open_engine("onnxruntime", graphs[0]) as host:
        model = EngineModel.of(engine, rows=3)
        found = model(machine.arrays.put(x), 951.0, {"labels": machine.arrays.put(labels)})
        expected = EngineModel.of(host, rows=3)(x, 951.0, {"labels": labels})
        np.testing.assert_array_equal(machine.arrays.get(found), expected)
    assert [shapes["x"][0] for shapes in machine.builds] == [3]


# ---------------------------------------------------------------- whole samplings


def sampler(
    backend: str,
    graphs: tuple[Path, Path],
    *,
    scheduler: str = "ddim",
    eta: float = 0.0,
    scale: float = 1.0,
    fix: dict[str, Any] | None = None,
    schedule: Schedule = SCHEDULE,
    batch_size: int | None = None,
) -> Sampler:
    """fix: fields of a row of the correction table, the same at calls 2 and 5."""
    config = SamplerConfig(scheduler, N_STEPS, eta)
    unet, decoder = (open_engine(backend, path) for path in graphs)
    facts = ModelFacts("net", tuple(unet.inputs.values()), SHAPE, (3, H, W), schedule.to_json(), None, scale, FIVE)
    labels = {"labels": np.arange(FIVE.classes)}
    network = Network(Path("bundle"), "00", facts, schedule, unet, decoder, labels)
    key = ScheduleKey.of(schedule, config, guidance_scale=scale, backend="fake", plan_sha="0")
    rows = tuple(StepFix(**(fix if fix and call in (2, 5) else {})) for call in range(len(key.timesteps)))
    table = CorrectionTable("test", key, rows) if fix else identity_table(key)
    return Sampler(network, config=config, guidance_scale=scale, table=table, batch_size=batch_size)


RNG = np.random.default_rng(3)
FIXES: dict[str, dict[str, Any]] = {
    "input": {"x_add": 0.1 * RNG.standard_normal(C), "t_model": 700.0},
    "affine": {"a": 1 + 0.1 * RNG.standard_normal(C), "b": 0.1 * RNG.standard_normal(SHAPE)},
    "mixed channels": {"a": np.eye(C) + 0.1 * RNG.standard_normal((C, C)), "b": 0.05},
    "masked": {"a": 0.9, "b": 0.1 * RNG.standard_normal(C), "thr": 0.8},
    "masked, one side": {"a": 0.9, "thr": 0.8, "mask": "one-sided"},
    "filter": {"f": 0.05 * RNG.standard_normal((C, 2 * C, 3, 3))},
    "variance": {"var": 0.01},
    "noise": {"z_std": 0.02},
    "gain": {"gain": 1.01},
    "state": {"x_mul": 0.99, "x_sub": 0.1 * RNG.standard_normal(C)},
    "probe": {"refresh": True, "m_ref": 0.01 * RNG.standard_normal(C), "m_gain": 0.7},
    "probe, pooled": {"refresh": True, "m_pool": "batch"},
}


def same_pictures(graphs: tuple[Path, Path], **how: Any) -> None:
    """Bit for bit: the fake device computes with the same libraries, so only a wrong order or value can differ."""
    found, expected = (
        sampler(backend, graphs, **how).sample(5, labels=[1, 4], seed=7) for backend in ("tensorrt", "onnxruntime")
    )
    assert np.isfinite(expected.latents).all()
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.images, expected.images)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_on_the_device(scheduler: str, scale: float, graphs: tuple[Path, Path], machine: Machine) -> None:
    same_pictures(graphs, scheduler=scheduler, scale=scale, eta=0.5 if scheduler == "ddim" else 0.0)
    rows = 5 if scale == 1 else 10
    assert [shapes["x"][0] for shapes in machine.builds if "x" in shapes] == [rows]


@pytest.mark.parametrize("name", FIXES)
def test_every_correction_on_the_device(name: str, graphs: tuple[Path, Path], machine: Machine) -> None:
    same_pictures(graphs, fix=FIXES[name], eta=1.0, batch_size=2, scale=1.5)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_every_prediction_on_the_device(prediction: Prediction, graphs: tuple[Path, Path], machine: Machine) -> None:
    schedule = replace(SCHEDULE, prediction=prediction, clip_sample=0.8)
    same_pictures(graphs, schedule=schedule, fix=FIXES["probe"], eta=0.3)


def test_tensorrt_for_rtx_samples_the_same(graphs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt-rtx")
    found = sampler("tensorrt-rtx", graphs, scheduler="plms").sample(3)
    np.testing.assert_array_equal(found.latents, sampler("onnxruntime", graphs, scheduler="plms").sample(3).latents)


def test_a_batch_waits_for_its_result_alone(graphs: tuple[Path, Path], machine: Machine) -> None:
    """Not once a step: the host runs ahead of the device."""
    opened = sampler("tensorrt", graphs, fix=FIXES["affine"], eta=1.0, batch_size=2, scale=1.5)
    waits = machine.waits
    opened.sample(6)
    assert machine.waits - waits == 3 * 2  # the latents and the pictures of three batches


def test_states_are_the_devices_until_they_are_asked_for(graphs: tuple[Path, Path], machine: Machine) -> None:
    how: dict[str, Any] = {"fix": FIXES["probe"], "eta": 1.0}
    there, here = (sampler(backend, graphs, **how) for backend in ("tensorrt", "onnxruntime"))
    for found, expected in zip(there.trajectory([0, 3]), here.trajectory([0, 3]), strict=True):
        assert machine.arrays.holds(found.x)
        brought = there.on_host(found)
        for name in ("x_in", "raw", "eps", "x"):
            np.testing.assert_array_equal(getattr(brought, name), getattr(expected, name))
        np.testing.assert_array_equal(brought.m, here.on_host(expected).m)


def test_a_model_for_the_host_stays_on_the_host(graphs: tuple[Path, Path], machine: Machine) -> None:
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    there, here = (sampler(backend, graphs, scale=3.0).model_for([0, 1]) for backend in ("tensorrt", "onnxruntime"))
    np.testing.assert_array_equal(there(x, 801.0), here(x, 801.0))


# ---------------------------------------------------------------- mistakes that a test must see


def plant_uncopied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are the engine's own buffers."""
    monkeypatch.setattr(fake_cupy.ndarray, "copy", lambda self: self)


def plant_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are fetched before they are there."""
    monkeypatch.setattr(fake_cupy, "asnumpy", lambda array: array.memory.copy())


def plant_other_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and arithmetic on the default stream."""
    fake_cupy.Stream.null.use()
    monkeypatch.setattr(fake_cupy.Stream, "use", lambda self: self)


@pytest.mark.parametrize("plant", [plant_uncopied, plant_no_wait, plant_other_stream])
def test_planted_mistakes_in_the_order_of_things_are_seen(
    plant: Any, graphs: tuple[Path, Path], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, EngineError)):
        same_pictures(graphs, scheduler="plms", eta=0.0)
