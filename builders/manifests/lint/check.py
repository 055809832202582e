"""All offline checks over a set of files: strict YAML, schemas, then the lint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builders.errors import CheckError
from builders.manifests.lint import lint
from builders.manifests.lint.objects import Finding, KubeObject, ManifestError, ObjectSet, read_objects
from builders.manifests.lint.schemas import SUPPORTED, Definitions, is_namesake, schema_findings, sound_part
from builders.manifests.lint.versions import removed_versions


class ManifestFault(CheckError):
    """Manifests that a cluster would refuse, or accept and then fail on."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(f"{len(findings)} findings:\n" + "\n".join(f"  {finding}" for finding in findings))


@dataclass(frozen=True)
class Checked:
    """What was read, and what was found, without what comments beside the objects switch off."""

    objects: tuple[KubeObject, ...]
    findings: tuple[Finding, ...]

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        return {item.title: (item.source, item.line) for item in self.objects}


def check_text(text: str, source: str, versions: Sequence[str] = SUPPORTED) -> list[Finding]:
    """Findings over one YAML stream. Raises ManifestError when it is no Kubernetes YAML."""
    return list(check_texts([(source, text)], versions).findings)


def check_texts(
    texts: Sequence[tuple[str, str]], versions: Sequence[str] = SUPPORTED, given: Definitions | None = None
) -> Checked:
    """Over streams by the names of their sources, which are one set: a reference may lead from one to another."""
    objects: list[KubeObject] = []
    findings: list[Finding] = []
    for source, text in texts:
        found, faults = read_objects(text, source)
        objects += found
        findings += faults
    findings += _check(objects, versions, given)
    ignored = {(item.title, rule) for item in objects for rule in item.ignored}
    kept = [finding for finding in findings if (finding.object, finding.rule) not in ignored]
    return Checked(tuple(objects), tuple(kept))


def file_texts(path: Path) -> list[tuple[str, str]]:
    """Sources and their text. A folder stands for the YAML files directly in it. Raises ManifestError for what cannot
    be read."""
    return [(str(file), _read(file)) for file in _opened(path)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = (error.strerror or str(error)) if isinstance(error, OSError) else "no UTF-8 text"
        raise ManifestError(str(file), got=got, expected="a readable YAML file", fix="check the path") from error


def _opened(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
    if not found:
        raise ManifestError(str(path), got="a folder without YAML", expected="manifests", fix="name the files")
    return found


def _check(objects: Sequence[KubeObject], versions: Sequence[str], given: Definitions | None) -> list[Finding]:
    """Schemas first. The lint trusts types, so what a schema refuses is taken away before, as is a kind without one."""
    removed = list(removed_versions(ObjectSet(tuple(objects))))
    gone = {finding.object for finding in removed}
    faults: list[Finding] = []
    sound: list[KubeObject] = []
    lost: dict[str, list[str]] = {}
    for item in objects:
        if item.title in gone:
            continue
        found = schema_findings(item, versions, given)
        faults += found
        if is_namesake(item):
            continue  # its schema is all that is known of it
        if not found:
            sound.append(item)
        elif found[0].rule != "no-schema":
            part, paths = sound_part(item, versions[-1], given)
            lost[item.title] = paths
            sound += [part] if part is not None else []
    # A field that a small schema does not know takes nothing away that the rules ask about.
    whole = all(finding.rule in ("no-schema", "unknown-field") for finding in faults)
    linted = lint(ObjectSet(tuple(sound)), whole)
    return removed + faults + [item for item in linted if not _follows(item, lost.get(item.object, []))]


def _follows(finding: Finding, lost: Sequence[str]) -> bool:
    """Whether it is about what was taken away, or about a place that lacks it therefore."""
    return any(finding.path.startswith(path) or path.startswith(finding.path) for path in lost)
