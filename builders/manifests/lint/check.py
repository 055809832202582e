"""All offline checks over a set of files: strict YAML, schemas, then the lint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builders.errors import CheckError
from builders.manifests.lint import lint
from builders.manifests.lint.objects import Finding, KubeObject, ManifestError, ObjectSet, read_objects
from builders.manifests.lint.schemas import SUPPORTED, schema_findings
from builders.manifests.lint.versions import removed_versions


class ManifestFault(CheckError):
    """Manifests that a cluster would refuse, or accept and then fail on."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(f"{len(findings)} findings:\n" + "\n".join(f"  {finding}" for finding in findings))


def check_text(text: str, source: str, versions: Sequence[str] = SUPPORTED) -> list[Finding]:
    """Findings over one YAML stream. Raises ManifestError when it is no Kubernetes YAML."""
    objects, findings = read_objects(text, source)
    return findings + _check(objects, versions)


def check_files(files: Sequence[Path], versions: Sequence[str] = SUPPORTED) -> tuple[int, list[Finding]]:
    """Number of objects and the findings over files, which are one set: a reference may lead from one to another.

    A folder stands for the YAML files directly in it. Raises ManifestError for what cannot be read.
    """
    objects: list[KubeObject] = []
    findings: list[Finding] = []
    for file in (part for path in files for part in _opened(path)):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            got = (error.strerror or str(error)) if isinstance(error, OSError) else "no UTF-8 text"
            raise ManifestError(str(file), got=got, expected="a readable YAML file", fix="check the path") from error
        found, twice = read_objects(text, str(file))
        objects += found
        findings += twice
    return len(objects), findings + _check(objects, versions)


def _opened(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
    if not found:
        raise ManifestError(str(path), got="a folder without YAML", expected="manifests", fix="name the files")
    return found


def _check(objects: Sequence[KubeObject], versions: Sequence[str]) -> list[Finding]:
    """Schemas first. The lint trusts types, so it waits until they hold; a kind without a schema is left out of it."""
    removed = list(removed_versions(ObjectSet(tuple(objects))))
    gone = {finding.object for finding in removed}
    faults = [finding for item in objects if item.title not in gone for finding in schema_findings(item, versions)]
    unknown = {finding.object for finding in faults if finding.rule == "no-schema"}
    if any(finding.rule == "schema" for finding in faults):
        return removed + faults
    return removed + faults + lint(ObjectSet(tuple(item for item in objects if item.title not in gone | unknown)))
