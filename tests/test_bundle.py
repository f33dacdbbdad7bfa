"""Manifests: what is written is read back, reproducibly, and whatever changed since is refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qncd_deploy.bundle import (
    ConditionFacts,
    Manifest,
    ModelFacts,
    TextFacts,
    check_files,
    file_problems,
    read_manifest,
    write_manifest,
)
from qncd_deploy.errors import BundleError
from qncd_deploy.specs import SIDES, TensorSpec

MODEL = ModelFacts(
    family="compvis-ldm",
    inputs=(TensorSpec("sample", "float32", ("batch", 4, 8, 8)), TensorSpec("timestep", "float32", ("batch",))),
    latent_shape=(4, 8, 8),
    image_shape=(1, 32, 32),
    schedule={"alphas_cumprod": [0.9, 0.5]},
    sampler={"scheduler": "ddim", "n_steps": 20, "eta": 0.0},
    guidance_scale=1.5,
    condition=ConditionFacts("class-tokens", 11, 10),
)
MANIFEST = Manifest(
    name="net",
    format="w8a8",
    model=MODEL,
    roles={"master": "unet.onnx", "plan": "plan.json"},
    inputs={"model.ckpt": "ab" * 32},
    recipe={"quant_level": np.float64(3), "exclude": ()},
    seed=0,
    versions={"onnx": "1.23"},
    quality={"psnr_db": np.float32(46.0)},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "net-w8a8"
    folder.mkdir()
    (folder / "unet.onnx").write_bytes(b"graph")
    (folder / "unet.onnx.data").write_bytes(bytes(1000))
    (folder / "plan.json").write_text("{}")
    write_manifest(folder, MANIFEST)
    return folder


def test_free_sides_are_those_of_the_latents() -> None:
    """What counts the numbers of a row, to run as many rows as memory holds, must not take them for one."""
    fixed = replace(MODEL, latent_shape=(4, 8, 12), inputs=(TensorSpec("sample", "float32", ("batch", 4, 8, 12)),))
    own = replace(fixed, inputs=(TensorSpec("sample", "float32", ("batch", 4, *SIDES)),))
    free = replace(own, size_multiple=16)
    assert free.sized_inputs == fixed.sized_inputs == fixed.inputs
    bare = replace(own, latent_shape=(3,), image_shape=None)  # a user's graph whose sides are free
    assert bare.sized_inputs == bare.inputs and bare.picture_shape is None is bare.sides
    assert replace(free, latent_shape=(4, 2, 2)).sized_inputs[0].shape == ("batch", 4, 2, 2)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_how_prompts_are_encoded_survives_the_round_trip(folder: Path) -> None:
    text = TextFacts(2, 77, time_ids=(64, 64, 0, 0, 64, 64), zero_null=True)
    model = replace(MODEL, condition=ConditionFacts("text", 33, 32), text=text)
    write_manifest(folder, replace(MANIFEST, model=model))
    assert read_manifest(folder).model == model
    assert text.roles == (("tokenizer", "text-encoder"), ("tokenizer-2", "text-encoder-2"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["model"]["text"]  # as bundles were written before there was text
    edit(folder, **manifest)
    assert read_manifest(folder).model.text is None


def test_a_manifest_survives_the_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.model == MODEL
    assert manifest.model.condition is not None
    assert manifest.model.condition.valid == tuple(range(10))
    assert manifest.recipe == {"quant_level": 3.0, "exclude": []}
    assert manifest.quality == {"psnr_db": 46.0}
    assert sorted(manifest.files) == ["plan.json", "unet.onnx", "unet.onnx.data"]
    assert manifest.files["unet.onnx.data"].bytes == 1000
    check_files(folder, manifest)


def test_a_manifest_of_a_network_without_schedule_decoder_and_classes(folder: Path) -> None:
    bare = ModelFacts("onnx", MODEL.inputs, (4, 8, 8), None, None, None, 1.0, None)
    write_manifest(folder, replace(MANIFEST, model=bare))
    assert read_manifest(folder).model == bare


def test_the_same_content_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder, again)
    (again / "manifest.json").unlink()
    (again / "report.html").write_text("a report is not hashed")
    write_manifest(again, MANIFEST)
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    text = (folder / "manifest.json").read_text()
    assert str(tmp_path) not in text


@pytest.mark.parametrize("position", [0, 500, 999])
def test_a_flipped_bit_is_found(folder: Path, position: int) -> None:
    content = bytearray((folder / "unet.onnx.data").read_bytes())
    content[position] ^= 1
    (folder / "unet.onnx.data").write_bytes(content)
    with pytest.raises(
        BundleError,
        match=r"net-w8a8/unet\.onnx\.data: changed on disk, sha256 \w{12}\.\.\., \w{12}\.\.\. was written\. Run `qncd",
    ):
        check_files(folder, read_manifest(folder))


def test_missing_and_shortened_files_are_found(folder: Path) -> None:
    (folder / "unet.onnx").unlink()
    (folder / "plan.json").write_text("{}\n")
    assert list(file_problems(folder, read_manifest(folder))) == [
        "plan.json: changed on disk, 3 bytes, 2 were written",
        "unet.onnx: missing, 5 bytes were written",
    ]


def test_beyond_the_limit_size_alone_is_checked_and_the_smallest_files_are_hashed_first(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "unet.onnx.data").write_bytes(b"\1" * 1000)
    check_files(folder, manifest, limit=500)
    with pytest.raises(BundleError, match=r"unet\.onnx\.data: changed"):
        check_files(folder, manifest, limit=1007)
    (folder / "plan.json").write_text("[]")
    with pytest.raises(BundleError, match=r"plan\.json: changed"):
        check_files(folder, manifest, limit=500)


def test_files_of_the_users_are_named_by_verify_and_tolerated_at_open(folder: Path) -> None:
    for name in ("grid.png", "report.html", ".DS_Store"):
        (folder / name).write_text("")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert list(file_problems(folder, manifest)) == ["grid.png: not part of the bundle"]


def test_what_is_not_a_bundle_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"nowhere: no such folder, so it is not a bundle\. Make one with `qncd export`\."
    ):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json in it"):
        read_manifest(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        read_manifest(folder / "plan.json")
    for text in ("", "{", "\xff"):
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(BundleError, match="cannot be read"):
            read_manifest(folder)


@pytest.mark.parametrize("text", ['{"schema": 2}', "{}", "[]", '"schema"', "1"])
def test_an_unknown_schema_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"schema (2|None), this version of qncd-deploy reads schema 1\. Install"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "changes", [{"model": None}, {"files": {"a": {}}}, {"files": []}, {"extra": 1}, {"roles": {"master": 5}}]
)
def test_an_incomplete_manifest_is_refused(folder: Path, changes: dict[str, object]) -> None:
    edit(folder, **changes)
    with pytest.raises(BundleError, match="not a complete manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_outside_the_bundle(folder: Path, name: str) -> None:
    edit(folder, roles={"master": name})
    with pytest.raises(BundleError, match="lies outside the bundle"):
        read_manifest(folder)
