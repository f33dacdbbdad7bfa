"""Comparing variants of bundles on disk with the demo's feature network, in a process without torch or onnx too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from test_runtime import FACTS, ROLES, write_bundle

from qncd_deploy.bundle import read_manifest, write_manifest
from qncd_deploy.errors import BundleError, UsageError
from qncd_deploy.evaluate.compare import REFERENCE, Draw, Variant, compare
from qncd_deploy.files import canonical_json
from qncd_deploy.runtime import Bundle, Sampling
from qncd_deploy.schedule import Schedule

DEMO = Path(__file__).parents[1] / "calib_data/fashion-ldm"


def with_features(folder: Path) -> Path:
    shutil.copyfile(DEMO / "features.onnx", folder / "features.onnx")
    shutil.copyfile(DEMO / "features-reference.npz", folder / "features-reference.npz")
    roles = {**ROLES, "features": "features.onnx", "features-reference": "features-reference.npz"}
    write_manifest(folder, replace(read_manifest(folder), roles=roles))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(with_features(write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8")))


def test_variants_are_measured_against_one_float_twin(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    done: list[tuple[int, int]] = []
    variants = [
        Variant("w8a8", "onnxruntime", correction="off"),
        Variant("openvino", "openvino", correction="off"),
        Variant("twin", "openvino", float_twin=True),
    ]
    draw = Draw(7, batch_size=3, threads=1)
    found = compare(bundle, variants, draw, shown=4, traced=4, on_progress=lambda n, of: done.append((n, of)))
    assert [figures.name for figures in found.variants] == ["w8a8", "openvino", "twin"]
    assert found.reference.engine == "onnxruntime-f32"  # the first variant's
    assert found["openvino"].engine == "openvino-f32"
    assert set(found.images) == {REFERENCE, "w8a8", "openvino", "twin"}
    assert all(images.shape == (4, 32, 32, 1) for images in found.images.values())
    assert found.captions == ("class 0", "class 1", "class 2", "class 3")
    assert found.reference.psnr is None
    w8a8, twin = found["w8a8"], found["twin"]
    assert w8a8.psnr is not None and twin.psnr is not None and w8a8.shift is not None and twin.shift is not None
    # a coarse toy; the twin on another engine differs by rounding, which moves few bytes
    assert 8 < w8a8.psnr.value < 40 < 60 < twin.psnr.value
    assert twin.shift.value < 0.1 * w8a8.shift.value
    assert min(twin.latent_snr_db) > max(w8a8.latent_snr_db) + 20
    assert len(w8a8.output_snr_db) == 4
    assert found.reference.fid is not None and found.reference.inception_score is not None
    assert found.reference.accuracy is None  # ten classes of clothes say nothing of this network's four
    totals = {of for _, of in done}
    assert totals == {4 * (7 + 3 * (7 + 6))}
    assert done[-1][0] == totals.pop()
    assert [n for n, _ in done] == sorted(n for n, _ in done)
    text = canonical_json(found.to_json())
    assert json.loads(text)["variants"][0]["psnr"]["n"] == 7


def test_the_same_comparison_twice_gives_the_same_figures(bundle: Bundle) -> None:
    variants = [Variant("w8a8", "onnxruntime")]
    first, again = (compare(bundle, variants, Draw(3, threads=1)) for _ in range(2))
    assert first.to_json() == again.to_json()
    np.testing.assert_array_equal(first.images["w8a8"], again.images["w8a8"])


def test_options_of_the_draw_reach_every_sampler(bundle: Bundle) -> None:
    draw = Draw(2, sampling=Sampling(scheduler="plms", n_steps=5, guidance_scale=1.0), labels=(2,))
    found = compare(bundle, [Variant("w8a8", "onnxruntime")], draw, teacher_forced=False)
    assert found.reference.calls == found["w8a8"].calls == 6
    assert found.captions == ("class 2", "class 2")
    more = replace(draw, sampling=replace(draw.sampling, guidance_scale=3.0))
    other = compare(bundle, [Variant("w8a8", "onnxruntime")], more, teacher_forced=False)
    assert np.any(other.images[REFERENCE] != found.images[REFERENCE])


def test_one_picture_has_no_distribution(bundle: Bundle) -> None:
    found = compare(bundle, [Variant("w8a8", "onnxruntime")], Draw(1))
    assert found["w8a8"].psnr is not None
    assert found["w8a8"].shift is found["w8a8"].fid is None


def test_without_a_decoder_the_latents_still_tell(tmp_path: Path) -> None:
    roles = {role: name for role, name in ROLES.items() if role != "decoder"}
    found = compare(Bundle.open(write_bundle(tmp_path / "net", roles=roles)), [Variant("w8a8", "onnxruntime")], Draw(2))
    assert found["w8a8"].psnr is None
    assert found.images == {}
    assert all(5 < value < 40 for value in found["w8a8"].latent_snr_db)


def test_bundles_of_one_network_compare_and_others_do_not(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "other")
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, inputs={**manifest.inputs, "calib-data": "cd"}))
    other = Bundle.open(folder)
    found = compare(bundle, [Variant("own", "onnxruntime"), Variant("other", "onnxruntime", bundle=other)], Draw(2))
    assert found["own"].psnr == found["other"].psnr

    write_manifest(folder, replace(manifest, inputs={"model.ckpt": "cd"}))
    words = (
        rf"{folder}: made from another network than {bundle.path} \(model\.ckpt differs\).*bundles of one checkpoint"
    )
    with pytest.raises(UsageError, match=words):
        compare(bundle, [Variant("other", "onnxruntime", bundle=Bundle.open(folder))], Draw(2))
    schedule = Schedule.scaled_linear(0.001, 0.02).to_json()
    write_manifest(folder, replace(manifest, model=replace(FACTS, schedule=schedule)))
    with pytest.raises(UsageError, match="noise schedule differs"):
        compare(bundle, [Variant("other", "onnxruntime", bundle=Bundle.open(folder))], Draw(2))


def test_a_feature_network_of_other_pictures_is_refused(tmp_path: Path) -> None:
    from onnx import parser, save

    folder = with_features(write_bundle(tmp_path / "net"))
    text = "n (float[n,3,8,8] i) => (float[n,3,8,8] features) { features = Relu(i) }"
    save(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}'), folder / "features.onnx")
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(BundleError, match=r"features\.onnx: takes pictures of 3x8x8, these are 1x32x32"):
        compare(Bundle.open(folder), [Variant("w8a8", "onnxruntime")], Draw(2))


def test_comparing_needs_no_torch_onnx_or_scipy(bundle: Bundle) -> None:
    code = f"""
        import sys
        absent = ("torch", "onnx", "onnx_ir", "diffusers", "scipy", "matplotlib", "jinja2")
        sys.modules.update(dict.fromkeys(absent))  # importing one raises ImportError
        from qncd_deploy.evaluate.bench import bench
        from qncd_deploy.evaluate.compare import Draw, Variant, compare
        from qncd_deploy.runtime import Bundle
        bundle = Bundle.open({str(bundle.path)!r})
        found = compare(bundle, [Variant("w8a8", "onnxruntime")], Draw(2))
        timed = bench(bundle, [Variant("w8a8", "onnxruntime")], Draw(2, batch_size=2), rounds=1)
        print(found["w8a8"].psnr == timed["w8a8"].figures.psnr)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr
