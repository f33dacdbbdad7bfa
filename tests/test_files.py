"""Atomic writes: whole or absent under errors, Ctrl-C, kill -9, a second writer, a full disk; reproducible bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qncd_deploy import files
from qncd_deploy.errors import BundleError
from qncd_deploy.files import atomic_directory, atomic_file, canonical_json, load_npz, save_npz, sha256_file


def make(target: Path, content: str, *, force: bool = False) -> None:
    with atomic_directory(target, force=force) as folder:
        (folder / "manifest.json").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class Writer:
    """Another process that has a folder half written: `.target/half` exists, the block never ends."""

    def __init__(self, target: Path, *, inside: str = "(folder / 'half').write_text('x')") -> None:
        code = f"""
            import sys, time
            from pathlib import Path
            from qncd_deploy.files import atomic_directory
            with atomic_directory(Path({str(target)!r}), force=True) as folder:
                {inside}
                print("ready", flush=True)
                time.sleep(60)
        """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()


def test_a_folder_appears_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "shelf" / "net-w8a8", "one")
    assert names(tmp_path / "shelf") == ["net-w8a8"]
    assert (tmp_path / "shelf" / "net-w8a8" / "sub" / "data").read_text() == "one"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "net", "one")
    with pytest.raises(error), atomic_directory(tmp_path / "net", force=True) as folder:
        (folder / "manifest.json").write_text("two")
        raise error
    assert names(tmp_path) == ["net"]
    assert (tmp_path / "net" / "manifest.json").read_text() == "one"


def test_an_existing_folder_needs_force_and_the_old_one_stays_until_the_end(tmp_path: Path) -> None:
    make(tmp_path / "net", "one")
    with pytest.raises(BundleError, match=r"net: exists already\. Use --force"):
        make(tmp_path / "net", "two")
    with atomic_directory(tmp_path / "net", force=True) as folder:
        (folder / "manifest.json").write_text("two")
        assert (tmp_path / "net" / "manifest.json").read_text() == "one"
    assert names(tmp_path) == ["net"]
    assert names(tmp_path / "net") == ["manifest.json"]  # nothing of the old one is mixed in


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"thesis: holds files but no manifest\.json"):
        make(tmp_path / "thesis", "two", force=True)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(BundleError, match="file: is a file"):
        make(tmp_path / "file", "two", force=True)
    assert names(tmp_path) == ["file", "thesis"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    make(tmp_path / "net", "one")
    assert names(tmp_path) == ["net"]


def test_the_second_of_two_processes_is_told_who_writes(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "net")
    with pytest.raises(BundleError, match=rf"net: process {writer.process.pid} is writing it\. Wait for it"):
        make(tmp_path / "net", "two")
    make(tmp_path / "other", "two")  # another name in the same shelf is free, and its sweep spares the running writer
    assert f".net.partial-{writer.process.pid}" in names(tmp_path)
    writer.end(signal.SIGINT)
    assert names(tmp_path) == ["other"]


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    make(tmp_path / "net", "one")
    for writer in [Writer(tmp_path / "net"), Writer(tmp_path / "gone")]:
        writer.end(signal.SIGKILL)
    assert len(names(tmp_path)) == 5  # two locks, two partial folders, and the old bundle, whole
    assert (tmp_path / "net" / "manifest.json").read_text() == "one"
    make(tmp_path / "net", "two", force=True)
    assert names(tmp_path) == ["net"]
    assert (tmp_path / "net" / "manifest.json").read_text() == "two"


def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    make(tmp_path / "net", "one")
    target = tmp_path / "net"
    killed = Writer(
        target, inside=f"import os; os.rename({str(target)!r}, {str(tmp_path)!r} + f'/.net.old-{{os.getpid()}}')"
    )
    killed.end(signal.SIGKILL)
    assert not target.exists()
    make(tmp_path / "other", "two")
    assert names(tmp_path) == ["net", "other"]
    assert target.joinpath("manifest.json").read_text() == "one"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "_sync", lambda path: synced.append((path.name, (tmp_path / "net").exists())))
    make(tmp_path / "net", "one")
    partial = f".net.partial-{os.getpid()}"
    assert [*synced] == [
        ("manifest.json", False),
        ("sub", False),
        ("data", False),
        (partial, False),
        (tmp_path.name, True),
    ]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "net", "one")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", refuse)
    with pytest.raises(PermissionError):
        make(tmp_path / "net", "two", force=True)
    assert names(tmp_path) == ["net"]
    assert (tmp_path / "net" / "manifest.json").read_text() == "one"


def test_a_sweep_spares_what_is_not_ours(tmp_path: Path) -> None:
    own = {
        ".net.partial-123": None,
        ".net.old-7": None,
        ".cache.lock": "somebody else's lock",
        ".cache.partial-9": None,
    }
    for name, content in own.items():
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(content)
    make(tmp_path / "other", "one")
    assert names(tmp_path) == sorted([*own, "other"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path: Path, code: int) -> None:
    make(tmp_path / "net", "one")
    with (
        pytest.raises(BundleError, match=r"net: disk full while writing: nothing was changed") as caught,
        atomic_directory(tmp_path / "net", force=True),
    ):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["net"]
    assert (tmp_path / "net" / "manifest.json").read_text() == "one"


def test_a_full_disk_is_seen_when_a_library_lost_errno(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(BundleError, match="disk full"), atomic_directory(tmp_path / "net"):
        raise RuntimeError("failed writing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BundleError, match="cannot be written: Permission denied"):
        make(tmp_path / "net", "one")


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "shelf").write_text("")
    with pytest.raises(BundleError, match="shelf/net: cannot be written"):
        make(tmp_path / "shelf" / "net", "one")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    make(tmp_path / "disk" / "net", "one")
    (tmp_path / "net").symlink_to(tmp_path / "disk" / "net")
    make(tmp_path / "net", "two", force=True)
    assert (tmp_path / "net").is_symlink()
    assert (tmp_path / "disk" / "net" / "manifest.json").read_text() == "two"


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_text("one")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:
        partial.write_text("tw")
        raise KeyboardInterrupt
    with pytest.raises(BundleError, match=r"grid\.png: disk full"), atomic_file(path) as partial:
        partial.write_text("tw")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "one"
    with atomic_file(path) as partial:
        partial.write_text("two")
    assert path.read_text() == "two"
    assert names(tmp_path) == ["grid.png"]


def test_partial_files_of_killed_writers_are_swept_and_running_ones_spared(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    (tmp_path / ".a.npz.partial-1").write_text("left by a killed run")
    with atomic_file(path) as first:
        first.write_text("first")
        held = first.rename(tmp_path / ".a.npz.partial-2")  # as another process would hold it
        save_npz(path, {"x": np.zeros(1)})
        assert held.exists()
        held.rename(first)
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.npz"]


def test_npz_bytes_depend_on_values_alone(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {"x": x, "scalar": np.array(2.5), "text": np.array("qncd"), "empty": np.zeros((0, 4), np.int8)}
    save_npz(tmp_path / "a.npz", arrays)
    time.sleep(0.01)
    save_npz(tmp_path / "b.npz", {k: np.asfortranarray(v) if v.ndim > 1 else v for k, v in reversed(arrays.items())})
    assert sha256_file(tmp_path / "a.npz") == sha256_file(tmp_path / "b.npz")
    back = load_npz(tmp_path / "a.npz")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_npz_refuses_objects_and_damage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        save_npz(tmp_path / "a.npz", {"x": np.array([{}, None])})
    assert names(tmp_path) == []
    with pytest.raises(BundleError, match=r"a\.npz: no such file"):
        load_npz(tmp_path / "a.npz")
    for content in (b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(BundleError, match=r"a\.npz: not a readable npz"):
            load_npz(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(1000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[60] ^= 0xFF  # of the deflated data: zlib says so before the archive's own checksum does
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"a\.npz: not a readable npz of plain arrays \(Error -3 while decompressing"):
        load_npz(tmp_path / "a.npz")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(BundleError, match=r"plain\.npy: not a readable npz"):
        load_npz(tmp_path / "plain.npy")


def test_canonical_json() -> None:
    data = {"b": np.float64(0.1), "a": np.arange(2), "c": (1, None, True)}
    text = '{\n  "a": [\n    0,\n    1\n  ],\n  "b": 0.1,\n  "c": [\n    1,\n    null,\n    true\n  ]\n}\n'
    assert canonical_json(data) == text
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})
    with pytest.raises(TypeError, match="PosixPath has no place"):
        canonical_json({"x": Path("/home/someone")})
