"""The model store: where a build leaves a repository, and where pods find the one that fits them.

    <store>/<model>/<platform>/<key>-<content>/
      repository/      a Triton model repository
      published.json   what it is; written last, so a directory without it does not count yet

The key says what engines were built for: TensorRT version, SMs, graph. Nothing is renamed and nothing is written twice,
because buckets that are mounted as file systems can do neither. So the store only offers versions; which of them is
served is said outside of it (`wait_for`).
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
from runtime.pod.node import Node, same_release
from runtime.settings import FILE_NAME, ServerSettings, Settings

PUBLISHED = "published.json"
ANY = "any"
_POLL_S = 5.0
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
    """One repository in the store. `files` are relative to `repository/`.

    `version` rises with each publication of the model for the same hardware, whatever number the build had: a Job with
    fresh scratch always builds version 1. Jobs for different GPUs count apart, and so in step.
    """

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

    @property
    def load_order(self) -> tuple[str, ...]:
        """Into a server that runs: first the part that is likeliest to fail, and the ensemble when all are there."""
        return (*(name for name in reversed(self.models) if name != self.model), self.model)

    def folder(self, store: Path) -> Path:
        return store / self.model / self.platform / self.key


def publish(repository: Path, platform: Literal["cpu", "gpu"], store: Path) -> tuple[Publication, bool]:
    """Copies the newest version of a built repository into the store; whether it was there already.

    Raises BadEnvironment for a folder that is no repository of ours, OSError when the store cannot be written.
    """
    settings = ServerSettings.load(repository)
    sources = list(_files(repository, settings))
    engines = tuple(_engine_keys(repository, sources))
    publication = Publication(
        model=settings.ensemble,
        models=settings.models,
        platform=platform,
        version=_next_version(publications(store, settings.ensemble, platform), engines),
        content_digest=settings.content_digest,
        published_ns=time.time_ns(),
        engines=engines,
        files=(),
    )
    folder = publication.folder(store)
    known = _read(folder / PUBLISHED)
    if known is not None:
        return known, True
    shutil.rmtree(folder, ignore_errors=True)  # of a Job that was cut off
    files = []
    for name in sources:
        renamed = _renamed(name, settings.version, publication.version)
        target = folder / "repository" / renamed
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name == FILE_NAME:
            target.write_text(_renumbered((repository / name).read_text("utf-8"), publication.version))
        else:
            shutil.copyfile(repository / name, target)
        files.append(PublishedFile(name=renamed, bytes=target.stat().st_size, sha256=file_digest(target)))
    publication = publication.model_copy(update={"files": tuple(files)})
    (folder / PUBLISHED).write_text(publication.model_dump_json(indent=2) + "\n")
    return publication, False


def _next_version(offered: Sequence[Publication], engines: Sequence[EngineKey]) -> int:
    """After those that could be served in its place: for the CPU all, else those for one of the same GPUs."""
    targets = {engine.target for engine in engines}
    rivals = (item for item in offered if not targets or targets & {engine.target for engine in item.engines})
    return 1 + max((item.version for item in rivals), default=0)


def _renamed(name: str, built: int, version: int) -> str:
    """`<model>/<built>/…` -> `<model>/<version>/…`; files beside the versions keep their names."""
    model, separator, rest = name.partition(f"/{built}/")
    return f"{model}/{version}/{rest}" if separator else name


def _renumbered(text: str, version: int) -> str:
    """Settings of the server, or of a model that reports which version it is."""
    data = json.loads(text)
    for part in (data, data.get("served", {})):
        if "version" in part:
            part["version"] = version
    return json.dumps(data, indent=2) + "\n"


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


def file_digest(path: Path) -> str:
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


def choose(offered: Sequence[Publication], node: Node, graph_digest: str, rolled_out: int) -> Publication | None:
    """The version that was rolled out, where it fits the node; else the first after it that does.

    So before the first rollout (0) the first version is served, and nothing newer before `trireme load-version` has
    brought it. Only a node that the version does not fit, of a new TensorRT or GPU, may go on to a later one.
    """
    fitting = [item for item in offered if item.version >= rolled_out and misfit(item, node, graph_digest) is None]
    return min(fitting, key=lambda item: (item.version, -item.published_ns), default=None)


def wait_for(
    store: Path,
    model: str,
    platform: str,
    node: Node,
    graph_digest: str,
    wait_s: float,
    report: Callable[[str], None],
    rolled_out: int = 0,
) -> Publication:
    """What this node is to serve (see `choose`), as soon as it is there.

    What does not fit is named at once, and again when the time is over: BadEnvironment, which the pod shows.
    """
    end, said = time.monotonic() + wait_s, ""
    while True:
        offered = publications(store, model, platform)
        chosen = choose(offered, node, graph_digest, rolled_out)
        if chosen is not None:
            return chosen
        state = _unfit_text(offered, store / model / platform, node, graph_digest, rolled_out)
        if state != said:
            report(state)
            said = state
        if time.monotonic() >= end:
            raise BadEnvironment(f"waited {wait_s:.0f} s: {state}")
        time.sleep(min(_POLL_S, max(0.0, end - time.monotonic())))


def _unfit_text(offered: Sequence[Publication], where: Path, node: Node, graph_digest: str, rolled_out: int) -> str:
    if not offered:
        return f"{where} holds no model yet; the Job engine-build publishes it (trireme status names its state)"

    def reason(item: Publication) -> str:
        older = f"version {item.version}, and version {rolled_out} was rolled out"
        return older if item.version < rolled_out else str(misfit(item, node, graph_digest))

    reasons = "; ".join(f"{item.key}: {reason(item)}" for item in offered[:3])
    return (
        f"no engine in {where} fits this node ({node}). Refused: {reasons}. "
        "Run the engine-build Job on this GPU type with this release, or move the pods to the GPU that was built for"
    )
