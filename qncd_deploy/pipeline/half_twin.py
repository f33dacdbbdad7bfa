"""The float16 form of a bundle's float network, to time against: what `--format fp16` exports, of no checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qncd_deploy.bundle import FileFacts
from qncd_deploy.errors import BundleError, first_line
from qncd_deploy.export.passes.half import HalfRemainder
from qncd_deploy.export.save import save_siblings
from qncd_deploy.files import sha256_file
from qncd_deploy.quant.policy import FLOAT_FORMAT
from qncd_deploy.runtime import Bundle

GRAPH = "unet-half.onnx"


@contextmanager
def half_twin(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle with nothing quantized and float16 for its GPU graph, for as long as the block lasts: its files are
    links to the bundle's, its graph is in a folder that goes in the end.

    Raises: ExportError for a network that has no float16 form, BundleError if there is no room for it.
    """
    manifest = bundle.manifest
    with tempfile.TemporaryDirectory(prefix="qncd-") as scratch:
        folder = Path(scratch) / f"{bundle.path.resolve().name}-half"  # a name of its own, as its engines have
        folder.mkdir()
        for name in manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((bundle.path / name).resolve())
        model = ir.load(bundle.file("float"))
        HalfRemainder()(model)
        try:
            written = save_siblings({GRAPH: model}, folder)
        except OSError as exc:
            raise BundleError(f"{folder}: cannot be written ({first_line(exc)}). Name a roomier TMPDIR.") from exc
        facts = {path.name: FileFacts(sha256_file(path), path.stat().st_size) for path in written}
        roles = {role: name for role, name in manifest.roles.items() if role not in bundle.network_roles("trt")}
        yield replace(
            bundle,
            path=folder,
            manifest=replace(
                manifest,
                format=FLOAT_FORMAT,
                roles={**roles, "trt": GRAPH},
                files={**manifest.files, **facts},
            ),
        )
