"""Engines on disk: taken when they are whole and for this graph, version and GPU; refused in one line otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qncd_deploy.engines.base import Kernel
from qncd_deploy.engines.stored import move_stored
from qncd_deploy.engines.trt.build import BuiltEngine
from qncd_deploy.engines.trt.device import Device
from qncd_deploy.engines.trt.kernels import Demands, KernelTable
from qncd_deploy.engines.trt.library import Library
from qncd_deploy.engines.trt.options import BuildOptions
from qncd_deploy.engines.trt.store import EngineFacts, held_engine, load_engine, save_engine
from qncd_deploy.errors import EngineError

SOURCE = "ab" * 32
TABLE = KernelTable((Kernel("Convolution", "i8", "tactic", 3),), 4, ("out.weight (f16 x f16)",), ("k",), 2, 1)
FULL, RTX = Library("tensorrt", None, (10, 3, 0)), Library("tensorrt-rtx", None, (1, 7, 1, 116))
L4 = Device("NVIDIA L4", "sm89", 24 << 30, "12.8")
OPTIONS = BuildOptions(({"x": (2, 4, 8, 8), "t": ()},), level=4)


def stored(path: Path, library: Library = FULL, device: Device | None = L4, **options: object) -> Path:
    asked = replace(OPTIONS, **options)  # type: ignore[arg-type]
    facts = EngineFacts.of(library, device, asked, source=SOURCE)
    # what memory made of the options at last is not what it is looked up by
    save_engine(path, BuiltEngine(b"plan" * 100, replace(asked, level=1), Demands((), ()), TABLE), facts)
    return path


def test_an_engine_and_its_table_come_back(tmp_path: Path) -> None:
    path = stored(tmp_path / "deep/net.engine")
    plan, facts = load_engine(path, FULL, L4, source=SOURCE)
    assert plan == b"plan" * 100 and facts.table == TABLE
    assert facts.profiles == ({"x": (2, 4, 8, 8), "t": ()},) and facts.stem == "10.3.0-sm89"
    assert (facts.device, facts.targets, facts.level) == ("NVIDIA L4", ("sm89",), 4)


def test_what_is_held_is_not_built_again_unless_anything_changed(tmp_path: Path) -> None:
    path = stored(tmp_path / "net.engine")
    wanted = EngineFacts.of(FULL, L4, OPTIONS, source=SOURCE)
    held = held_engine(path, wanted)
    assert held is not None and held.table == TABLE
    for other in (
        replace(wanted, source="cd" * 32),
        replace(wanted, version="10.3.1"),
        replace(wanted, device="NVIDIA L40"),
        replace(wanted, level=None),
        replace(wanted, profiles=({"x": (4, 4, 8, 8), "t": ()},)),
    ):
        assert held_engine(path, other) is None
    assert held_engine(tmp_path / "none.engine", wanted) is None


def test_an_engine_moves_with_what_lies_beside_it_and_says_something_new(tmp_path: Path) -> None:
    path, target = stored(tmp_path / "aside/net.engine"), tmp_path / "net.engine"
    path.with_suffix(".cache").write_bytes(b"compiled")
    wanted = EngineFacts.of(FULL, L4, OPTIONS, source=SOURCE)
    for place, why in ((path, "--no-check"), (target, None)):
        held = held_engine(place, wanted)
        assert held is not None
        move_stored(place, target, replace(held, unchecked=why))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["net.cache", "net.engine", "net.json"]
        plan, facts = load_engine(target, FULL, L4, source=SOURCE)
        assert (plan, facts.unchecked, facts.table) == (b"plan" * 100, why, TABLE)


def test_engines_of_before_that_was_said_were_checked(tmp_path: Path) -> None:
    path = stored(tmp_path / "net.engine")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts.pop("unchecked") is None
    path.with_suffix(".json").write_text(json.dumps(facts))
    assert load_engine(path, FULL, L4, source=SOURCE)[1].unchecked is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def facts_become(change: dict[str, object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        facts = path.with_suffix(".json")
        facts.write_text(json.dumps({**json.loads(facts.read_text()), **change}))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "changed on disk (sha256 "),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "changed on disk (sha256 "),
        (lambda path: path.write_bytes(b"of another program"), "changed on disk (sha256 "),
        (lambda path: path.with_suffix(".json").unlink(), "not a compiled blob with its .json beside it ("),
        (lambda path: path.with_suffix(".json").write_text("{"), "not a compiled blob with its .json beside it ("),
        (facts_become({"schema": 9}), "blob schema 9, this version reads 1"),
        (facts_become({"kernels": []}), "not a compiled blob with its .json beside it ("),
        (facts_become({"source": "ef" * 32}), "made from another graph (sha256 efefefefefef..., not abababababab...)"),
        (facts_become({"version": "10.7.0"}), "built with version 10.7.0, this is 10.3.0"),
        (facts_become({"backend": "tensorrt-rtx"}), "an engine of tensorrt-rtx, not of tensorrt"),
    ],
)
def test_what_is_not_whole_or_not_for_this_is_refused(
    spoil: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    path = stored(tmp_path / "net.engine")
    spoil(path)
    with pytest.raises(EngineError) as caught:
        load_engine(path, FULL, L4, source=SOURCE)
    message = str(caught.value)
    assert message.startswith(f"{path}: {words}") and message.endswith(" Run `qncd build` again here.")
    assert "\n" not in message


def refusal(path: Path, library: Library, device: Device) -> str | None:
    try:
        load_engine(path, library, device, source=SOURCE)
    except EngineError as exc:
        return str(exc).partition(": ")[2]
    return None


def test_an_engine_runs_on_the_gpu_it_was_built_on(tmp_path: Path) -> None:
    path = stored(tmp_path / "net.engine")
    words = "built for NVIDIA L4 (sm89), this GPU is {} ({}). Run `qncd build` again here."
    for other in (replace(L4, name="NVIDIA L40"), replace(L4, name="NVIDIA A10", sm="sm86")):
        assert refusal(path, FULL, other) == words.format(other.name, other.sm)


def test_what_hardware_compatibility_buys(tmp_path: Path) -> None:
    a10, t4, l40 = (replace(L4, name=name, sm=sm) for name, sm in (("A10", "sm86"), ("T4", "sm75"), ("L40", "sm89")))
    wide = stored(tmp_path / "wide.engine", hardware="ampere-plus")
    same = stored(tmp_path / "same.engine", hardware="same-compute-capability")
    assert [refusal(wide, FULL, gpu) is None for gpu in (L4, l40, a10, t4)] == [True, True, True, False]
    assert [refusal(same, FULL, gpu) is None for gpu in (L4, l40, a10, t4)] == [True, True, False, False]


def test_what_version_compatibility_buys(tmp_path: Path) -> None:
    path = stored(tmp_path / "net.engine", version_compatible=True)
    newer, older = replace(FULL, version=(10, 7, 0)), replace(FULL, version=(10, 2, 0))
    assert refusal(path, newer, L4) is None
    assert refusal(path, older, L4) == "built with version 10.3.0, this is 10.2.0. Run `qncd build` again here."
    assert refusal(stored(tmp_path / "strict.engine"), newer, L4) is not None


def test_ahead_of_time_it_is_for_the_capabilities_named(tmp_path: Path) -> None:
    path = stored(tmp_path / "net.engine", RTX, None, targets=("sm86", "sm89"))
    assert refusal(path, RTX, L4) is None
    assert refusal(path, RTX, replace(L4, name="RTX 5090", sm="sm120")) == (
        "built for sm86, sm89, this GPU is RTX 5090 (sm120). Run `qncd build` again here."
    )
    assert (
        EngineFacts.of(RTX, None, replace(OPTIONS, targets=("sm86", "sm89")), source="").stem == "1.7.1.116-sm86+sm89"
    )
