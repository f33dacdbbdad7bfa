"""Make the demo's evaluation network and what it says of real pictures: features-spatial.onnx and its reference.

    python benchmarks/demo_features.py t10k-images-idx3-ubyte.gz

The network is features.onnx with a third output, `spatial`: the first 7 channels of its fourth convolution, 8x8 of
them, as Nash et al. (arXiv:2103.03841) take 7 channels of an inner layer for their sFID. The pictures are the 10,000
test images of Fashion-MNIST (MIT licence; Debian has them as dataset-fashion-mnist), padded with black to 32x32.

mean, cov                    those of features-reference.npz, so that FID is the same by both
spatial_mean, spatial_cov    of all test images, float32
features                     of the first 2,000, float16, for precision and recall
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qncd_deploy.engines.base import default_backend
from qncd_deploy.evaluate.features import FeatureNetwork
from qncd_deploy.files import load_npz, save_npz

CHANNELS = 7
KEPT = 2000
CONVOLUTION = 3  # the fourth: 64 channels of 8x8


def with_spatial(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with the output `spatial`, (n, 7, 8, 8)."""
    model = onnx.shape_inference.infer_shapes(model)
    (activation,) = [node for node in model.graph.node if node.op_type == "Relu"][CONVOLUTION].output
    (shape,) = (value.type.tensor_type.shape for value in model.graph.value_info if value.name == activation)
    limits = {"starts": [0], "ends": [CHANNELS], "axes": [1]}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), f"spatial.{name}") for name, value in limits.items()
    )
    model.graph.node.append(
        helper.make_node("Slice", [activation, *(f"spatial.{name}" for name in limits)], ["spatial"])
    )
    size = [shape.dim[0].dim_param, CHANNELS, *(dim.dim_value for dim in shape.dim[2:])]
    model.graph.output.append(helper.make_tensor_value_info("spatial", TensorProto.FLOAT, size))
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def read_images(path: Path) -> np.ndarray:
    """An idx file of the MNIST family, gzipped or not, as (N, 32, 32, 1) uint8."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="t10k-images-idx3-ubyte, gzipped or not")
    parser.add_argument("--folder", type=Path, default=Path("calib_data/fashion-ldm"))
    given = parser.parse_args()
    target = given.folder / "features-spatial.onnx"
    onnx.save(with_spatial(onnx.load(given.folder / "features.onnx")), target)
    with FeatureNetwork.open(target, default_backend()) as network:
        found = network(read_images(given.images))
    assert found.spatial is not None, "the network was given this output above"
    known = load_npz(given.folder / "features-reference.npz")
    spatial = found.spatial.astype(np.float64)
    arrays = {
        "mean": known["mean"],
        "cov": known["cov"],
        "spatial_mean": spatial.mean(axis=0).astype(np.float32),
        "spatial_cov": np.cov(spatial, rowvar=False).astype(np.float32),
        "features": found.features[:KEPT].astype(np.float16),
    }
    save_npz(given.folder / "features-spatial-reference.npz", arrays)


if __name__ == "__main__":
    main()
