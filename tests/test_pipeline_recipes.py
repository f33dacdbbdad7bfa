"""Recipes: each makes a valid export, what is given beside one wins, and `qncd inspect --recipe` shows it all."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import qncd

for library in ("torch", "onnx_ir", "diffusers"):
    pytest.importorskip(library, reason=f"exporting needs {library}")

from qncd_deploy.errors import UsageError  # noqa: E402
from qncd_deploy.pipeline import dry_run  # noqa: E402
from qncd_deploy.pipeline.export import _recipe  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.pipeline.quantize import policy_of  # noqa: E402
from qncd_deploy.pipeline.recipes import RECIPES  # noqa: E402
from qncd_deploy.schedule import Schedule, betas_of  # noqa: E402
from qncd_deploy.steps import SamplerConfig, make_steps  # noqa: E402

NO_FLAG = {"gate"}
"""Options that only studies set."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command line asks of the library, which does nothing here."""
    seen: list[ExportOptions] = []

    def refuse(options: ExportOptions) -> None:
        seen.append(options)
        raise UsageError("model.ckpt: seen.")

    def run(*args: object) -> ExportOptions:
        done = qncd("export", "model.ckpt", *args, "--dry-run")
        assert done.line.endswith("model.ckpt: seen."), done.err
        return seen.pop()

    monkeypatch.setattr(dry_run, "dry_run", refuse)
    return run


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_export_and_says_where_its_values_were_read(name: str) -> None:
    recipe, known = RECIPES[name], {field.name for field in fields(ExportOptions)}
    assert recipe.name == name and recipe.apart and set(recipe.options) <= known
    assert len(recipe.options) == len(recipe.settings), "an option is set twice"
    assert all(setting.source for setting in recipe.settings)
    options = ExportOptions(Path("model.ckpt"), recipe=name, **recipe.options)
    if options.scheduler is not None:
        betas = betas_of("scaled_linear", 0.00085, 0.012, 1000)
        schedule = Schedule.from_betas(betas, timestep_spacing=options.timestep_spacing or "leading")
        make_steps(schedule, SamplerConfig(options.scheduler, options.n_steps, options.eta))
    flags = qncd("export", "--help").out
    assert all(setting.flag in flags for setting in recipe.settings if setting.option not in NO_FLAG)
    assert _recipe(options)["--recipe"] == name


def test_the_published_numbers() -> None:
    """Read once more from the papers' scripts, by hand."""
    cifar, ptqd, sd = (RECIPES[name].options for name in ("qdiffusion-cifar", "ptqd-ldm4", "qdiffusion-sd"))
    grid = {int(s) for s in np.linspace(0, np.sqrt(800), 100) ** 2}  # --timesteps 100 --skip_type quad
    assert len(grid) == cifar["n_steps"]
    assert cifar["calib_size"] * cifar["calib_steps"] == 5120  # 256 at each of 20 steps
    assert 1024 <= 2 * ptqd["calib_size"] * ptqd["calib_steps"] < 1024 + 2 * ptqd["calib_steps"]
    assert sd["calib_size"] * sd["calib_steps"] == 3200 and sd["guidance_scale"] == 7.5
    for name, method in {"qdiffusion-cifar": "minmax", "qdiffusion-sd": "lp2.4", "qncd-sd": "mse"}.items():
        options = ExportOptions(Path("model.ckpt"), **RECIPES[name].options)
        assert policy_of(options).weight_method == method


def test_a_recipe_sets_and_what_is_given_beside_it_wins(asked: Any) -> None:
    plain = asked("--recipe", "ptqd-ldm4")
    assert (plain.recipe, plain.format, plain.n_steps, plain.guidance_scale) == ("ptqd-ldm4", "w4a8", 20, 3.0)
    assert (plain.correction, plain.exclude, plain.keep_float) == ("ptqd:paper", ("conv_shortcut", "downsamplers"), 0)
    changed = asked("--recipe", "ptqd-ldm4", "--int8", "--n-steps", "50", "--exclude", "attn2", "--smooth", "qncd")
    assert (changed.format, changed.n_steps, changed.exclude, changed.smooth) == ("w8a8", 50, ("attn2",), "qncd")
    assert changed.correction == "ptqd:paper"
    same = asked("--recipe", "ptqd-ldm4", "--format", "w8a8", "--keep-float", "2.0")  # the defaults, but asked for
    assert (same.format, same.keep_float) == ("w8a8", 2.0)
    assert not asked("--recipe", "qncd-sd").gate and asked().gate and asked().recipe is None


@pytest.mark.parametrize("name", RECIPES)
def test_inspect_shows_what_a_recipe_sets(name: str) -> None:
    text = " ".join(qncd("inspect", "--recipe", name).out.split())  # lines are folded
    recipe = RECIPES[name]
    assert all(setting.flag in text and setting.source.split()[0] in text for setting in recipe.settings)
    assert all(line.split()[0] in text for line in recipe.apart)
    told = json.loads(qncd("inspect", "--recipe", name, "--json").out)
    assert [setting["option"] for setting in told["settings"]] == list(recipe.options)


def test_unknown_recipes_and_two_questions_at_once_are_refused(tmp_path: Path) -> None:
    assert "qdiffusion-cifar" in qncd("export", "model.ckpt", "--recipe", "tdq").err
    assert qncd("inspect").code == qncd("inspect", tmp_path, "--recipe", "qncd-sd").code == 2
    with pytest.raises(UsageError, match="--recipe tdq: expected one of qncd-ldm4"):
        ExportOptions(Path("model.ckpt"), recipe="tdq")
