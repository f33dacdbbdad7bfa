"""The float graph computes what the torch module computes, and its bytes depend on the network alone."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_decoder import Decoder
from export_helpers import feeds_for, run, run_torch, traced

from qncd_deploy.errors import ExportError
from qncd_deploy.export.passes.normalise import normalise
from qncd_deploy.export.save import spill
from qncd_deploy.export.trace import trace, trace_decoder
from qncd_deploy.export.verify import FLOAT, verify
from qncd_deploy.specs import TensorSpec

# One float32 rounding is 2**-24; sums of up to 64 * 9 terms through some 40 layers, reordered, may lose ten bits of it.
CLOSE = 2.0**-14


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_graph_equals_module_for_any_batch(kind):
    module, specs, model = traced(kind)
    verify(model, FLOAT)
    for batch in (1, 3):
        feeds = feeds_for(specs, batch, seed=batch)
        expected = run_torch(module, feeds)
        np.testing.assert_allclose(run(model, feeds)["out"], expected, rtol=0, atol=CLOSE * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["additive", "scale-shift"])
def test_initializers_hold_the_parameters_under_their_names(kind):
    module, _, model = traced(kind)
    for name, parameter in module.named_parameters():
        stored = model.graph.initializers[name].const_value.numpy()
        expected = parameter.detach().numpy()
        uses = [node.op_type for node in model.graph.initializers[name].consumers()]
        assert uses, f"{name} is unused"
        if uses == ["MatMul"]:
            expected = expected.T
        np.testing.assert_array_equal(stored.reshape(expected.shape), expected)


def test_graph_has_a_free_batch_and_nothing_superfluous():
    _, _, model = traced("additive")
    assert [str(value.shape) for value in model.graph.inputs] == ["[batch,4,8,8]", "[batch]", "[batch,3,32]"]
    assert str(model.graph.outputs[0].shape) == "[batch,4,8,8]"
    ops = {node.op_type for node in model.graph}
    assert not ops & {"Shape", "Cast", "CastLike", "Constant", "Expand", "Identity", "Range", "SequenceAt", "Gather"}
    assert all(node.inputs[1].is_initializer() for node in model.graph if node.op_type == "Reshape")


def test_normalising_twice_changes_nothing():
    _, _, model = traced("additive")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert ir.to_proto(normalise(model)).SerializeToString(deterministic=True) == before


def test_decoder_maps_latents_to_images():
    torch.manual_seed(0)
    decoder = Decoder().eval()
    model = trace_decoder(decoder, (2, 4, 4))
    latents = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
    with torch.no_grad():
        expected = decoder(torch.from_numpy(latents)).numpy()
    images = run(model, {"latents": latents})["images"]
    np.testing.assert_allclose(images, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


_TWIN = """
import hashlib, torch, onnx_ir as ir
from export_decoder import Decoder
from qncd_deploy.export.trace import trace_decoder
torch.manual_seed(0)
model = trace_decoder(Decoder(), (2, 4, 4))
print(hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest())
"""


def test_bytes_are_those_of_another_process():
    torch.manual_seed(0)
    model = trace_decoder(Decoder(), (2, 4, 4))
    here = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]), "PYTHONHASHSEED": "7"}
    twin = subprocess.run([sys.executable, "-c", _TWIN], env=env, capture_output=True, text=True, check=True)
    assert twin.stdout.split() == [here]
    assert twin.stderr == "", "exporters' warnings are silenced"


def test_nan_weights_are_refused_by_name():
    decoder = Decoder()
    with torch.no_grad():
        decoder.stem.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"stem\.weight: NaN or infinity"):
        trace_decoder(decoder, (2, 4, 4))


class _Branches(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + 1 if sample.sum() > 0 else sample


def test_a_module_that_cannot_be_traced_is_one_line():
    with pytest.raises(ExportError, match=r"^_Branches: torch cannot trace it \(.*\)\.$") as caught:
        trace(_Branches(), [TensorSpec("sample", "float32", ("batch", 1, 2, 2))])
    assert "\n" not in str(caught.value)


def test_a_spilled_graph_holds_nothing_of_the_module(tmp_path: Path) -> None:
    """Weights of large networks are in memory once: the checkpoint is unmapped once the graph's weights are on disk."""
    checkpoint = tmp_path / "checkpoint.bin"
    np.ones(32 * 16 + 32 * 32 + 32, np.float32).tofile(checkpoint)
    mapped = torch.from_file(str(checkpoint), size=checkpoint.stat().st_size // 4).split([32 * 16, 32 * 32, 32])
    module = torch.nn.Sequential(torch.nn.Linear(16, 32, bias=False), torch.nn.SiLU(), torch.nn.Linear(32, 32))
    for parameter, values in zip(module.parameters(), mapped, strict=True):
        parameter.data = values.reshape(parameter.shape)
    assert str(checkpoint) in _mapped_files()
    model = trace(module, [TensorSpec("x", "float32", ("batch", 4, 16))])
    spill(model, tmp_path / "weights.data")
    del module, mapped, parameter, values
    gc.collect()
    assert str(checkpoint) not in _mapped_files()


def _mapped_files() -> str:
    return Path("/proc/self/maps").read_text()
