"""A model repository on disk: versions are directories, written beside and renamed in place.

    <repository>/
      settings.json                  ServerSettings, replaced last: the commit point of a publication
      <name>/config.pbtxt            <version>/proof.json alone: an ensemble has no files of its own
      <name>-tokenizer/config.pbtxt  <version>/model.py, tokenizer.json, settings.json
      <name>-encoder/config.pbtxt    <version>/model.py, graph.onnx or model.<sm>.plan, settings.json
                                     tensor ranks on CPU: ranks.json, the pieces and weights of every rank
                                     tensor ranks on GPUs: model.plan.rank<r>, and model.plan, which is rank 0's
      <name>-stage<s>/config.pbtxt   <version>/model.<sm>.plan: a pipeline stage on its GPU, instead of the encoder
      <name>/config.pbtxt            generation, alone: <version>/model.py, tokenizer.json, settings.json, proof.json,
                                     and graphs, rank programs, or model.<sm>.<cache length>.plan

A running Triton keeps serving the old version until it is told to load the new one. The previous version stays for a
roll-back; older ones go.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from builders.artifacts import Checkpoint, Partition, ProofFile, RepositoryEntry, file_digest
from builders.repository.directories import ModelDirectory, Part, model_directories
from builders.spec import DeploymentSpec, Platform
from builders.store.atomic import atomic_directory
from builders.store.store import link_or_copy
from runtime.errors import BadEnvironment
from runtime.model_config import CONFIG, pin
from runtime.proof.record import PROOF_FILE
from runtime.settings import FILE_NAME, EncoderModelSettings, GeneratorModelSettings, ServedModel, ServerSettings


def publish(
    spec: DeploymentSpec,
    platform: Platform,
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    repository: Path,
    partition: Partition | None = None,
    *,
    proof: ProofFile,
    notes: Mapping[str, str] = MappingProxyType({}),
    keep: Collection[int] = (),
    least: int = 1,
) -> tuple[RepositoryEntry, bool]:
    """Writes the service as a new version, unless the newest version is the same; says which.

    `parts` is the one graph that the CPU serves, or the files of its ranks, or the engines of the GPU targets;
    `partition` is what ranks come from, `proof` what the version proves itself with where it serves; `notes` are texts
    by file name for a later reader, which go beside what is served and make no version new. Versions of `keep` stay,
    and a new one gets no number under `least`. One publication at a time.

    Raises CheckError for an ensemble whose edges do not fit, UnsupportedError for ranks that Triton cannot run. On any
    failure what was served stays as it was.
    """
    precision = spec.precision_on(platform)
    digest = hashlib.sha256("".join(sorted(part.digest for part in parts)).encode()).hexdigest()

    def models(number: int) -> dict[str, ModelDirectory]:
        served = ServedModel(
            ensemble=spec.name, version=number, precision=precision, model_digest=digest, spec_digest=spec.digest
        )
        found = model_directories(spec, platform, checkpoint, parts, partition, served)
        asked = found[spec.name]  # by clients
        return {**found, spec.name: replace(asked, files={**asked.files, PROOF_FILE: proof.file_path})}

    content = _content_digest(models(0))
    with _locked(repository):
        current = _current(repository)
        unchanged = current is not None and current.content_digest == content
        if current is not None and unchanged:
            version = current.version
        else:
            there = [number for name in models(0) for number in _versions(repository / name)]
            version = max(1 + max(there, default=0), least)
            _write(repository, models(version), version, notes)
            _commit(repository, _server_settings(spec, version, content, tuple(models(version)), proof))
            _prune(repository, {version, current.version if current else version, *keep})
    entry = RepositoryEntry(
        repository=repository,
        ensemble=spec.name,
        models=tuple(models(version)),
        version=version,
        platform=platform,
        precision=precision,
        model_digest=digest,
        spec_digest=spec.digest,
    )
    return entry, unchanged


def take_back(repository: Path, settings: ServerSettings) -> None:
    """The version that was published with `settings` is current again, and those after it are gone. Nothing changes
    where it is so. Raises BadEnvironment when its directories are gone."""
    with _locked(repository):
        _make_current(repository, settings)
        there = {number for name in settings.models for number in _versions(repository / name)}
        _prune(repository, {number for number in there if number <= settings.version})


def hold_back(repository: Path, settings: ServerSettings) -> None:
    """The version that was published with `settings` is what a server starts with, though later ones lie beside it.
    Raises BadEnvironment when its directories are gone."""
    with _locked(repository):
        _make_current(repository, settings)


def missing_models(repository: Path, settings: ServerSettings) -> list[str]:
    """Those of which the version that was published with `settings` is gone."""
    return [name for name in settings.models if not (repository / name / str(settings.version)).is_dir()]


def _make_current(repository: Path, settings: ServerSettings) -> None:
    if missing := missing_models(repository, settings):
        raise BadEnvironment(
            f"{repository}: version {settings.version} of {', '.join(missing)} is gone; run `trireme build` again"
        )
    for name in settings.models:
        pin(repository / name / CONFIG, settings.version)
    _commit(repository, settings)


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Two builds of one name would otherwise choose the same version number."""
    repository.mkdir(parents=True, exist_ok=True)
    with (repository / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _content_digest(models: dict[str, ModelDirectory]) -> str:
    def lines() -> Iterator[str]:
        for name, model in sorted(models.items()):
            yield f"{name} {model.config} {model.settings.model_dump_json() if model.settings else ''}"
            for file, source in sorted(model.files.items()):
                yield f"{name}/{file} {file_digest(source)}"

    return hashlib.sha256("\n".join(lines()).encode()).hexdigest()


def _write(repository: Path, models: dict[str, ModelDirectory], version: int, notes: Mapping[str, str]) -> None:
    """Every version directory first, then every config.pbtxt; a failure takes the new directories away again."""
    try:
        for name, model in models.items():
            with atomic_directory(repository / name / str(version)) as work:
                for file, source in model.files.items():
                    # Weights are shared with the store; what others own is copied.
                    place = link_or_copy if source.suffix in (".onnx", ".data", ".plan") else shutil.copyfile
                    place(source, work / file)
                if model.settings is not None:
                    model.settings.save(work)
                if isinstance(model.settings, (EncoderModelSettings, GeneratorModelSettings)):
                    for file, text in notes.items():
                        (work / file).write_text(text)
        for name, model in models.items():
            _replace_text(repository / name / CONFIG, model.config)
    except BaseException:
        for name in models:
            shutil.rmtree(repository / name / str(version), ignore_errors=True)
        raise


def _server_settings(
    spec: DeploymentSpec, version: int, content: str, models: tuple[str, ...], proof: ProofFile
) -> ServerSettings:
    return ServerSettings(
        ensemble=spec.name,
        models=models,
        version=version,
        response_cache_bytes=spec.serving.response_cache_bytes,
        rate_limited=spec.serving.rate_limit is not None,
        content_digest=content,
        proof_digest=file_digest(proof.file_path),
    )


def _commit(repository: Path, settings: ServerSettings) -> None:
    _replace_text(repository / FILE_NAME, json.dumps(settings.model_dump(mode="json"), indent=2) + "\n")


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _current(repository: Path) -> ServerSettings | None:
    """The last publication, unless one of its directories is gone."""
    try:
        settings = ServerSettings.load(repository)
    except BadEnvironment:
        return None
    return None if missing_models(repository, settings) else settings


def _versions(model: Path) -> list[int]:
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdigit()) if model.is_dir() else []


def _prune(repository: Path, keep: Collection[int]) -> None:
    """What is served now and what was served before stay; the rest is older, or left by a publication cut off."""
    for name in ServerSettings.load(repository).models:
        for number in _versions(repository / name):
            if number not in keep:
                shutil.rmtree(repository / name / str(number), ignore_errors=True)
