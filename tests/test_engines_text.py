"""Text encoders and whole pipelines, from diffusers' folders through exported graphs to engines: what transformers and
diffusers compute, without either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the twins are torch networks")
pytest.importorskip("diffusers", reason="the twins are diffusers pipelines")
pytest.importorskip("transformers", reason="the twins have text encoders of transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from text_models import PICTURE, TWINS  # noqa: E402

from qncd_deploy.bundle import Manifest, write_manifest  # noqa: E402
from qncd_deploy.engines.base import open_engine  # noqa: E402
from qncd_deploy.engines.text import ROWS, text_encoder  # noqa: E402
from qncd_deploy.export.save import save_siblings  # noqa: E402
from qncd_deploy.export.trace import trace_text_encoder  # noqa: E402
from qncd_deploy.models.load import load_source  # noqa: E402
from qncd_deploy.pipeline import export as exporting  # noqa: E402
from qncd_deploy.pipeline.network import read_network  # noqa: E402
from qncd_deploy.pipeline.options import ExportOptions  # noqa: E402
from qncd_deploy.runtime import Bundle  # noqa: E402
from qncd_deploy.sample import PictureNoise  # noqa: E402

TEXTS = ["astronaut riding a horse on mars, 4k", "the CAT!", "", "dog " * 100, "naïve 猫"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_exported_encoders_give_what_those_of_transformers_give(name: str, tmp_path: Path) -> None:
    pipe = TWINS[name]()
    pipe.save_pretrained(tmp_path)
    encoders = load_source(tmp_path).text.encoders
    for encoder, theirs in zip(encoders, [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)], strict=False):
        graph = trace_text_encoder(encoder.build(), encoder.max_length, encoder.outputs)
        save_siblings({"encoder.onnx": graph}, tmp_path)
        ids = np.array([encoding.ids for encoding in encoder.tokenizer.encode_batch(TEXTS)])
        with torch.no_grad():
            out = theirs(torch.from_numpy(ids), output_hidden_states=True)
        wanted = {"hidden": out.last_hidden_state if name == "sd15" else out.hidden_states[-2]}
        if hasattr(out, "text_embeds"):
            wanted["pooled"] = out.text_embeds
        for backend in ("onnxruntime", "openvino"):
            found, opened = encode(backend, tmp_path / "encoder.onnx", ids)
            assert found.keys() == wanted.keys() and [engine._closed for engine in opened] == [True]
            for key, rows in wanted.items():
                # Three layers in float32, sums in another order.
                np.testing.assert_allclose(found[key], rows.numpy(), rtol=0, atol=2e-5 * np.abs(rows.numpy()).max())


def encode(backend: str, graph: Path, ids: np.ndarray) -> tuple[dict[str, np.ndarray], list[Any]]:
    """What text_encoder makes of ids, more of them than go at a time, and the engines that it opened."""
    opened: list[Any] = []

    def open_encoder() -> Any:
        opened.append(open_engine(backend, graph, remainder="f32", threads=1))
        return opened[-1]

    assert len(ids) % ROWS, "the last group is to be filled up"
    return dict(text_encoder(open_encoder)(ids)), opened


def float_bundle(folder: Path, source: Path, prompts: Path) -> Path:
    """What `qncd export` makes of a checkpoint, without what quantization adds: every graph is the float one."""
    options = ExportOptions(source, name="twin", prompts_file=prompts)
    network = read_network(options)
    folder.mkdir()
    graphs = {role: "unet.onnx" for role in exporting.GRAPHS}
    save_siblings({"unet.onnx": network.model}, folder)
    exporting._write_decoders(folder, network)
    exporting._write_text(folder, network, network.facts.text)
    (folder / "plan.json").write_text('{"schema": 1, "format": "w8a8", "layers": []}')
    roles = {**exporting._manifest(network, None, options).roles, **graphs}
    write_manifest(folder, Manifest("twin", "w8a8", network.facts, roles, {}, {}, 0, {}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_pictures_of_prompts_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    pipe = TWINS[name]()
    pipe.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a photo of the cat\nred horse\n")
    bundle = Bundle.open(float_bundle(tmp_path / "bundle", tmp_path / name, tmp_path / "prompts.txt"))
    prompts, negative = TEXTS[:2], "watercolour dog"
    with bundle.sampler("onnxruntime", n_steps=20, threads=1) as sampler:
        assert sampler.guidance_scale == 7.5
        found = sampler.sample(2, prompts=prompts, negative_prompt=negative, seed=5)
        images = sampler.decode(found.latents)
        own = sampler.sample(2, seed=5)
        again = sampler.sample(2, prompts=bundle.prompts, seed=5)
    first = torch.from_numpy(PictureNoise(5, [0, 1], (4, 8, 8)).initial())
    expected = pipe(
        prompts,
        negative_prompt=[negative] * 2,
        num_inference_steps=20,
        guidance_scale=7.5,
        latents=first,
        output_type="latent",
        height=PICTURE,
        width=PICTURE,
    ).images
    with torch.no_grad():
        pictures = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    # Twenty guided steps in float32 on another engine; measured: 2e-6.
    for ours, theirs in ((found.latents, expected.numpy()), (images, pictures.numpy()), (again.latents, own.latents)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(own.latents - found.latents).max() > 0.01 * np.abs(own.latents).max()
