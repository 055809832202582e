"""Schemas: built-in kinds from kubernetes-validate, strictly; custom resources from `custom_resources`.

kubernetes-validate's own entry point takes the newest schema that is not newer than asked, ignores the group's domain
and warns about kinds that it does not know. Here the version must be there, the group must match, and a kind without a
schema is a finding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources, util
from typing import Any

from builders.errors import MachineError
from builders.manifests.lint.custom_resources import CUSTOM_RESOURCES, SMALL
from builders.manifests.lint.objects import Finding, KubeObject

OLDEST, NEWEST = "1.35", "1.37"
SUPPORTED = (OLDEST, NEWEST)
_MOST_PER_OBJECT = 5
_ROUNDS = 20  # of taking away what a schema refuses
_SMALL = "a field that the small schema here knows; the project's own may know more"
_CHECK_SPELLING = "check the spelling, or give the project's CRDs: --crd DIR"


Definitions = Mapping[tuple[str, str], Mapping[str, Any]]  # (apiVersion, kind) -> schema, of CRDs that the user gives


def schema_findings(
    item: KubeObject, versions: Sequence[str] = SUPPORTED, given: Definitions | None = None
) -> list[Finding]:
    """Faults of one object at each Kubernetes minor version; the same fault is named once."""
    found: dict[tuple[str, str], Finding] = {}
    for version in versions:
        validator = _chosen(item, version, given)
        if validator is None:
            nowhere = all(_chosen(item, other, given) is None for other in versions)
            return [_no_schema(item, version, nowhere and item.api_version.rpartition("/")[0] in _groups(version))]
        for error in list(validator.iter_errors(item.data))[:_MOST_PER_OBJECT]:
            finding = _fault(item, _shown(error.absolute_path) or "(the object)", error, version)
            if error.validator == "additionalProperties" and error.schema.get(SMALL):
                finding = replace(finding, rule="unknown-field", expected=_SMALL, fix=_CHECK_SPELLING)
            found.setdefault((finding.path, finding.got), finding)
    return list(found.values())


def sound_part(
    item: KubeObject, version: str = NEWEST, given: Definitions | None = None
) -> tuple[KubeObject | None, list[str]]:
    """The object without what its schema refuses, and the paths of that; None when nothing useful is left."""
    validator, lost = _chosen(item, version, given), list[str]()
    if validator is None:
        return None, lost
    data = copy.deepcopy(dict(item.data))
    for _ in range(_ROUNDS):
        errors = sorted(validator.iter_errors(data), key=lambda error: -len(error.absolute_path))
        if not errors:
            return replace(item, data=data), lost
        path = list(errors[0].absolute_path)
        if errors[0].validator == "additionalProperties":
            holder, extra = _at(data, path), errors[0].schema.get("properties", {})
            gone = [key for key in holder if key not in extra]
            lost += [_shown([*path, key]) for key in gone]
            for key in gone:
                del holder[key]
            if gone:
                continue
        if len(path) < 2:
            return None, lost
        lost.append(_shown(path))
        del _at(data, path[:-1])[path[-1]]
    return None, lost


def _at(data: Any, path: Iterable[str | int]) -> Any:
    for part in path:
        data = data[part]
    return data


def _shown(path: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _fault(item: KubeObject, path: str, error: Any, version: str) -> Finding:
    message = str(error.message)
    got = message if len(message) <= 160 else f"{message[:157]}..."
    return Finding(
        "schema",
        item.title,
        path,
        got,
        f"what {item.api_version} allows ({version})",
        "see `kubectl explain` of that path",
    )


def _no_schema(item: KubeObject, version: str, of_kubernetes: bool) -> Finding:
    """In a group of Kubernetes' own, in which nobody defines kinds, there is no such kind."""
    got = f"{item.api_version} {item.kind}, which Kubernetes {version} does not have"
    if of_kubernetes:
        fix = "correct apiVersion and kind: the API server refuses them"
        return Finding("unknown-kind", item.title, "apiVersion", got, "a kind of that group and version", fix)
    return Finding(
        "no-schema",
        item.title,
        "apiVersion",
        got,
        "a built-in kind, or one of " + ", ".join(sorted(kind for _, kind in CUSTOM_RESOURCES)),
        "correct apiVersion and kind; for other custom resources give their CRDs: --crd DIR",
    )


def _chosen(item: KubeObject, version: str, given: Definitions | None) -> Any:
    """The given definition where there is one."""
    schema = (given or {}).get((item.api_version, item.kind))
    if schema is None:
        return _validator(item.api_version, item.kind, version)
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    return Draft202012Validator(schema)


@cache
def _validator(api_version: str, kind: str, version: str) -> Any:
    """A validator, or None when there is no schema. Custom resources do not depend on the cluster's version."""
    from jsonschema import Draft202012Validator

    custom = CUSTOM_RESOURCES.get((api_version, kind))
    pods = _definitions(version)
    if custom is not None:
        return Draft202012Validator(custom, registry=pods)
    group, _, number = api_version.rpartition("/")
    short = f"{group.partition('.')[0]}-{number}" if group else number
    file = _folder(version) / f"{kind.lower()}-{short}.json"
    if not file.is_file():
        return None
    schema = json.loads(file.read_text())
    known = schema.get("x-kubernetes-group-version-kind", [])
    if {"group": group, "version": number, "kind": kind} not in known:
        return None
    return Draft202012Validator(schema, registry=pods)


def _folder(version: str) -> Any:
    if util.find_spec("kubernetes_validate") is None:
        raise MachineError(
            "Kubernetes schemas",
            got="no module kubernetes_validate",
            expected="the package kubernetes-validate",
            fix="pip install 'trireme[kubernetes]'",
        )
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    if not folder.is_dir():
        raise MachineError(
            f"schemas of Kubernetes {version}",
            got="none in the installed kubernetes-validate",
            expected="schemas of that minor version",
            fix="pip install --upgrade kubernetes-validate",
        )
    return folder


def is_namesake(item: KubeObject, version: str = NEWEST) -> bool:
    """Whether another project's kind has the name of one that rules know: a Service that is no Service."""
    if item.api_version.rpartition("/")[0] in _groups(version) or (item.api_version, item.kind) in CUSTOM_RESOURCES:
        return False
    return item.kind in _names(version)


@cache
def _names(version: str) -> frozenset[str]:
    return frozenset(kind for _, kind in {*_kinds(version), *CUSTOM_RESOURCES})


@cache
def _groups(version: str) -> frozenset[str]:
    return frozenset(group for group, _ in _kinds(version))


@cache
def _kinds(version: str) -> frozenset[tuple[str, str]]:
    """API group and name of the built-in kinds."""
    contents = json.loads((_folder(version) / "_definitions.json").read_text())["$defs"]
    rows = (row for part in contents.values() for row in part.get("x-kubernetes-group-version-kind", []))
    return frozenset((row["group"], row["kind"]) for row in rows)


@cache
def _definitions(version: str) -> Any:
    """The definitions that schemas of this version refer to, read once: they are megabytes."""
    from referencing import Registry, Resource

    contents = json.loads((_folder(version) / "_definitions.json").read_text())
    return Resource.from_contents(contents) @ Registry()


def checked_kinds() -> Iterator[str]:
    """Custom resources with a schema here, for messages and documents."""
    return (f"{api_version} {kind}" for api_version, kind in sorted(CUSTOM_RESOURCES))
