"""The model store: where a build leaves a repository, and where pods find the one that fits them.

    <store>/<model>/<platform>/<key>-<content>/
      repository/      a Triton model repository
      published.json   what it is; written last, so a directory without it does not count yet

The key says what engines were built for: TensorRT version, SMs, graph. Nothing is renamed and nothing is written twice,
because buckets that are mounted as file systems can do neither.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError

from runtime.errors import BadEnvironment
from runtime.node import Node, same_release
from runtime.settings import FILE_NAME, ServerSettings, Settings

PUBLISHED = "published.json"
ANY = "any"
_POLL_S = 5.0
_WEIGHTS = (".plan", ".onnx", ".data")
_CHUNK = 1 << 20


class EngineKey(Settings):
    """What an engine was built for. It loads nowhere else."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # read from the engine's whole record

    flavour: str
    version: str
    target: str
    source_digest: str

    def __str__(self) -> str:
        return f"{self.flavour} {self.version} {self.target} graph {self.source_digest[:12]}"


class PublishedFile(Settings):
    name: str
    bytes: int
    sha256: str


class Publication(Settings):
    """One repository in the store. `files` are relative to `repository/`."""

    model: str
    models: tuple[str, ...]
    platform: Literal["cpu", "gpu"]
    version: int
    content_digest: str
    published_ns: int
    engines: tuple[EngineKey, ...]
    files: tuple[PublishedFile, ...]

    @property
    def key(self) -> str:
        """Directory name."""
        parts = ["cpu"]
        if self.engines:
            first = self.engines[0]
            targets = "+".join(sorted({engine.target for engine in self.engines}))
            parts = [first.flavour, first.version, targets, first.source_digest[:12]]
        return "-".join([*parts, self.content_digest[:12]])


def publish(repository: Path, platform: Literal["cpu", "gpu"], store: Path) -> tuple[Publication, bool]:
    """Copies the newest version of a built repository into the store; whether it was there already.

    Raises BadEnvironment for a folder that is no repository of ours, OSError when the store cannot be written.
    """
    settings = ServerSettings.load(repository)
    sources = list(_files(repository, settings))
    publication = Publication(
        model=settings.ensemble,
        models=settings.models,
        platform=platform,
        version=settings.version,
        content_digest=settings.content_digest,
        published_ns=time.time_ns(),
        engines=tuple(_engine_keys(repository, sources)),
        files=tuple(_described(repository, name) for name in sources),
    )
    folder = store / publication.model / platform / publication.key
    known = _read(folder / PUBLISHED)
    if known is not None:
        return known, True
    shutil.rmtree(folder, ignore_errors=True)  # of a Job that was cut off
    for file in publication.files:
        target = folder / "repository" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / file.name, target)
    (folder / PUBLISHED).write_text(publication.model_dump_json(indent=2) + "\n")
    return publication, False


def _files(repository: Path, settings: ServerSettings) -> Iterator[str]:
    """Files of the version that is served, relative to the repository; the server's settings last."""
    for model in settings.models:
        yield f"{model}/config.pbtxt"
        version = repository / model / str(settings.version)
        found = (path for path in version.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        yield from sorted(str(path.relative_to(repository)) for path in found)
    yield FILE_NAME


def _engine_keys(repository: Path, names: Sequence[str]) -> Iterator[EngineKey]:
    for name in names:
        if ".plan" in name and name.endswith(".json"):
            yield EngineKey.model_validate_json((repository / name).read_text())


def _described(repository: Path, name: str) -> PublishedFile:
    path = repository / name
    return PublishedFile(name=name, bytes=path.stat().st_size, sha256=_digest(path))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def publications(store: Path, model: str, platform: str) -> list[Publication]:
    """What the store offers, the newest first. What is half-written has no record yet."""
    found = (_read(path) for path in (store / model / platform).glob(f"*/{PUBLISHED}"))
    return sorted((item for item in found if item is not None), key=lambda item: -item.published_ns)


def _read(path: Path) -> Publication | None:
    try:
        return Publication.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None


def misfit(publication: Publication, node: Node, graph_digest: str) -> str | None:
    """Why this node cannot serve the publication; None when it can."""
    if publication.platform == "cpu":
        return None
    reasons = []
    for engine in publication.engines:
        here = node.tensorrt.get(engine.flavour)
        if graph_digest not in (ANY, engine.source_digest):
            reasons.append(f"{engine}: graph {graph_digest[:12]} is wanted")
        elif engine.target != node.target:
            reasons.append(f"{engine}: this node has {node.target or 'no GPU'}")
        elif here is None or not same_release(here, engine.version):
            reasons.append(f"{engine}: this image has {engine.flavour} {here or 'not at all'}")
        else:
            return None
    return "; ".join(reasons) or "no engine in it"


def wait_for(
    store: Path, model: str, platform: str, node: Node, graph_digest: str, wait_s: float, report: Callable[[str], None]
) -> Publication:
    """The newest publication that this node can serve, as soon as there is one.

    What does not fit is named at once, and again when the time is over: BadEnvironment, which the pod shows.
    """
    end, said = time.monotonic() + wait_s, ""
    while True:
        offered = publications(store, model, platform)
        for publication in offered:
            if misfit(publication, node, graph_digest) is None:
                return publication
        state = _unfit_text(offered, store, model, platform, node, graph_digest)
        if state != said:
            report(state)
            said = state
        if time.monotonic() >= end:
            raise BadEnvironment(f"waited {wait_s:.0f} s: {state}")
        time.sleep(min(_POLL_S, max(0.0, end - time.monotonic())))


def _unfit_text(
    offered: Sequence[Publication], store: Path, model: str, platform: str, node: Node, graph_digest: str
) -> str:
    where = store / model / platform
    if not offered:
        return f"{where} holds no model yet; the Job engine-build publishes it (trireme status names its state)"
    reasons = "; ".join(f"{item.key}: {misfit(item, node, graph_digest)}" for item in offered[:3])
    return (
        f"no engine in {where} fits this node ({node}). Refused: {reasons}. "
        "Run the engine-build Job on this GPU type with this release, or move the pods to the GPU that was built for"
    )


def lay_out(
    publication: Publication, store: Path, into: Path, *, copy_weights: bool = False, threads: int | None = None
) -> None:
    """A repository in `into` that Triton may watch and repair: weights are links into the store, the rest are copies.

    `threads` is set where the model leaves them open: the cores of the node are not the pod's. Settings of the server
    come last, so an interrupted layout is never served. Raises BadEnvironment for a file that is not as published.
    """
    source = store / publication.model / publication.platform / publication.key / "repository"
    for model in publication.models:  # an ensemble's version is an empty folder, which a bucket cannot hold
        (into / model / str(publication.version)).mkdir(parents=True, exist_ok=True)
    for file in publication.files:
        target = into / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        _require_size(source / file.name, file)
        if _is_weights(file.name) and not copy_weights:
            target.symlink_to(source / file.name)
            continue
        shutil.copyfile(source / file.name, target)
        if _digest(target) != file.sha256:
            raise BadEnvironment(f"{source / file.name} is not the file that was published; run engine-build again")
        if threads is not None and file.name.endswith(FILE_NAME):
            _set_threads(target, threads)


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
    data = json.loads(path.read_text())
    if data.get("threads", threads) is None:
        path.write_text(json.dumps({**data, "threads": threads}, indent=2) + "\n")
