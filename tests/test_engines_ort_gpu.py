"""ONNX Runtime's GPU providers, on sessions that pretend: options, the partition, kept engines, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
    pytest.skip("this ONNX Runtime does not tell where nodes run", allow_module_level=True)

from engine_graphs import network_feeds, reference, save_network  # noqa: E402

from qncd_deploy.engines import ort_gpu  # noqa: E402
from qncd_deploy.engines.base import BACKENDS, backend_status, open_engine  # noqa: E402
from qncd_deploy.engines.trt.device import Device  # noqa: E402
from qncd_deploy.errors import BackendMissing, BuildFailed, EngineError  # noqa: E402

GPU = Device(name="Fake GPU", sm="sm86", memory=1 << 34, cuda="12.6")
RTX = "NvTensorRTRTXExecutionProvider"
REAL, REAL_OPTIONS = ort.InferenceSession, ort.SessionOptions


class Session:
    """A CPU session that says its nodes are another provider's, all but those of the types in `strays`."""

    opened: list[Session] = []  # noqa: RUF012
    strays: tuple[str, ...] = ()

    def __init__(self, graph: Any, options: Any, providers: Any = (), enable_fallback: int = 1, **given: Any) -> None:
        assert not given
        self.graph, self.options = graph, options
        self.provider, self.settings = providers[0] if providers else (RTX, options.devices[1])
        self.enable_fallback = enable_fallback
        if isinstance(graph, bytes):
            assert graph.startswith(b"engine of ")
            graph = graph.removeprefix(b"engine of ").decode()
        elif options.get("ep.context_enable") == "1":
            Path(options.get("ep.context_file_path")).write_bytes(b"engine of " + str(graph).encode())
        plain = REAL_OPTIONS()
        plain.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.real = REAL(graph, plain, providers=["CPUExecutionProvider"])
        self.opened.append(self)

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [node for part in self.real.get_provider_graph_assignment_info() for node in part.get_nodes()]

        def part(name: str, held: list[Any]) -> Any:
            return SimpleNamespace(ep_name=name, get_nodes=lambda: held)

        return [
            part(self.provider, [node for node in nodes if node.op_type not in self.strays]),
            part("CPUExecutionProvider", [node for node in nodes if node.op_type in self.strays]),
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Options:
    """SessionOptions that can be read again, and take a plugin's devices."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value

    def get(self, name: str) -> str | None:
        return self.entries.get(name)

    def add_provider_for_devices(self, devices: list[Any], settings: dict[str, str]) -> None:
        self.devices = devices, settings


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr(Session, "opened", [])
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"])
    monkeypatch.setattr(ort_gpu, "find_device", lambda: GPU)
    monkeypatch.setattr(ort_gpu, "_plugin_devices", lambda: ["first", "second"])
    monkeypatch.setattr(ort_gpu, "_failure", lambda provider: None)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    save_network(tmp_path / "net.onnx", quantized=True)
    return tmp_path / "net.onnx"


SHAPES = {name: array.shape for name, array in network_feeds().items()}
PROFILE = "x:2x8x16x16,t:2,c:2x1x12"


@pytest.mark.parametrize(
    ("backend", "provider", "settings"),
    [
        ("onnxruntime-tensorrt", "TensorrtExecutionProvider", {"trt_fp16_enable": "1", "trt_int8_enable": "1"}),
        ("onnxruntime-rtx", RTX, {}),
        ("onnxruntime-cuda", "CUDAExecutionProvider", {"use_tf32": "0"}),
    ],
)
def test_a_graph_runs_with_the_provider_alone(
    backend: str, provider: str, settings: dict[str, str], graph: Path
) -> None:
    feeds = network_feeds()
    with open_engine(backend, graph) as engine:
        assert engine.engine_id == f"{backend}-f16"
        # sums of at most 72 products, |terms| <= 1, in another order
        np.testing.assert_allclose(engine(feeds)["out"], reference(graph, feeds), rtol=0, atol=1e-5)
    (session,) = Session.opened
    assert (session.provider, session.settings) == (provider, settings)
    if backend == "onnxruntime-rtx":
        assert session.options.devices[0] == ["first"]
    else:
        assert session.enable_fallback == 0
    assert backend_status(BACKENDS[backend]).version == ort.__version__


def test_float32_and_float_graphs_ask_for_no_half_and_no_int8(tmp_path: Path) -> None:
    save_network(tmp_path / "net.onnx", quantized=False)
    with open_engine("onnxruntime-tensorrt", tmp_path / "net.onnx", remainder="f32"):
        assert Session.opened[0].settings == {"trt_fp16_enable": "0", "trt_int8_enable": "0"}


def test_a_session_whose_nodes_went_elsewhere_is_refused_by_their_names(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "strays", ("QuantizeLinear", "DequantizeLinear"))
    for backend, provider in list(ort_gpu.PROVIDERS.items()):
        with pytest.raises(BuildFailed) as refused:
            open_engine(backend, graph)
        message = str(refused.value)
        assert message.startswith(
            f"{graph}: {provider} does not run all of it: QuantizeLinear '' on CPUExecutionProvider"
        )
        assert " and " in message and " more. Use --backend tensorrt" in message


def test_shape_arithmetic_may_leave_cuda_but_not_tensorrt(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "strays", ("Squeeze", "Unsqueeze"))
    open_engine("onnxruntime-cuda", graph).close()
    with pytest.raises(BuildFailed, match="Squeeze '' on CPUExecutionProvider"):
        open_engine("onnxruntime-tensorrt", graph)


def test_a_provider_that_did_not_start_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(
        BackendMissing, match=r"TensorrtExecutionProvider's libraries could not be loaded \(its session"
    ):
        open_engine("onnxruntime-tensorrt", graph)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_whose_libraries_are_not_there_is_missing(
    graph: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compiled in, as get_available_providers tells, is not enough; what is missing is loaded first where it can be."""
    monkeypatch.undo()
    ort_gpu._failure.cache_clear()
    monkeypatch.setattr(ort_gpu, "find_device", lambda: GPU)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(ort_gpu.PROVIDERS.values()))
    loaded = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: (print("Failed to load libcublas"), loaded.append("CUDA")))
    real = ort_gpu.importlib.import_module
    monkeypatch.setattr(
        ort_gpu.importlib, "import_module", lambda name: loaded.append(name) if name == "tensorrt" else real(name)
    )
    for backend, needed in (("onnxruntime-cuda", "CUDA and cuDNN,"), ("onnxruntime-tensorrt", "cuDNN and TensorRT,")):
        missing = backend_status(BACKENDS[backend]).missing
        assert missing is not None and needed in missing and "'s libraries could not be loaded (" in missing
        assert "\n" not in missing
        with pytest.raises(BackendMissing):
            open_engine(backend, graph)
    assert loaded == ["CUDA", "CUDA", "tensorrt"]  # once for each
    assert capfd.readouterr() == ("", "")
    assert ort_gpu._failure("CPUExecutionProvider") is None
    ort_gpu._failure.cache_clear()
    (node,) = onnx.load_from_string(ort_gpu._IDENTITY).graph.node
    assert node.op_type == "Identity"


