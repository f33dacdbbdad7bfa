"""What a bundle's network can be told: a row for every class or prompt, by graph input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qncd_deploy.bundle import ModelFacts
from qncd_deploy.engines.eps_model import input_roles
from qncd_deploy.errors import BundleError
from qncd_deploy.files import load_npz
from qncd_deploy.prompts import read_prompts, size_rows

Find = Callable[[str], Path]
"""The file with a role in the bundle."""


def condition_table(model: ModelFacts, find: Find) -> Mapping[str, np.ndarray] | None:
    """What the network is told of every class, (classes, ...) by graph input; None without classes. Raises BundleError
    for a file that is not what was written.
    """
    condition = model.condition
    if condition is None:
        return None
    if condition.kind == "text":
        table = load_npz(find("prompt-embedding"))
        if model.text is not None and model.text.time_ids is not None:  # the file's are those of the bundle's own size
            table["time_ids"] = size_rows(model.text.time_ids, len(table["time_ids"]))
        return table
    (told,) = input_roles({spec.name: spec for spec in model.inputs}).conditions
    if condition.kind == "class-labels":
        return {told.name: np.arange(condition.classes)}
    path = find("class-embedding")
    try:
        rows: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise BundleError(f"{path}: not a readable array ({exc}). Run `qncd export` again.") from exc
    return {told.name: rows}


def bundle_prompts(model: ModelFacts, find: Find) -> tuple[str, ...] | None:
    """The bundle's own prompts, by label; None where the network takes none. Raises BundleError."""
    condition = model.condition
    if condition is None or condition.kind != "text":
        return None
    path = find("prompts")
    prompts = read_prompts(path)
    if len(prompts) != len(condition.valid):
        found = f"{len(prompts)} prompts, {len(condition.valid)} were encoded"
        raise BundleError(f"{path}: {found}. Run `qncd export` again.")
    return prompts
