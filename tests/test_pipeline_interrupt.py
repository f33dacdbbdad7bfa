"""An export that is interrupted, killed, raced or starved of disk leaves nothing half-written and goes on cleanly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import Export, command, contents, environment, qncd, qncd_process

pytest.importorskip("torch", reason="exporting needs torch")

SLOW_CALIBRATION = ("--n-steps", "50", "--calib-size", "320", "--calib-steps", "50", "--eval-size", "4")
"""Twenty batches of recorded pictures: time to interrupt it in the middle."""


def start(checkpoint: Path, home: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("export", checkpoint, "--int8", "--correction", "off", *more),
        cwd=home,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def wait_for(what: str, home: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if list(home.glob(what)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"no {what} after two minutes")


SHARD = "calib_data/tiny/calibration-*.partial/*.npz"


def states(home: Path) -> dict[str, int]:
    """The recorded batches, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in home.glob(SHARD)}


def test_ctrl_c_leaves_nothing(own_graph: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qncd_deploy.pipeline.export.quantize", interrupted)
    done = qncd(*replace(own_graph, home=tmp_path).again())
    assert done.code == 130
    assert "interrupted" in done.line and done.out == ""
    assert list((tmp_path / "export").iterdir()) == []


def test_killed_while_another_waits_outside(checkpoint: Path, own_graph: Export, tmp_path: Path) -> None:
    process = start(checkpoint, tmp_path, *SLOW_CALIBRATION)
    wait_for(SHARD, tmp_path, process)
    rival = qncd(
        *("export", checkpoint, "--int8", "--onnx-dir", tmp_path / "export", "--calib-dir", tmp_path / "other")
    )
    assert rival.code == 1
    assert str(process.pid) in rival.line and "tiny-w8a8" in rival.line
    process.kill()
    process.communicate()
    assert list((tmp_path / "export").glob(f".tiny-w8a8.partial-{process.pid}"))
    assert states(tmp_path)  # what was recorded stays
    other = replace(own_graph, home=tmp_path)
    assert qncd(*other.again()).code == 0
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["own-w8a8"]  # what the kill left was swept


@pytest.mark.slow
def test_interrupted_then_gone_on_with(checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    for _ in range(2):
        process = start(checkpoint, tmp_path, *SLOW_CALIBRATION)
        wait_for(SHARD.replace("*.npz", f"{len(seen):03d}.npz"), tmp_path, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130
        assert out == "" and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1 and "interrupted" in err
        assert list((tmp_path / "export").iterdir()) == []
        assert seen.items() < states(tmp_path).items()  # read again, not recorded again
        seen = states(tmp_path)


def same_bytes_again(made: Export, home: Path) -> None:
    again = replace(made, home=home)
    done = qncd_process(*again.again(), cwd=home, PYTHONHASHSEED="1")
    assert done.code == 0, done.err
    first, second = contents(made.bundle), contents(again.bundle)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and name != "report.html"] == []


def test_the_same_bytes_again_in_another_process(own_graph: Export, tmp_path: Path) -> None:
    same_bytes_again(own_graph, tmp_path)


@pytest.mark.slow
def test_the_same_bytes_again_with_calibration_and_corrections(exported: Export, tmp_path: Path) -> None:
    same_bytes_again(exported, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which the tiny bundle does not fit on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line(own_graph: Export, small_disk: Path) -> None:
    done = qncd(*replace(own_graph, home=small_disk).again())
    assert done.code == 1, done.err
    assert "disk full" in done.line and "own-w8a8" in done.line
    assert not contents(small_disk)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_calibration_is_one_line(
    checkpoint: Path, small_disk: Path, tmp_path: Path
) -> None:
    done = qncd(
        *("export", checkpoint, "--int8", "--n-steps", 20, "--calib-size", 64),
        *("--calib-dir", small_disk, "--onnx-dir", tmp_path / "export"),
    )
    assert done.code == 1, done.err
    assert "disk full" in done.line
    assert list((tmp_path / "export").iterdir()) == []
    assert all("partial-" not in name for name in contents(small_disk))  # whole batches may stay, halves may not