@pytest.mark.parametrize(("backend", "prefix"), [("onnxruntime-tensorrt", "trt"), ("onnxruntime-rtx", "nv")])
def test_a_compiled_engine_is_kept_and_used_for_its_shapes(
    backend: str, prefix: str, graph: Path, tmp_path: Path
) -> None:
    blob = tmp_path / "shelf/net.blob"
    with open_engine(backend, graph) as engine:
        engine.save_blob(blob, SHAPES, source="graph")
    assert sorted(path.name for path in blob.parent.iterdir()) == ["net.blob", "net.json"]
    for bound in ("min", "opt", "max"):
        assert Session.opened[1].settings[f"{prefix}_profile_{bound}_shapes"] == PROFILE
    assert Session.opened[1].options.get("ep.context_embed_mode") == "1"
    Session.opened.clear()
    with open_engine(backend, graph) as engine:
        assert engine.compiled_bytes(SHAPES) is None
        engine.load_blob(blob, source="graph")
        assert engine.compiled_bytes(SHAPES) == blob.stat().st_size
        plain, compiled = Session.opened
        assert compiled.graph == b"engine of " + str(graph).encode()
        used = []
        for session in (plain, compiled):
            session.run = lambda names, feeds, session=session: (used.append(session), session.real.run(names, feeds))[
                1
            ]
        for rows, session in ((2, compiled), (3, plain)):
            feeds = network_feeds(rows)
            np.testing.assert_allclose(engine(feeds)["out"], reference(graph, feeds), rtol=0, atol=1e-5)
            assert used[-1] is session


