"""Files that are whole or absent, and whose bytes depend on their content alone: atomic writes, hashes, JSON, npz.

    .NAME.lock             held (flock) while a process writes NAME; names its process id
    .NAME.partial-PID      what is being written; renamed to NAME when complete
    .NAME.old-PID          the former NAME, for the instant between the two renames of a replacement

A killed run leaves these behind with a free lock; the next writer in the same folder puts an .old- back if its NAME is
missing and deletes the rest. Nothing is ever deleted that has no lock file of ours.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.errors import BundleError, QncdError

_LOCK_WORDS = "qncd-deploy: written by process "
_FULL = {errno.ENOSPC, errno.EDQUOT}
_SPARE_BYTES = 1 << 16  # a disk with less is full: some libraries lose errno on a short write


@contextmanager
def atomic_directory(target: Path, *, force: bool = False, marker: str = "manifest.json") -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` when the block ends without an error.

    An existing `target` stays whole until then. It is replaced only with `force`, and only if it is empty or holds
    `marker`, so that a mistyped name cannot erase a folder of the user's. On an error or Ctrl-C nothing remains.

    Raises: BundleError if another process writes `target`, if `target` may not be replaced, or if it cannot be written.
    """
    shown, target = target, Path(os.path.realpath(target))
    with _os_errors(shown):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
    with _exclusive(target, shown):
        _refuse_to_replace(target, shown, force=force, marker=marker)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            with _os_errors(shown):
                partial.mkdir()
            with _disk_full(shown, target.parent):
                yield partial
                _sync_tree(partial)
                _swap_in(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` whose file becomes `target` when the block ends without an error.

    Two processes may write one `target`: each writes its own file, and the last to finish wins.
    The yielded name has no suffix: pass the file format to libraries that read it off the name.

    Raises: BundleError if the folder cannot be written or the disk is full.
    """
    shown, target = target, Path(os.path.realpath(target))
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with _os_errors(shown):
        _sweep_files(target)
        lock = _open_locked(partial, blocking=True)
    assert lock is not None, "a blocking lock is got in the end"
    try:
        with _disk_full(shown, target.parent):
            yield partial
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)
        os.close(lock)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there. Raises BundleError if it cannot be made."""
    with _os_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def require_writable(folder: Path) -> None:
    """Find out now, before hours of work, whether files can be written in a folder. Raises BundleError."""
    with _os_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Keep other processes from using a folder, there or not yet, while the block runs.

    Raises: BundleError naming the process that uses it, or if its parent cannot be written.
    """
    shown, target = target, Path(os.path.realpath(target))
    with _os_errors(shown):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target, shown):
        yield


def canonical_json(data: Any) -> str:
    """JSON text that depends on the values alone: sorted keys, two-space indent, final newline, no NaN, no NumPy."""
    return json.dumps(data, sort_keys=True, indent=2, allow_nan=False, default=_plain) + "\n"


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as an npz whose bytes depend on names, dtypes, shapes and values alone; whole or not at all.

    Entries are sorted by name, stored without compression and dated 1980-01-01; memory order does not matter.
    """
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(arrays[name], order="C"), version=(1, 0), allow_pickle=False)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of an npz, read at once and without pickles. Raises BundleError if the file is missing or damaged."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise BundleError(f"{path}: not a readable npz of plain arrays ({exc}).") from exc


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in a JSON file of ours")


def _refuse_to_replace(target: Path, shown: Path, *, force: bool, marker: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise BundleError(f"{shown}: is a file, a folder was to be written. Move it or choose another name.")
    if any(target.iterdir()):
        if not (target / marker).is_file():
            raise BundleError(f"{shown}: holds files but no {marker}: not ours to replace. Choose another name.")
        if not force:
            raise BundleError(f"{shown}: exists already. Use --force to replace it, or choose another name.")


def _swap_in(partial: Path, target: Path) -> None:
    """Put the finished folder in place. The former one is complete under one of two names at every moment."""
    try:
        if target.is_dir():
            os.rename(target, target.with_name(f".{target.name}.old-{os.getpid()}"))
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        _settle(target)


def _settle(target: Path) -> None:
    """End a replacement, broken off or not: the former folder goes back if nothing took its place, or is deleted."""
    for old in _leftovers(target, "old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


@contextmanager
def _exclusive(target: Path, shown: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    with _os_errors(shown):
        lock = _open_locked(path, blocking=False)
        if lock is None:
            raise BundleError(
                f"{shown}: process {_owner(path) or '(unknown)'} is writing it. Wait for it, or choose another name."
            )
    try:
        with _os_errors(shown):
            os.ftruncate(lock, 0)
            os.write(lock, f"{_LOCK_WORDS}{os.getpid()}\n".encode())
        yield
    finally:
        if not _leftovers(target, "(?:partial|old)"):  # else the next writer sweeps: only lock files lead it there
            path.unlink(missing_ok=True)
        os.close(lock)


def _open_locked(path: Path, *, blocking: bool) -> int | None:
    """A descriptor of `path` (created if need be) that holds its flock, or None if another holds it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if blocking else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass  # its former owner deleted it between our open and our lock: start over with a new file
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _owner(lock: Path) -> str | None:
    """The process id in a lock file of ours; None for any other file."""
    with suppress(OSError, UnicodeDecodeError):
        text = lock.read_text("utf-8")
        if text.startswith(_LOCK_WORDS):
            return text[len(_LOCK_WORDS) :].strip()
    return None


def _sweep(folder: Path) -> None:
    """Clean up after killed writers of folders in `folder`: those whose lock file is ours and is free."""
    for path in folder.glob(".*.lock"):
        if path.is_symlink() or _owner(path) is None or (lock := _open_locked(path, blocking=False)) is None:
            continue
        try:
            target = folder / path.name[1 : -len(".lock")]
            _settle(target)
            for partial in _leftovers(target, "partial"):
                shutil.rmtree(partial, ignore_errors=True)
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def _sweep_files(target: Path) -> None:
    """Delete what killed writers of one file left: partial files that nobody holds."""
    for path in _leftovers(target, "partial"):
        if path.is_file() and (lock := _open_locked(path, blocking=False)) is not None:
            path.unlink(missing_ok=True)
            os.close(lock)


def _leftovers(target: Path, kind: str) -> list[Path]:
    named = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\d+")
    return sorted(p for p in target.parent.iterdir() if named.fullmatch(p.name) and not p.is_symlink())


@contextmanager
def _os_errors(shown: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise BundleError(f"{shown}: cannot be written: {exc.strerror or exc}.") from exc


@contextmanager
def _disk_full(shown: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except QncdError:
        raise
    except Exception as exc:
        if getattr(exc, "errno", None) in _FULL or shutil.disk_usage(folder).free < _SPARE_BYTES:
            message = f"{shown}: disk full while writing: nothing was changed. Free some space and run again."
            raise BundleError(message) from exc
        raise


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
