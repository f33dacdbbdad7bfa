"""Correction rows and their file: round trip, deterministic bytes, refusals that say what differs and what to run."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qncd_deploy.correct.record import (
    CorrectionTable,
    ScheduleKey,
    StepFix,
    fixed_steps,
    identity_table,
    load_tables,
    save_tables,
)
from qncd_deploy.errors import BundleError, ScheduleError
from qncd_deploy.files import save_npz
from qncd_deploy.schedule import Schedule
from qncd_deploy.steps import SamplerConfig, make_steps

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)


def key_of(scheduler="ddim", n_steps=20, eta=0.0, schedule=SCHEDULE, **other):
    facts = {"guidance_scale": 1.5, "backend": "openvino-f32", "plan_sha": "ab" * 32} | other
    return ScheduleKey.of(schedule, SamplerConfig(scheduler, n_steps, eta), **facts)


def same_row(left: StepFix, right: StepFix) -> bool:
    return all(np.array_equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(StepFix))


numbers = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(0, 1e3)


def arrays(*shape):
    return hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))


rows = st.builds(
    StepFix,
    t_model=st.none() | st.floats(0, 999),
    abar=st.none() | st.floats(0.01, 0.99),
    x_add=numbers | arrays(2) | arrays(2, 3, 3),
    a=numbers | arrays(2) | arrays(2, 2),
    b=numbers | arrays(2) | arrays(2, 3, 3),
    f=st.none() | arrays(2, 4, 3, 3),
    thr=positive,
    var=positive,
    z_std=positive,
    gain=numbers,
    x_mul=numbers,
    x_sub=numbers | arrays(2),
    refresh=st.booleans(),
    m_ref=numbers | arrays(2),
    m_pool=st.sampled_from(["batch", "sample-channel"]),
    m_gain=st.floats(0, 1),
    coef=st.sampled_from(["s", "s_eff"]),
    mask=st.sampled_from(["two-sided", "one-sided"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fixes=st.lists(rows, min_size=4, max_size=4))
def test_a_table_survives_the_file(tmp_path, fixes):
    key = key_of(n_steps=4, eta=0.3)
    path = tmp_path / "corrections.npz"
    save_tables(path, [CorrectionTable("qncd", key, tuple(fixes), {"psnr": 41.5})], auto={key.id: "qncd"})
    table = load_tables(path).find("qncd", key)
    assert table.key == key
    assert table.info == {"psnr": 41.5}
    assert all(same_row(old, new) for old, new in zip(fixes, table.fixes, strict=True))


def test_bytes_depend_on_the_tables_alone(tmp_path):
    tables = [
        CorrectionTable(m, key_of(n_steps=n), tuple(StepFix(a=np.full(4, n)) for _ in range(n)))
        for m in ("ptqd", "qncd")
        for n in (3, 5)
    ]
    auto = {key_of(n_steps=3).id: "qncd", key_of(n_steps=5).id: "off"}
    save_tables(tmp_path / "one.npz", tables, auto=auto)
    save_tables(tmp_path / "two.npz", tables[::-1], auto=dict(reversed(auto.items())))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_how_auto_chose_is_kept_and_may_be_missing(tmp_path):
    keys = key_of(n_steps=3, backend="onnxruntime-f32"), key_of(n_steps=5)
    tables = [CorrectionTable(m, key, identity_table(key).fixes) for key in keys for m in ("qncd", "ptqd")]
    contests = {keys[0].id: {"choice": "off", "figures": {"off": 0.5, "qncd": None}}}
    save_tables(tmp_path / "c.npz", tables, auto={}, contests=contests)
    held = load_tables(tmp_path / "c.npz")
    assert held.contests == contests
    assert held.keys == keys  # by engine, each once
    arrays = dict(np.load(tmp_path / "c.npz"))
    meta = json.loads(arrays["meta"].tobytes())
    del meta["contests"]
    np.savez(tmp_path / "old.npz", **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
    assert load_tables(tmp_path / "old.npz").contests == {}


def test_off_and_the_choice_of_auto(tmp_path):
    key = key_of("plms", 5)
    save_tables(tmp_path / "c.npz", [CorrectionTable("qncd", key, identity_table(key).fixes)], auto={key.id: "qncd"})
    tables = load_tables(tmp_path / "c.npz")
    assert tables.choice(key) == "qncd"
    assert tables.choice(key_of("ddim", 5)) is None
    assert [same_row(f, StepFix()) for f in tables.find("off", key_of(n_steps=7)).fixes] == [True] * 7
    assert len(identity_table(key).fixes) == 6  # PLMS makes one call more than it has steps
    assert key.n_steps == 5


def test_another_schedule_is_refused_with_the_difference_and_the_command(tmp_path):
    path = tmp_path / "fashion-ldm-w8a8" / "corrections.npz"
    path.parent.mkdir()
    fitted = key_of()
    save_tables(path, [CorrectionTable("qncd", fitted, identity_table(fitted).fixes)], auto={})
    tables = load_tables(path)
    command = f"qncd fit {path.parent} --backend {{}} --scheduler {{}} --n-steps {{}}{{}}"
    command += " --guidance-scale {} --remainder {}"
    cases = [
        (
            key_of(n_steps=50),
            "correction 'qncd' was fitted for n_steps 20 (t = 951 .. 1), asked for n_steps 50 (t = 981 .. 1)",
            command.format("openvino", "ddim", 50, " --eta 0", "1.5", "f32"),
        ),
        (
            key_of(guidance_scale=3.0),
            "fitted for guidance scale 1.5, asked for guidance scale 3.0",
            command.format("openvino", "ddim", 20, " --eta 0", "3", "f32"),
        ),
        (
            key_of(backend="tensorrt-f16"),
            "fitted for backend openvino-f32, asked for backend tensorrt-f16",
            command.format("tensorrt", "ddim", 20, " --eta 0", "1.5", "f16"),
        ),
        (
            key_of("plms"),
            "fitted for scheduler ddim, n_steps 20 (t = 951 .. 1), asked for scheduler plms, n_steps 20 (t = 951 .. 1)",
            command.format("openvino", "plms", 20, "", "1.5", "f32"),
        ),
        (
            key_of(eta=0.5),
            "fitted for eta 0.0, asked for eta 0.5",
            "--scheduler ddim --n-steps 20 --eta 0.5 --guidance-scale 1.5",
        ),
        (key_of(plan_sha="cd" * 32), "fitted for plan abababab, asked for plan cdcdcdcd", "qncd fit"),
        (key_of(schedule=replace(SCHEDULE, clip_sample=1.0)), "fitted for noise schedule", "qncd fit"),
    ]
    for asked, words, run in cases:
        with pytest.raises(ScheduleError) as refusal:
            tables.find("qncd", asked)
        assert words in str(refusal.value)
        assert run in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ScheduleError, match=r"no table for correction 'ptqd', it holds qncd\. Run `qncd fit"):
        tables.find("ptqd", fitted)


def test_the_nearest_table_explains_the_refusal(tmp_path):
    keys = [key_of("plms", 20, backend="onnxruntime"), key_of(n_steps=20)]
    path = tmp_path / "c.npz"
    save_tables(path, [CorrectionTable("qncd", k, identity_table(k).fixes) for k in keys], auto={})
    with pytest.raises(ScheduleError, match=r"fitted for n_steps 20 \(t = 951 .. 1\), asked for n_steps 10"):
        load_tables(path).find("qncd", key_of(n_steps=10))


def test_mismatch_is_none_only_for_the_same_key():
    assert key_of().mismatch(key_of()) is None
    # a difference beyond the digits that a message would round to is still one
    assert key_of(guidance_scale=1.5).mismatch(key_of(guidance_scale=1.5000000001))


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "c.npz"
    with pytest.raises(BundleError, match="no such file"):
        load_tables(path)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(BundleError, match=r"c\.npz"):
        load_tables(path)
    save_npz(path, {"a": np.zeros(3)})
    with pytest.raises(BundleError, match="not a corrections file"):
        load_tables(path)

    def rewrite(meta):
        save_npz(path, {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})

    rewrite({"schema": 99})
    with pytest.raises(BundleError, match="corrections of schema 99, this program reads schema 1"):
        load_tables(path)
    key = json.loads(json.dumps({f.name: getattr(key_of(n_steps=1), f.name) for f in fields(ScheduleKey)}))
    for entry in (
        {"method": "qncd", "key": key, "info": {}, "rows": [{"warp": 3}]},  # a field we do not know
        {"method": "qncd", "key": key, "info": {}, "rows": [{"a": {"array": "lost", "index": 0}}]},
        {"method": "qncd", "key": key, "info": {}, "rows": []},  # a row is missing
        {"method": "qncd", "key": key, "info": {}, "rows": [{"var": -1.0}]},
        {"method": "qncd", "key": {}, "info": {}, "rows": []},
    ):
        rewrite({"schema": 1, "auto": {}, "tables": [entry]})
        with pytest.raises(BundleError, match="damaged corrections"):
            load_tables(path)


def test_rows_are_checked_and_kept_narrow():
    with pytest.raises(ScheduleError, match="mask is 'three-sided', expected one of two-sided, one-sided"):
        StepFix(mask="three-sided")
    with pytest.raises(ScheduleError, match="var is -1"):
        StepFix(var=-1)
    row = StepFix(a=np.float64(1.5), b=np.zeros(4), m_ref=np.array(0.5))
    assert type(row.a) is float
    assert type(row.m_ref) is float
    assert row.b.dtype == np.float32


def test_fixed_steps_take_the_overrides():
    config = SamplerConfig("ddim", 4)
    fixes = [StepFix(), StepFix(abar=0.3), StepFix(abar_next=0.9), StepFix()]
    steps = fixed_steps(SCHEDULE, config, fixes)
    plain = make_steps(SCHEDULE, config)
    assert (steps[1].abar, steps[2].abar_next) == (0.3, 0.9)
    assert (steps[0], steps[3]) == (plain[0], plain[3])