def test_a_kept_engine_for_something_else_is_refused(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = tmp_path / "net.blob"
    with open_engine("onnxruntime-tensorrt", graph) as engine:
        engine.save_blob(blob, SHAPES, source="graph")
        with pytest.raises(EngineError, match="made from another graph"):
            engine.load_blob(blob, source="another")
    with (
        open_engine("onnxruntime-rtx", graph) as engine,
        pytest.raises(
            EngineError, match=r"made for onnxruntime-tensorrt-f16, this is onnxruntime-rtx-f16\. Run `qncd bui"
        ),
    ):
        engine.load_blob(blob, source="graph")
    monkeypatch.setattr(ort_gpu, "find_device", lambda: Device("Other GPU", "sm89", 1, "12.6"))
    with (
        open_engine("onnxruntime-tensorrt", graph) as engine,
        pytest.raises(EngineError, match=r"made for Fake GPU \(sm86\), this is Other GPU \(sm89\)"),
    ):
        engine.load_blob(blob, source="graph")


def test_cuda_compiles_nothing(graph: Path, tmp_path: Path) -> None:
    with (
        open_engine("onnxruntime-cuda", graph) as engine,
        pytest.raises(EngineError, match="onnxruntime-cuda-f16: compiles nothing that could be stored"),
    ):
        engine.save_blob(tmp_path / "net.blob", SHAPES, source="graph")


def test_what_is_missing_is_one_line(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="runs on the GPU, where --threads 2 means nothing"):
        open_engine("onnxruntime-cuda", graph, threads=2)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        BackendMissing, match=r"has CPUExecutionProvider, not TensorrtExecutionProvider\. Install it: pip"
    ):
        open_engine("onnxruntime-tensorrt", graph)
    assert "not CUDAExecutionProvider" in str(backend_status(BACKENDS["onnxruntime-cuda"]).missing)
    monkeypatch.setattr(ort, "InferenceSession", object)
    with pytest.raises(BackendMissing, match="does not tell where nodes run"):
        open_engine("onnxruntime-tensorrt", graph)


def test_the_plugin_is_found_registered_once_and_asked_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    find, calls = ort_gpu._plugin_devices, []
    plugin = SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: "/plugin.so")
    devices = [SimpleNamespace(ep_name="CPUExecutionProvider"), SimpleNamespace(ep_name=RTX)]

    def importing(found: Any) -> None:
        def load(name: str) -> Any:
            if isinstance(found, Exception):
                raise found
            return found

        find.cache_clear()
        monkeypatch.setattr(ort_gpu.importlib, "import_module", load)

    importing(ModuleNotFoundError("No module named 'onnxruntime_ep_nv_tensorrt_rtx'"))
    with pytest.raises(
        BackendMissing, match=r'installed\. Install it: pip install "onnxruntime>=1\.24" onnxruntime-ep'
    ):
        find()
    importing(plugin)
    with pytest.raises(BackendMissing, match=r"its plugin cannot be loaded \(.*plugin\.so"):
        find()
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *given: calls.append(given))
    with pytest.raises(BackendMissing, match="drives no GPU of this machine"):
        find()
    monkeypatch.setattr(ort, "get_ep_devices", lambda: devices)
    assert find() == find() == devices[1:]
    assert calls == 2 * [(RTX, "/plugin.so")]  # once for the refusal, which is not kept, once for both answers
    find.cache_clear()


def test_onnx_runtime_really_tells_where_nodes_run(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own answer for a provider that takes no nodes: all of them are named."""
    monkeypatch.undo()
    monkeypatch.setattr(ort_gpu, "find_device", lambda: GPU)
    monkeypatch.setattr(ort_gpu, "check_provider", lambda backend: None)
    monkeypatch.setattr(ort_gpu.OrtGpuEngine, "_settings", lambda self, shapes: {})
    monkeypatch.setitem(ort_gpu.PROVIDERS, "onnxruntime-tensorrt", "AzureExecutionProvider")
    if "AzureExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider that takes no nodes")
    with pytest.raises(
        BuildFailed, match=r"AzureExecutionProvider does not run all of it: \w+ '\w*' on CPUExecutionProv"
    ):
        open_engine("onnxruntime-tensorrt", graph)
