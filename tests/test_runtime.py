"""From a bundle on disk to pictures, on every engine, and in a process that has no torch, onnx or diffusers."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from engine_graphs import save_network  # noqa: E402
from onnx import numpy_helper, parser  # noqa: E402

from qncd_deploy.bundle import ConditionFacts, Manifest, ModelFacts, read_manifest, write_manifest  # noqa: E402
from qncd_deploy.cli.sample import fit_command  # noqa: E402
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, StepFix, save_tables  # noqa: E402
from qncd_deploy.engines.base import make_engine_id  # noqa: E402
from qncd_deploy.errors import BundleError, EngineError, ScheduleError, UsageError  # noqa: E402
from qncd_deploy.pictures import Pictures  # noqa: E402
from qncd_deploy.runtime import Bundle, Sampling  # noqa: E402
from qncd_deploy.schedule import Schedule  # noqa: E402
from qncd_deploy.specs import TensorSpec  # noqa: E402

SCHEDULE = Schedule.scaled_linear(0.0015, 0.0195)
DECODER = """
<ir_version: 9, opset_import: ["" : 18]>
decode (float[batch,8,16,16] z) => (float[batch,1,32,32] image) {
    y = Conv(z, w)
    large = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(y, , factors)
    image = Tanh(large)
}
"""
FACTS = ModelFacts(
    family="fake",
    inputs=(
        TensorSpec("x", "float32", ("batch", 8, 16, 16)),
        TensorSpec("t", "float32", ("batch",)),
        TensorSpec("c", "float32", ("batch", 1, 12)),
    ),
    latent_shape=(8, 16, 16),
    image_shape=(1, 32, 32),
    schedule=SCHEDULE.to_json(),
    sampler={"scheduler": "ddim", "n_steps": 4, "eta": 0.0},
    guidance_scale=1.5,
    condition=ConditionFacts("class-tokens", 5, 4),
)
ROLES = {
    "master": "unet.onnx",
    "ort": "unet-ort.onnx",
    "float": "unet-float.onnx",
    "decoder": "vae-decoder.onnx",
    "class-embedding": "class-embedding.npy",
    "plan": "plan.json",
}


def write_bundle(folder: Path, facts: ModelFacts = FACTS, roles: dict[str, str] = ROLES) -> Path:
    folder.mkdir()
    save_network(folder / "unet.onnx", quantized=True, external=True)
    save_network(folder / "unet-ort.onnx", quantized=True)
    save_network(folder / "unet-float.onnx", quantized=False)
    rng = np.random.default_rng(3)
    decoder = parser.parse_model(DECODER)
    weights = {"w": rng.standard_normal((1, 8, 1, 1)) * 0.1, "factors": np.array([1, 1, 2, 2])}
    decoder.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items())
    onnx.save(decoder, folder / "vae-decoder.onnx")
    np.save(folder / "class-embedding.npy", rng.standard_normal((5, 1, 12)).astype(np.float32))
    (folder / "plan.json").write_text(json.dumps({"schema": 1, "format": "w8a8", "layers": []}))
    write_manifest(folder, Manifest("net", "w8a8", facts, roles, {"model.ckpt": "ab"}, {}, 0, {}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("export") / "net-w8a8")


@pytest.fixture(params=["openvino", "onnxruntime", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


def draw(folder: Path, backend: str, pictures: int | list[int] = 3, **options: object) -> Pictures:
    seed = options.pop("seed", 0)
    with Bundle.open(folder).sampler(backend, threads=1, **options) as sampler:
        return sampler.sample(pictures, seed=seed)


def key_of(folder: Path, backend: str, **changes: object) -> ScheduleKey:
    with Bundle.open(folder).sampler(backend, correction="off") as sampler:
        return replace(sampler.table.key, **changes)


def test_a_bundle_gives_pictures_latents_and_labels(folder: Path, backend: str) -> None:
    drawn = draw(folder, backend, 6)
    assert drawn.images is not None
    assert drawn.images.shape == (6, 32, 32, 1)
    assert drawn.latents.shape == (6, 8, 16, 16)
    np.testing.assert_array_equal(drawn.labels, [0, 1, 2, 3, 0, 1])
    assert drawn.images.std() > 1


def test_engines_agree_on_the_float_twin_to_rounding_and_on_the_quantized_one_closely(folder: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    exact = [draw(folder, name, float_twin=True).latents for name in ("openvino", "onnxruntime")]
    size = np.abs(exact[0]).max()
    # Four guided calls, each within 1e-5 of the other's on states of this size, growing a few times on the way.
    np.testing.assert_allclose(exact[1], exact[0], rtol=0, atol=2e-4 * size)
    coarse = [draw(folder, name).latents for name in ("openvino", "onnxruntime")]
    quantization = np.sqrt(np.mean((coarse[0] - exact[0]) ** 2))
    between = np.sqrt(np.mean((coarse[0] - coarse[1]) ** 2))
    assert quantization > 1e-3  # the twin is another network
    assert between < 0.1 * quantization  # ties that fall differently, amplified over four calls


def test_pictures_do_not_depend_on_batch_size_or_number(folder: Path, backend: str) -> None:
    whole = draw(folder, backend, 5, batch_size=5, float_twin=True)
    size = np.abs(whole.latents).max()
    for pictures, batch in ((5, 2), ([4, 1], 1), ([3, 1, 4], 3)):
        part = draw(folder, backend, pictures, batch_size=batch, float_twin=True)
        np.testing.assert_array_equal(part.labels, whole.labels[part.indices])
        np.testing.assert_allclose(part.latents, whole.latents[part.indices], rtol=0, atol=2e-4 * size)  # as above


def test_seeds_give_other_pictures_and_the_same_seed_the_same_bits(folder: Path, backend: str) -> None:
    first, again, other = (draw(folder, backend, 2, seed=seed).latents for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_options_replace_the_bundles_own(folder: Path) -> None:
    bundle = Bundle.open(folder)
    options = {"scheduler": "plms", "n_steps": 6, "guidance_scale": 3.0}
    with bundle.sampler("onnxruntime", **options) as sampler:
        assert (sampler.config.scheduler, sampler.config.n_steps, sampler.guidance_scale) == ("plms", 6, 3.0)
        assert len(sampler.steps) == 7
    with bundle.sampler("onnxruntime", guidance_scale=1.0, eta=1.0) as sampler:
        assert sampler.config.eta == 1.0
        assert sampler.sample(1).latents.shape == (1, 8, 16, 16)
    assert bundle.sampler_config(scheduler="ddpm").eta == 0.0
    settled = bundle.settled(Sampling(n_steps=6))
    assert settled == bundle.settled(settled) == Sampling(scheduler="ddim", n_steps=6, eta=0.0, guidance_scale=1.5)
    with pytest.raises(ScheduleError, match="n_steps 0"):
        bundle.sampler("onnxruntime", n_steps=0)
    with pytest.raises(UsageError, match="batch size 0: expected 1 or more"):
        bundle.sampler("onnxruntime", batch_size=0)
    with pytest.raises(EngineError, match="backend 'cuda': unknown"):
        bundle.sampler("cuda")


def test_auto_takes_what_was_chosen_for_exactly_this_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_bundle(tmp_path / "net")
    plain = draw(folder, "onnxruntime", correction="off")
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(draw(folder, "onnxruntime").latents, plain.latents)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "no correction was fitted for this backend and schedule, so none is used. Fit one with "
        f"`qncd fit {folder} --backend onnxruntime --scheduler ddim --n-steps 4 --eta 0 --guidance-scale 1.5 "
        "--remainder f32`."
    )
    caplog.clear()

    key = key_of(folder, "onnxruntime")
    fixes = tuple(StepFix(b=0.1) for _ in key.timesteps)
    tables = [CorrectionTable("toy", key, fixes), CorrectionTable("other", key, (StepFix(b=0.2),) * 4)]
    save_tables(folder / "corrections.npz", tables, auto={key.id: "toy"})
    write_manifest(folder, replace(read_manifest(folder), roles={**ROLES, "corrections": "corrections.npz"}))
    toy = draw(folder, "onnxruntime")
    assert np.abs(toy.latents - plain.latents).max() > 0.01
    np.testing.assert_array_equal(draw(folder, "onnxruntime", correction="toy").latents, toy.latents)
    assert np.abs(draw(folder, "onnxruntime", correction="other").latents - toy.latents).max() > 0.01
    np.testing.assert_array_equal(draw(folder, "onnxruntime", correction="off").latents, plain.latents)
    assert not caplog.records

    with Bundle.open(folder).sampler("onnxruntime", n_steps=5) as sampler:  # auto, another schedule
        assert sampler.table.method == "off"
    assert len(caplog.records) == 1
    words = r"fitted for n_steps 4 .*, asked for n_steps 5 .*Run `qncd fit \S+ --backend onnxruntime .*--n-steps 5"
    with pytest.raises(ScheduleError, match=words):
        draw(folder, "onnxruntime", correction="toy", n_steps=5)
    with pytest.raises(ScheduleError, match=r"no table for correction 'ptqd', it holds other, toy"):
        draw(folder, "onnxruntime", correction="ptqd")
    exact = draw(folder, "onnxruntime", float_twin=True)  # never corrected
    with Bundle.open(folder).sampler("onnxruntime", float_twin=True) as sampler:
        assert sampler.table.method == "off"
        np.testing.assert_array_equal(sampler.sample(3).latents, exact.latents)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Sampling(eta=0.0), "--eta 0 "),  # the bundle's own is another
        (Sampling(eta=1 / 3, guidance_scale=1.2345678901), "--eta 0.3333333333333333 --guidance-scale 1.2345678901 "),
        (Sampling(scheduler="plms", n_steps=3, guidance_scale=3.0), "--n-steps 3 --guidance-scale 3 "),
    ],
)
def test_the_fit_line_that_is_advised_fits_for_this_key(tmp_path: Path, asked: Sampling, words: str) -> None:
    own = {"scheduler": "ddim", "n_steps": 4, "eta": 0.5}
    bundle = Bundle.open(write_bundle(tmp_path / "my net", replace(FACTS, sampler=own)))
    key = bundle.key(asked, "openvino-bf16")
    line = key.fit_command(bundle.path)
    assert words in line
    given = fit_command.make_context("fit", shlex.split(line)[2:]).params
    read = Sampling(**{name: given[name] for name in ("scheduler", "n_steps", "eta", "guidance_scale")})
    again = Bundle.open(given["bundle"])
    assert again.key(read, make_engine_id(given["backend"], given["remainder"])) == key


def test_tables_beside_the_bundle_come_first(folder: Path, tmp_path: Path) -> None:
    key = key_of(folder, "onnxruntime")
    save_tables(tmp_path / "fit.npz", [CorrectionTable("toy", key, (StepFix(b=0.1),) * 4)], auto={key.id: "toy"})
    with Bundle.open(folder).sampler("onnxruntime", tables=[tmp_path / "fit.npz"]) as sampler:
        assert sampler.table.method == "toy"
    with Bundle.open(folder).sampler("onnxruntime", tables=[tmp_path / "fit.npz"], correction="toy") as sampler:
        assert sampler.table.method == "toy"
    with pytest.raises(ScheduleError, match=rf"no table for correction 'tac'.*Run `qncd fit {folder} "):
        Bundle.open(folder).sampler("onnxruntime", correction="tac")
    with pytest.raises(UsageError, match="correction toy: expected auto, off or one of qncd, "):  # no fit can help
        Bundle.open(folder).sampler("onnxruntime", correction="toy")
    with pytest.raises(UsageError, match=r"correction tow: expected .*, toy\."):
        Bundle.open(folder).sampler("onnxruntime", tables=[tmp_path / "fit.npz"], correction="tow")


def test_the_float_twin_takes_no_correction_and_no_coarser_remainder(folder: Path) -> None:
    for options in ({"correction": "qncd"}, {"remainder": "bf16"}):
        with pytest.raises(UsageError, match="float twin is the reference"):
            Bundle.open(folder).sampler("openvino", float_twin=True, **options)


def test_networks_without_null_class_classes_or_schedule(tmp_path: Path) -> None:
    unguided = replace(FACTS, guidance_scale=1.0, condition=ConditionFacts("class-tokens", 5, None))
    bundle = Bundle.open(write_bundle(tmp_path / "unguided", unguided))
    with bundle.sampler("onnxruntime") as sampler:
        np.testing.assert_array_equal(sampler.sample(6).labels, [0, 1, 2, 3, 4, 0])
    with pytest.raises(UsageError, match=r"--guidance-scale 2 needs a null class.*`qncd export --null-class K`"):
        bundle.sampler("onnxruntime", guidance_scale=2.0)

    classless = replace(FACTS, guidance_scale=1.0, condition=None)
    bundle = Bundle.open(write_bundle(tmp_path / "classless", classless))
    with pytest.raises(UsageError, match="the network has no classes, so --guidance-scale 2 means nothing"):
        bundle.sampler("onnxruntime", guidance_scale=2.0)
    with (
        bundle.sampler("onnxruntime") as sampler,
        pytest.raises(EngineError, match="needs a condition for its input 'c'"),
    ):
        sampler.sample(1)  # the graph disagrees with its manifest

    bare = replace(FACTS, schedule=None, sampler=None)
    bundle = Bundle.open(write_bundle(tmp_path / "bare", bare))
    assert bundle.plan["format"] == "w8a8"
    with pytest.raises(BundleError, match=r"bare: has no noise schedule, .* so it cannot sample"):
        bundle.sampler("onnxruntime")

    roles = {role: name for role, name in ROLES.items() if role != "decoder"}
    bundle = Bundle.open(write_bundle(tmp_path / "latents", FACTS, roles))
    with bundle.sampler("onnxruntime") as sampler:
        assert sampler.sample(1).images is None
    with pytest.raises(BundleError, match="holds no 'trt' file, only class-embedding, float"):
        bundle.file("trt")


def test_a_changed_bundle_is_refused_at_open(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "net")
    data = folder / "unet.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 4
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"net/unet\.onnx\.data: changed on disk.*Run `qncd export` again"):
        Bundle.open(folder)
    assert Bundle.open(folder, verify=False).manifest.name == "net"


def test_engines_are_closed_at_the_end_and_when_opening_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qncd_deploy.engines.ort import OrtEngine

    closed: list[str] = []
    close = OrtEngine._close
    monkeypatch.setattr(OrtEngine, "_close", lambda self: (closed.append(self.path.name), close(self)))
    with Bundle.open(folder).sampler("onnxruntime"):
        assert closed == []
    assert sorted(closed) == ["unet-ort.onnx", "vae-decoder.onnx"]
    closed.clear()
    with pytest.raises(EngineError, match="takes no compiled blob"):
        Bundle.open(folder).sampler("onnxruntime", blobs=[Path("x.blob")])
    assert sorted(closed) == ["unet-ort.onnx", "vae-decoder.onnx"]


def test_a_blob_of_the_sampler_is_used_again_and_tied_to_the_weights(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    options = {"batch_size": 2, "threads": 1}
    with Bundle.open(folder).sampler("openvino", **options) as sampler:
        shapes = {"x": (4, 8, 16, 16), "t": (4,), "c": (4, 1, 12)}  # with guidance
        sampler.network.unet.save_blob(tmp_path / "net.blob", shapes, source=sampler.network.source)
        expected = sampler.sample(2).latents
        kernels = sampler.kernels()
    assert sum(kernel.count for kernel in kernels if kernel.integer and kernel.op == "Convolution") == 1
    with Bundle.open(folder).sampler("openvino", blobs=[tmp_path / "net.blob"], **options) as sampler:
        np.testing.assert_array_equal(sampler.sample(2).latents, expected)
    with pytest.raises(EngineError, match="made from another graph"):
        Bundle.open(folder).sampler("openvino", blobs=[tmp_path / "net.blob"], float_twin=True, **options)
    (tmp_path / "old.blob").write_bytes(b"of another machine")
    both = [tmp_path / "old.blob", tmp_path / "net.blob"]  # what fits is used, whatever lies beside it
    with Bundle.open(folder).sampler("openvino", blobs=both, **options) as sampler:
        np.testing.assert_array_equal(sampler.sample(2).latents, expected)
    with pytest.raises(EngineError, match=r"old\.blob: not a compiled blob"):
        Bundle.open(folder).sampler("openvino", blobs=both[:1], **options)


def test_a_blob_of_the_decoder_goes_to_the_decoder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = Bundle.open(folder)
    with bundle.sampler("openvino", batch_size=2, threads=1) as sampler:
        decoder = sampler.network.decoder
        shapes = {name: (2, *spec.shape[1:]) for name, spec in decoder.inputs.items()}
        decoder.save_blob(tmp_path / "decoder.blob", shapes, source=bundle.graph_id("decoder"))
        expected = sampler.sample(2).images
    with bundle.sampler("openvino", batch_size=2, threads=1, blobs=[tmp_path / "decoder.blob"]) as sampler:
        np.testing.assert_array_equal(sampler.sample(2).images, expected)
        assert len(sampler.network.decoder._compiled) == 1


def test_graphs_are_told_apart_by_their_external_weights_too(folder: Path) -> None:
    bundle = Bundle.open(folder)
    files = dict(bundle.manifest.files)
    files["unet.onnx.data"] = replace(files["unet.onnx.data"], sha256="00")
    other = Bundle(folder, replace(bundle.manifest, files=files))
    assert bundle.graph_id("master") != other.graph_id("master")
    assert bundle.graph_id("master") != bundle.graph_id("float")


def test_sampling_needs_no_torch_onnx_or_diffusers(folder: Path, tmp_path: Path) -> None:
    code = f"""
        import sys
        absent = ("torch", "onnx", "onnx_ir", "diffusers", "transformers", "safetensors", "scipy", "yaml")
        sys.modules.update(dict.fromkeys(absent))  # importing one raises ImportError
        from pathlib import Path
        from qncd_deploy.pictures import save_pictures
        from qncd_deploy.runtime import Bundle, Sampling
        for backend in ("openvino", "onnxruntime"):
            with Bundle.open({str(folder)!r}).sampler(backend) as sampler:
                save_pictures(Path({str(tmp_path)!r}) / f"{{backend}}.png", sampler.sample(2))
    """
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnxruntime.png", "openvino.png"]
