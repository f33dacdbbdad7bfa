"""qncd eval as a user meets it: figures, gates, reports, and evaluations that are killed and go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cli_helpers import command, contents, environment, qncd  # noqa: E402
from onnx import parser  # noqa: E402
from test_evaluate_compare import with_features  # noqa: E402
from test_runtime import FACTS, write_bundle  # noqa: E402

from qncd_deploy.bundle import read_manifest, write_manifest  # noqa: E402
from qncd_deploy.correct.record import CorrectionTable, StepFix, save_tables  # noqa: E402
from qncd_deploy.errors import BundleError  # noqa: E402
from qncd_deploy.evaluate.contest import Contest  # noqa: E402
from qncd_deploy.runtime import Bundle, Sampling  # noqa: E402

BACKEND = ("--backend", "onnxruntime", "--threads", 1)
SMALL = (*BACKEND, "-n", 6, "--batch-size", 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a correction "dns" that changes nothing, a "ptqd" that does, and the former as auto's choice."""
    folder = with_features(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8"))
    return with_tables(folder)


def with_tables(folder: Path) -> Path:
    opened = Bundle.open(folder)
    with opened.sampler("onnxruntime", correction="off") as sampler:
        key = sampler.table.key
    tables = [
        CorrectionTable("dns", key, (StepFix(),) * 4),
        CorrectionTable("ptqd", key, (StepFix(b=np.full(8, 0.1)),) * 4),
        CorrectionTable("tac", replace(key, eta=1.0), (StepFix(),) * 4),
    ]
    save_tables(folder / "corrections.npz", tables, auto={key.id: "dns"})
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, roles={**manifest.roles, "corrections": "corrections.npz"}))
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(bundle: Path, *args: object) -> dict[str, Any]:
    done = qncd("eval", bundle, *SMALL, *args, "--json")
    assert done.code == 0, done.err
    facts: dict[str, Any] = json.loads(done.out)
    return facts


def test_by_default_auto_and_off_stand_beside_the_float_twin(bundle: Path, home: Path) -> None:
    done = qncd("eval", bundle, *SMALL, "--seed", 3, "--first", 10)
    assert done.code == 0, done.err
    title = "6 pictures of 32 x 32 pixels (height x width) from 10 on, seed 3, 4 network calls"
    for words in (title, "float", "auto", "off", "dns", "PSNR dB", "shift"):
        assert words in done.out
    assert "±" in done.out and "LPIPS" not in done.out and "sFID" not in done.out
    assert not [path for path in home.rglob("*") if path.is_file()]  # nothing is left of a finished evaluation
    facts = evaluated(bundle, "--seed", 3, "--first", 10)
    auto, off = facts["variants"]
    assert (auto["name"], auto["correction"], off["correction"]) == ("auto", "dns", "off")
    assert auto["psnr"] == off["psnr"] and auto["psnr"]["n"] == 6 and auto["first"] == 10
    assert (facts["n_steps"], facts["guidance_scale"], facts["pictures"]) == (4, 1.5, 6)
    assert facts["reference"]["fid"]["low"] < facts["reference"]["fid"]["high"]


def test_all_is_what_was_fitted_for_this_way_to_sample(bundle: Path, home: Path) -> None:
    facts = evaluated(bundle, "--correction", "ptqd", "--correction", "all")
    assert [each["name"] for each in facts["variants"]] == ["ptqd", "auto", "off", "dns"]  # tac was for another eta
    ptqd, _, off, dns = facts["variants"]
    assert ptqd["psnr"] != off["psnr"] and ptqd["latent_mean_error"] != off["latent_mean_error"]
    assert dns["psnr"] == off["psnr"]


