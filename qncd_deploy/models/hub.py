"""A diffusers model from the Hugging Face Hub, where the user names one; nothing else here downloads anything.

Of a repository come the configs and the weights of the parts that an export reads, in one precision and one format:
no other framework's files, no variants, no single-file copies beside the folder.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from qncd_deploy.errors import CheckpointError, UsageError, first_line

_PARTS = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_ROOT = ("model_index.json", "config.json", "scheduler_config.json")
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
    r"(\.index(\.(?P<of>\w+))?\.json)?"
)
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def hub_name(hub_id: str) -> str:
    """What is made from ORG/NAME is called NAME. Raises UsageError if it is no such id."""
    if not _ID.fullmatch(hub_id):
        raise UsageError(f"--from-hub {hub_id}: expected ORG/NAME, as in the model's address on the hub.")
    return hub_id.partition("/")[2]


def fetch_from_hub(hub_id: str) -> Path:
    """Download ORG/NAME, or what of it is not in the hub's own cache yet -> the folder it lies in.

    Raises: UsageError for an id that is none; CheckpointError if the hub cannot be reached, does not have the model or
    asks for a login, or if it is no diffusers folder.
    """
    hub_name(hub_id)
    from huggingface_hub import HfApi, snapshot_download

    try:
        wanted = wanted_files(HfApi().list_repo_files(hub_id))
        if not wanted:
            raise CheckpointError(
                f"--from-hub {hub_id}: no UNet with its config among its files, expected a diffusers folder. Download "
                "the checkpoint that you mean, and give its path."
            )
        return Path(snapshot_download(hub_id, allow_patterns=list(wanted)))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's, its transport's and the disk's errors have no class in common
        raise CheckpointError(
            f"--from-hub {hub_id}: cannot be downloaded ({first_line(error)}). Check the name, the network and, for a "
            "model that asks for one, your login; or give the path of a copy."
        ) from error


def wanted_files(names: list[str]) -> tuple[str, ...]:
    """Of a repository's files those that an export reads; () if it is no diffusers folder."""
    paths = [PurePosixPath(name) for name in names]
    inside = [path for path in paths if len(path.parts) == 2 and path.parts[0] in _PARTS]
    # a model of one network may lie in the root, whose other files are copies of the whole in one
    inside += [path for path in paths if len(path.parts) == 1 and path.name.startswith("diffusion_pytorch_model")]
    chosen = [
        path for home in {path.parent for path in inside} for path in _weights([p for p in inside if p.parent == home])
    ]
    words = [path for path in inside if path.suffix in (".json", ".txt") and not _WEIGHTS.fullmatch(path.name)]
    words += [path for path in paths if str(path) in _ROOT]
    unet = next((home for home in ("unet", ".") if any(str(path.parent) == home for path in chosen)), None)
    if unet is None or PurePosixPath(unet, "config.json") not in words:
        return ()
    return tuple(sorted(map(str, [*chosen, *words])))


def _weights(files: list[PurePosixPath]) -> list[PurePosixPath]:
    """One part's weights: of safetensors and pickles the former, of variants such as fp16 the plain one."""
    matches = {path: match for path in files if (match := _WEIGHTS.fullmatch(path.name))}
    if not matches:
        return []

    def kind(path: PurePosixPath) -> tuple[bool, str]:
        match = matches[path]
        return match["kind"] != "safetensors", match["variant"] or match["of"] or ""

    best = min(map(kind, matches))
    return [path for path in matches if kind(path) == best]
