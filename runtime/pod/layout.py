"""From a publication in the store to a model repository that Triton may watch and repair.

Weights are links into the store, or copies; the rest are copies. A version is laid out in three steps, so that a
running pod can hold two and serve one: its directories; then the configurations, which name the one version that a load
brings; and last the server's settings, which say what a restart comes back with.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BadEnvironment
from runtime.pod.model_store import Publication, PublishedFile, file_digest
from runtime.settings import FILE_NAME, ServerSettings

_WEIGHTS = (".plan", ".onnx", ".data")
_CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class Layout:
    """`threads` is set where the model leaves them open: the cores of the node are not the pod's."""

    store: Path
    into: Path
    copy_weights: bool = False
    threads: int | None = None


def lay_out(publication: Publication, layout: Layout) -> None:
    """The whole repository. Settings come last, so an interrupted layout is never served.

    Raises BadEnvironment for a file that is not as published.
    """
    lay_out_version(publication, layout)
    lay_out_configs(publication, layout)
    lay_out_settings(publication, layout)


def lay_out_version(publication: Publication, layout: Layout) -> None:
    """The version's directories, beside those of other versions."""
    for model in publication.models:  # an ensemble's version is an empty folder, which a bucket cannot hold
        (layout.into / model / str(publication.version)).mkdir(parents=True, exist_ok=True)
    for file in publication.files:
        if file.name == FILE_NAME or file.name.endswith(f"/{_CONFIG}"):
            continue
        target = _bring(publication, file, layout)
        if layout.threads is not None and target.name == FILE_NAME:
            _set_threads(target, layout.threads)


def lay_out_configs(publication: Publication, layout: Layout) -> None:
    """Configurations with which Triton loads this version and no other, whatever lies beside it."""
    for file in publication.files:
        if file.name.endswith(f"/{_CONFIG}"):
            _bring(
                publication, file, layout, f"\nversion_policy {{ specific {{ versions: {publication.version} }} }}\n"
            )


def lay_out_settings(publication: Publication, layout: Layout) -> ServerSettings:
    (file,) = (file for file in publication.files if file.name == FILE_NAME)
    return ServerSettings.load(_bring(publication, file, layout).parent)


def _bring(publication: Publication, file: PublishedFile, layout: Layout, more: str = "") -> Path:
    """One file, checked by its size (links) or its content (copies), and `more` at its end."""
    source, target = publication.folder(layout.store) / "repository" / file.name, layout.into / file.name
    _require_size(source, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if _is_weights(file.name) and not layout.copy_weights:
        target.unlink(missing_ok=True)
        target.symlink_to(source)
        return target
    partial = target.with_name(f".{target.name}.partial")  # the one that is there goes on being read until the end
    shutil.copyfile(source, partial)
    if file_digest(partial) != file.sha256:
        partial.unlink()
        raise BadEnvironment(f"{source} is not the file that was published; run engine-build again")
    if more:
        with partial.open("a") as stream:
            stream.write(more)
    return partial.replace(target)


def _is_weights(name: str) -> bool:
    """`graph.onnx`, `model.sm89.plan`, `model.plan.rank0`; not the records beside them."""
    return bool(set(Path(name).suffixes) & set(_WEIGHTS)) and not name.endswith(".json")


def _require_size(path: Path, file: PublishedFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadEnvironment(f"{path}: {error.strerror}; the store has lost a file, run engine-build again") from error
    if size != file.bytes:
        raise BadEnvironment(f"{path}: {size} bytes, {file.bytes} were published; run engine-build again")


def _set_threads(path: Path, threads: int) -> None:
    data = json.loads(path.read_text("utf-8"))
    if data.get("threads", threads) is None:
        path.write_text(json.dumps({**data, "threads": threads}, indent=2) + "\n")
