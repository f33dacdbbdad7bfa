"""qncd sample into a folder, broken off; and of a bundle whose latents are no pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import contents, qncd

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from test_runtime import FACTS, ROLES, write_bundle

from qncd_deploy.engines.ort import OrtEngine

FEW = ("--backend", "onnxruntime", "--threads", 1, "-n", 6, "--batch-size", 2)


def test_what_is_drawn_before_ctrl_c_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "net-w8a8")
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    assert qncd("sample", bundle, *FEW, "-o", tmp_path / "whole").code == 0
    calls, run = 0, OrtEngine._run

    def interrupted(self: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += "t" in feeds
        if calls == 4 * 2 + 2:  # four steps a batch: in the third
            raise KeyboardInterrupt
        return run(self, feeds)

    monkeypatch.setattr(OrtEngine, "_run", interrupted)
    done = qncd("sample", bundle, *FEW, "-o", tmp_path / "part")
    assert done.code == 130 and "nothing half-written" in done.err
    whole, part = contents(tmp_path / "whole"), contents(tmp_path / "part")
    assert len(whole) == 6 and part == {name: whole[name] for name in sorted(whole)[:4]}


def test_latents_that_are_no_pictures_are_refused_before_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(FACTS, image_shape=None)
    bundle = write_bundle(tmp_path / "net", facts, {role: name for role, name in ROLES.items() if role != "decoder"})
    monkeypatch.setattr(OrtEngine, "_run", None)
    for out in ("grid.png", "."):
        done = qncd("sample", bundle, *FEW, "-o", tmp_path / out)
        assert done.code == 2 and "its latents are not pictures. Write them to an .npz" in done.line
