"""A graph of the user's own: any input names, a fixed batch, not an eps predictor, inputs of very different sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Export, Finished, contents, qncd

torch = pytest.importorskip("torch", reason="the foreign graph is exported by torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from ldm_checkpoint import BASE  # noqa: E402
from ldm_reference import UNetModel, randomize  # noqa: E402
from torch import nn  # noqa: E402

SIGMA_DATA, SIGMA_MIN = 0.5, 0.002
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,  # the networks here take the logarithm of the noise level
}
SIGMAS = np.geomspace(80, 0.3, 24).astype(np.float32)


class Consistency(nn.Module):
    """Song et al., arXiv:2303.01469, appendix C: noisy picture and noise level to the clean picture.

    scaled: whether the network sees c_in x, as published, or x itself, two hundred times larger at first than at last.
    """

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        unet = {**BASE, "channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 16}
        self.unet = randomize(UNetModel(**unet), 4)
        self.scaled = scaled

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = sigma[:, None, None, None]
        c_in = (level**2 + SIGMA_DATA**2) ** -0.5
        c_skip = SIGMA_DATA**2 / ((level - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        c_out = SIGMA_DATA * (level - SIGMA_MIN) * c_in
        seen = c_in * noisy if self.scaled else noisy
        return c_skip * noisy + c_out * self.unet(seen, 250 * torch.log(sigma), None, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    levels = np.repeat(SIGMAS, 2)
    clean = SIGMA_DATA * rng.standard_normal((len(levels), 3, 8, 8))
    noisy = clean + levels[:, None, None, None] * rng.standard_normal(clean.shape)
    path = tmp_path_factory.mktemp("data") / "inputs.npz"
    np.savez(path, noisy=noisy.astype(np.float32), sigma=levels)
    return path


@pytest.fixture(scope="module", params=["scaled", "raw"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / f"{request.param}.onnx"
    net = Consistency(scaled=request.param == "scaled").eval()
    torch.onnx.export(
        *(net, (torch.zeros(1, 3, 8, 8), torch.ones(1)), str(path)),
        input_names=["noisy", "sigma"],
        output_names=["clean"],
        opset_version=18,
        dynamo=False,
    )
    return path


def own(graph: Path, data: Path, home: Path, *more: object) -> Finished:
    return qncd(
        *("export", graph, "--int8", "--calib-data", data),
        *("--calib-dir", home / "calib", "--onnx-dir", home / "export", *more),
    )


def outputs(graph: Path, data: Path) -> np.ndarray:
    session = ort.InferenceSession(graph)
    with np.load(data) as rows:
        arrays = dict(rows)
    count = len(arrays["sigma"])
    return np.concatenate(
        [session.run(None, {name: a[i : i + 1] for name, a in arrays.items()})[0] for i in range(count)]
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "scheduler_config.json"
    path.write_text(json.dumps(SCHEDULER))
    return path


def test_a_foreign_graph_keeps_its_output_and_says_how_well(
    foreign: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    sampled = foreign.stem == "scaled"  # one of the two is to be sampled as well
    more = ("--config", config, "--n-steps", 3, "--eval-size", 2, "--fit-size", 2) if sampled else ()
    done = own(foreign, data, tmp_path, *more)
    assert done.code == 0, done.err
    bundle = tmp_path / f"export/{foreign.stem}-w8a8"
    plan = json.loads((bundle / "plan.json").read_text())
    quantized = [layer for layer in plan["layers"] if layer["weight_bits"] is not None]
    assert len(quantized) > len(plan["layers"]) / 2
    assert plan["output_sqnr_db"] >= 20
    assert f"{plan['output_sqnr_db']:.1f} dB" in done.out
    exact = outputs(foreign, data)
    np.testing.assert_allclose(outputs(bundle / "unet-float.onnx", data), exact, atol=1e-4 * np.abs(exact).max())
    error = outputs(bundle / "unet.onnx", data) - exact
    measured = 10 * np.log10(np.square(exact, dtype=np.float64).sum() / np.square(error, dtype=np.float64).sum())
    # The same graph on another engine: some values round the other way, which changes the noise power by percents.
    assert abs(measured - plan["output_sqnr_db"]) < 1
    by_row = np.square(error).sum(axis=(1, 2, 3)) / np.square(exact).sum(axis=(1, 2, 3))
    assert 10 * np.log10(1 / by_row.max()) > 15  # no single noise level is given up for the others
    pictures = qncd("sample", bundle, "-n", 2, "-o", tmp_path / "x.npz")
    if sampled:
        assert pictures.code == 0, pictures.err
        with np.load(tmp_path / "x.npz") as found:
            assert found["latents"].shape == (2, 3, 8, 8)
    else:
        assert pictures.code == 1 and "--config" in pictures.line


def test_a_conditional_graph_cannot_be_sampled_without_its_conditions(
    bundle: Path, calibration: Path, config: Path, tmp_path: Path
) -> None:
    done = own(bundle / "unet-float.onnx", calibration, tmp_path, "--config", config, "--n-steps", 3)
    assert done.code == 1
    assert "encoder_hidden_states" in done.line


def test_our_own_float_graph_comes_back_the_same(own_graph: Export, bundle: Path) -> None:
    ours, theirs = (json.loads((folder / "plan.json").read_text()) for folder in (bundle, own_graph.bundle))
    assert theirs["output_sqnr_db"] >= 20
    assert [layer["name"] for layer in ours["layers"]] == [layer["name"] for layer in theirs["layers"]]
    assert [layer["weight_bits"] for layer in ours["layers"]] == [layer["weight_bits"] for layer in theirs["layers"]]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--guidance-scale", "2"], 2, "--guidance-scale"),
        (["--null-class", "3"], 2, "--null-class"),
        (["--scheduler", "ddim"], 2, "scheduler_config.json"),
        (["--config", "missing.json"], 1, "missing.json"),
        (["--exclude", "no_such_weight"], 1, "no_such_weight"),
        (["--include", "no_such_weight"], 1, "--dry-run"),
        (["--exclude", "."], 1, "none of"),
    ],
)
def test_what_the_graph_does_not_have_is_refused(
    bundle: Path, calibration: Path, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    done = own(bundle / "unet-float.onnx", calibration, tmp_path, *args)
    assert done.code == code, done.err
    assert words in done.line
    assert not (tmp_path / "export").exists() or not contents(tmp_path / "export")


def test_graphs_that_are_none_and_data_that_are_missing(calibration: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.onnx").write_bytes(b"not a graph")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("foreign.onnx", "empty.onnx", "missing.onnx"):
        done = own(tmp_path / name, calibration, tmp_path)
        assert done.code == 1 and name in done.line
    graph = bundle / "unet-float.onnx"
    bare = qncd("export", graph, "--int8", "--onnx-dir", tmp_path / "export")
    assert bare.code == 2 and "--calib-data" in bare.line
    absent = own(graph, tmp_path / "absent.npz", tmp_path)
    assert absent.code == 1 and "absent.npz" in absent.line
    quantized = own(bundle / "unet.onnx", calibration, tmp_path)
    assert quantized.code == 1 and "float" in quantized.line
    assert not (tmp_path / "export").exists() or not contents(tmp_path / "export")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: {"x": a["sample"], **{k: v for k, v in a.items() if k != "sample"}}, "inputs are"),
        (lambda a: {**a, "extra": a["timestep"]}, "extra"),
        (lambda a: {**a, "sample": a["sample"][:, :, :4]}, "sample"),
        (lambda a: {**a, "timestep": a["timestep"][:, None]}, "timestep"),
        (lambda a: {**a, "sample": a["sample"] * np.float32(np.nan)}, "not finite"),
        (lambda a: {k: v[:0] for k, v in a.items()}, "no samples"),
        (lambda a: {**a, "timestep": a["timestep"][:3]}, "lengths differ"),
        (lambda a: {**a, "timestep": a["timestep"].astype(str)}, "timestep"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    bundle: Path, calibration: Path, tmp_path: Path, change: Callable[..., dict[str, np.ndarray]], words: str
) -> None:
    with np.load(calibration) as archive:
        np.savez(tmp_path / "inputs.npz", **change(dict(archive)))
    done = own(bundle / "unet-float.onnx", tmp_path / "inputs.npz", tmp_path)
    assert done.code == 1, done.err
    assert words in done.line
    assert not (tmp_path / "export").exists() or not contents(tmp_path / "export")