def test_results_that_cannot_be_written_cost_no_pictures(
    bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "report").write_text("a file")
    done = qncd("eval", bundle, *SMALL, "-o", "report")
    assert done.code == 2 and "report: neither a .json file nor a folder" in done.line
    assert not (home / "engines").exists()
    (home / "report").unlink()

    def full(*args: object, **more: object) -> None:
        raise BundleError("report: disk full")

    with monkeypatch.context() as patched:
        patched.setattr("qncd_deploy.cli.eval.write_results", full)
        assert qncd("eval", bundle, *SMALL, "-o", "report").line == "qncd: report: disk full"
    held = list((home / "engines/net-w8a8/eval").rglob("*.npz"))
    assert len(held) == 6  # three batches of the float twin and of auto, which here is the same as off
    assert qncd("eval", bundle, *SMALL, "-o", "report").code == 0
    assert not (home / "engines/net-w8a8/eval").exists()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_correction_that_diverges_does_not_keep_the_others_from_being_measured(
    bundle: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = Bundle.open(bundle).key(Sampling(), "onnxruntime-f32")
    shelf = home / "engines/net-w8a8"
    shelf.mkdir(parents=True)
    wild = CorrectionTable("map", key, (StepFix(b=np.full(8, 1e38)),) * 4)
    save_tables(shelf / "corrections-onnxruntime-f32.npz", [wild], auto={})
    words = "onnxruntime-f32 with correction map gave latents that are not finite. Try another --correction"
    done = qncd("eval", bundle, *SMALL, "--correction", "map", "--correction", "all", "-o", "report", "--json")
    assert done.code == 0, done.err
    diverged, *others = json.loads(done.out)["variants"]
    assert words in diverged["diverged"] and diverged["psnr"] is None and diverged["latent_snr_db"] == []
    assert [each["name"] for each in others] == ["auto", "off", "dns", "ptqd"]
    assert all(each["diverged"] is None and each["psnr"]["n"] == 6 for each in others)
    assert [record.getMessage() for record in caplog.records if words in record.getMessage()]
    table = qncd("eval", bundle, *SMALL, "--correction", "map", "--correction", "off", "--require-psnr", 1)
    assert table.code == 3 and "correction map diverged" in table.line
    assert "diverged" in table.out
    alone = qncd("eval", bundle, *SMALL, "--correction", "map")
    assert alone.code == 1 and words in alone.line


def test_options_reach_the_sampler(bundle: Path, home: Path) -> None:
    way = ("--n-steps", 3, "--scheduler", "euler", "--guidance-scale", 1, "--class-label", "2", "--correction", "off")
    facts = evaluated(bundle, *way)
    assert (facts["scheduler"], facts["n_steps"], facts["guidance_scale"], facts["labels"]) == ("euler", 3, 1, [2])
    assert facts["variants"][0]["calls"] == 3
    assert facts["variants"][0]["psnr"] != evaluated(bundle, *way[:6], "--correction", "off")["variants"][0]["psnr"]


def test_reports(bundle: Path, home: Path) -> None:
    assert qncd("eval", bundle, *SMALL, "-o", "quality.json").code == 0
    assert qncd("eval", bundle, *SMALL, "-o", "report").code == 0
    assert json.loads((home / "quality.json").read_text()) == json.loads((home / "report/eval.json").read_text())
    assert json.loads((home / "quality.json").read_text()) == evaluated(bundle)
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    assert (
        "ptqd" not in (home / "report/report.html").read_text() and "auto" in (home / "report/report.html").read_text()
    )


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        (("--require-psnr", 5), 0),
        (("--require-psnr", 99), 3),
        (("--require-shift-below", 1e6), 0),
        (("--require-shift-below", 1e-9), 3),
    ],
)
def test_gates_are_about_the_first_correction(bundle: Path, home: Path, gate: tuple[str, float], code: int) -> None:
    done = qncd("eval", bundle, *SMALL, *gate, "--json")
    assert done.code == code
    assert json.loads(done.out)["variants"]
    if code:
        assert gate[0] in done.line and "correction auto has" in done.line


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--correction", "magic"], 2, "correction magic: expected auto, off or one of qncd, "),
        (["--correction", "map"], 1, "no table for correction 'map', it holds dns, ptqd, tac. Run `qncd fit"),
        (["--correction", "tac"], 1, "fitted for eta 1.0, asked for eta 0.0. Run `qncd fit"),
        (["--correction", "dns", "--n-steps", "5"], 1, "fitted for n_steps 4"),
        (["--class-label", "7"], 1, "class 7"),
        (["--features", "absent.onnx"], 1, "absent.onnx: no such graph"),
        (["--features-reference", "absent.npz"], 1, "absent.npz: no such file"),
        (["--ray-address", "10.0.0.1:6379"], 2, "--workers ray"),
        (["-o", "quality.html"], 2, "neither a .json file nor a folder"),
        (["-o", "no/such/quality.json"], 1, "the folder no/such does not exist"),
        (["-o", "/proc/quality.json"], 1, "/proc: cannot be written"),
        (["-o", "/proc/quality"], 1, "/proc: cannot be written"),
        (["-o", "/proc"], 1, "/proc: cannot be written"),
        (["--data", "absent.npz", "--n-steps", "3"], 2, "--n-steps: nothing is sampled with --data"),
        (["--data", "absent.npz", "--require-psnr", "3"], 2, "--require-psnr: nothing is sampled with --data"),
        (["--data", "absent.npz"], 1, "absent.npz: no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    bundle: Path, home: Path, args: list[str], code: int, words: str
) -> None:
    done = qncd("eval", bundle, *BACKEND, *args)
    assert done.code == code, done.err
    assert words in done.line and done.out == ""
    assert not [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize("args", [["-n", "1"], ["--first", "-1"], ["--workers", "dask"], ["--require-psnr", "high"]])
def test_wrong_usage_is_exit_code_2(bundle: Path, args: list[str]) -> None:
    assert qncd("eval", bundle, *args).code == 2


def test_a_feature_network_of_other_pictures_is_refused_before_anything_is_sampled(bundle: Path, home: Path) -> None:
    for name, text, words in (
        ("wide", "n (float[n,3,8,8] i) => (float[n,3,8,8] features)", "takes pictures of 3x8x8, these are 1x32x32"),
        ("bare", "n (float[n,1,32,32] i) => (float[n,1,32,32] out)", "not a feature network"),
    ):
        output = text.rpartition("] ")[2].rstrip(")")
        graph = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text} {{ {output} = Relu(i) }}')
        onnx.save(graph, home / f"{name}.onnx")
        done = qncd("eval", bundle, *SMALL, "--features", f"{name}.onnx")
        assert done.code == 1 and f"{name}.onnx" in done.line and words in done.line
    (home / "none.onnx").write_bytes(b"no graph")
    done = qncd("eval", bundle, *SMALL, "--features", "none.onnx")
    assert done.code == 1 and "none.onnx" in done.line
    np.savez(home / "short.npz", features=np.eye(5))
    done = qncd("eval", bundle, *SMALL, "--features-reference", "short.npz")
    assert done.code == 1 and "short.npz: made with a network of 5 features, this one has 128" in done.line


