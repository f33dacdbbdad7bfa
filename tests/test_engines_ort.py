"""ONNX Runtime: the optimizer that hides integer MatMuls is off for quantized graphs, and for these alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from engine_graphs import save_network  # noqa: E402

from qncd_deploy.engines.base import open_engine  # noqa: E402


@pytest.mark.parametrize("quantized", [True, False])
def test_matmul_and_add_are_merged_in_float_graphs_only(
    quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[dict[str, Any]] = []
    make = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *args, **given: (sessions.append(given), make(*args, **given))[1]
    )
    save_network(tmp_path / "net.onnx", quantized=quantized)
    with open_engine("onnxruntime", tmp_path / "net.onnx", threads=1):
        assert sessions[0]["disabled_optimizers"] == (["MatMulAddFusion"] if quantized else [])
        assert sessions[0]["providers"] == ["CPUExecutionProvider"]