def test_real_features_give_precision_and_recall_to_the_data(bundle: Path, home: Path) -> None:
    np.savez(home / "real.npz", features=100 + np.random.default_rng(0).standard_normal((40, 128)))
    facts = evaluated(bundle, "--features-reference", "real.npz", "--correction", "off")
    assert facts["reference"]["data_precision"]["value"] == 0  # noise is far from every picture
    assert facts["variants"][0]["data_recall"]["n"] == 40
    own = evaluated(bundle, "--correction", "off")
    assert own["reference"]["data_precision"] is None  # the bundle's reference has no pictures
    assert own["reference"]["fid"] != facts["reference"]["fid"]


def test_the_page_says_how_auto_chose_for_this_way_to_sample(bundle: Path, home: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    opened = Bundle.open(bundle)
    key = opened.key(Sampling(n_steps=3), "onnxruntime-f32")
    contest = Contest(
        choice="off",
        objective="shift",
        pictures=8,
        confidence=0.95,
        figures={"off": 0.5, "tac": 0.4},
        screened={"off": 0.5, "tac": 0.4},
        best="tac",
        wins=0.6,
    )
    shelf = home / "engines/net-w8a8"
    shelf.mkdir(parents=True)
    save_tables(
        shelf / "corrections-onnxruntime-f32.npz",
        [CorrectionTable("tac", key, (StepFix(),) * 3)],
        auto={key.id: "off"},
        contests={key.id: contest.to_json()},
    )
    for steps, shown in ((3, True), (2, False)):
        way = ("--n-steps", steps, "--correction", "off", "-o", f"report-{steps}")
        assert qncd("eval", bundle, *SMALL, *way).code == 0
        page = (home / f"report-{steps}/report.html").read_text()
        assert ("onnxruntime-f32: no correction" in page) == shown


def test_tables_of_another_bundle_are_not_mixed_in(bundle: Path, home: Path) -> None:
    other = with_tables(write_other(home))
    shelf = home / "engines/net-w8a8"
    shelf.mkdir(parents=True)
    shutil.copy(other / "corrections.npz", shelf / "corrections-onnxruntime-f32.npz")
    (bundle_without := home / "net-w8a8").mkdir()
    for path in bundle.iterdir():
        shutil.copy(path, bundle_without / path.name)
    manifest = read_manifest(bundle_without)
    roles = {role: name for role, name in manifest.roles.items() if role != "corrections"}
    (bundle_without / "corrections.npz").unlink()
    write_manifest(bundle_without, replace(manifest, roles=roles))
    assert evaluated(bundle_without)["variants"][0]["correction"] == "off"
    assert [each["name"] for each in evaluated(bundle_without, "--correction", "all")["variants"]] == ["auto", "off"]
    done = qncd("eval", bundle_without, *SMALL, "--correction", "dns")
    assert done.code == 1 and "dns" in done.line and "qncd fit" in done.line


def write_other(home: Path) -> Path:
    """A bundle of another plan."""
    folder = write_bundle(home / "other-w8a8")
    (folder / "plan.json").write_text(json.dumps({"schema": 1, "format": "w8a8", "layers": [], "note": "another"}))
    write_manifest(folder, read_manifest(folder))
    return folder


def test_a_killed_evaluation_goes_on_to_the_same_figures(bundle: Path, home: Path) -> None:
    args = ("eval", bundle, *BACKEND, "-n", 96, "--batch-size", 2, "--correction", "off", "--json")
    running = subprocess.Popen(
        command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    work = home / "engines/net-w8a8/eval"
    deadline = time.monotonic() + 120
    while len(list(work.rglob("*.npz"))) < 56 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.poll() is None, running.stderr.read() if running.stderr else ""
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    held = {path: path.stat().st_mtime_ns for path in work.rglob("*.npz") if not path.name.startswith(".")}
    assert 56 <= len(held) < 96
    resumed = qncd(*args, "--keep")
    assert resumed.code == 0, resumed.err
    assert all(path.stat().st_mtime_ns == time for path, time in held.items())  # none was drawn again
    assert len(list(work.rglob("*.npz"))) == 96
    assert not [name for name in contents(home) if "partial" in name or "lock" in name]
    assert qncd(*args, "--work", home / "fresh").out == resumed.out


def test_what_was_kept_serves_a_larger_evaluation(bundle: Path, home: Path) -> None:
    evaluated(bundle, "--keep")
    held = {path: path.stat().st_mtime_ns for path in (home / "engines").rglob("*.npz")}
    larger = evaluated(bundle, "-n", 10, "--keep", "--correction", "ptqd")
    assert all(path.stat().st_mtime_ns == time for path, time in held.items())
    assert larger == evaluated(bundle, "-n", 10, "--correction", "ptqd", "--work", home / "fresh")


def test_a_bundle_without_a_schedule_is_evaluated_on_its_data(home: Path) -> None:
    facts = replace(FACTS, schedule=None, sampler=None, guidance_scale=1.0, condition=None)
    bundle = write_bundle(home / "own-w8a8", facts)
    done = qncd("eval", bundle, *BACKEND)
    assert done.code == 2 and "no noise schedule" in done.line and "--data FILE.npz" in done.line
    rng = np.random.default_rng(0)
    np.savez(
        home / "in.npz", x=rng.standard_normal((9, 8, 16, 16)), t=np.arange(9.0), c=rng.standard_normal((9, 1, 12))
    )
    done = qncd("eval", bundle, *BACKEND, "--data", "in.npz", "-o", "data.json")
    assert done.code == 0, done.err
    assert "output SQNR" in done.out and "9 rows; the worst is row" in done.out
    found = json.loads((home / "data.json").read_text())
    assert found == json.loads(qncd("eval", bundle, *BACKEND, "--data", "in.npz", "--json").out)
    assert len(found["row_sqnr_db"]) == 9 and found["data"] == "in.npz"
