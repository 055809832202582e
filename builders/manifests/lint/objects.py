"""Kubernetes objects as parsed YAML, and the few views of them that checks need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import yaml

from builders.errors import InputError
from builders.manifests.lint.severities import SEVERITIES, Severity

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")  # keys of a container


@dataclass(frozen=True)
class Finding:
    """One fault. `object` is `Kind/name`, `path` a dotted path inside it."""

    rule: str
    object: str
    path: str
    got: str
    expected: str
    fix: str

    @property
    def severity(self) -> Severity:
        return SEVERITIES[self.rule]

    def __str__(self) -> str:
        where = f"{self.severity}: {self.object} {self.path}: {self.rule}"
        return f"{where}: got {self.got}; expected {self.expected}. Fix: {self.fix}"


def refused(item: KubeObject, path: str, got: str, expected: str) -> Finding:
    """A value that the API server does not take."""
    return Finding("value", item.title, path, got, expected, "correct it: the API server refuses this")


class ManifestError(InputError):
    """A file that is no Kubernetes YAML."""


@dataclass(frozen=True)
class KubeObject:
    """One object. `data` is what the file says; nothing is defaulted.

    `source` and `line`: where its document begins. `ignored` are rules that a comment in it switches off.
    """

    data: Mapping[str, Any]
    source: str = ""
    line: int = 1
    ignored: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return str(self.data["kind"])

    @property
    def api_version(self) -> str:
        return str(self.data["apiVersion"])

    @property
    def name(self) -> str:
        return str(at(self.data, "metadata.name") or at(self.data, "metadata.generateName") or "")

    @property
    def namespace(self) -> str:
        return str(at(self.data, "metadata.namespace") or "")

    @property
    def title(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def labels(self) -> dict[str, str]:
        return mapping(self.data, "metadata.labels")


@dataclass(frozen=True)
class Pod:
    """A pod template. `path` is where its spec stands in the owner."""

    owner: KubeObject
    path: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    def containers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Path and container, init containers first, as they run."""
        for key in ("initContainers", "containers"):
            for index, container in enumerate(rows(self.spec, key)):
                yield f"{self.path}.{key}[{index}]", container

    def volumes(self) -> dict[str, Mapping[str, Any]]:
        return {str(item.get("name")): item for item in rows(self.spec, "volumes")}

    @property
    def port_names(self) -> set[str]:
        return {str(port["name"]) for _, box in self.containers() for port in rows(box, "ports") if port.get("name")}


_POD_PATHS = {
    "Pod": ("",),
    "Deployment": ("spec.template",),
    "StatefulSet": ("spec.template",),
    "DaemonSet": ("spec.template",),
    "ReplicaSet": ("spec.template",),
    "Job": ("spec.template",),
    "CronJob": ("spec.jobTemplate.spec.template",),
    "LeaderWorkerSet": ("spec.leaderWorkerTemplate.leaderTemplate", "spec.leaderWorkerTemplate.workerTemplate"),
}


@dataclass(frozen=True)
class ObjectSet:
    """Objects that are applied together. References are resolved inside it, by namespace."""

    objects: tuple[KubeObject, ...]

    def of(self, *kinds: str) -> Iterator[KubeObject]:
        return (item for item in self.objects if item.kind in kinds)

    def find(self, kind: str, name: object, namespace: str) -> KubeObject | None:
        return next((item for item in self.of(kind) if item.name == name and item.namespace == namespace), None)

    def pods(self) -> Iterator[Pod]:
        for item in self.objects:
            yield from pods_of(item)

    def selected(self, labels: Mapping[str, Any], namespace: str) -> list[Pod]:
        """Pods in the namespace that carry all these labels."""
        of_files = {key: text for key, text in labels.items() if not set_by_a_controller(key)}
        return [
            pod
            for pod in self.pods()
            if pod.owner.namespace == namespace and of_files.items() <= dict(pod.labels).items()
        ]


def pods_of(item: KubeObject) -> Iterator[Pod]:
    for path in _POD_PATHS.get(item.kind, ()):
        template = at(item.data, path) if path else item.data
        if isinstance(template, Mapping):
            where = f"{path}.spec" if path else "spec"
            yield Pod(item, where, mapping(template, "metadata.labels"), mapping(template, "spec"))


_BY_CONTROLLERS = (
    "leaderworkerset.sigs.k8s.io",
    "batch.kubernetes.io",
    "statefulset.kubernetes.io",
    "apps.kubernetes.io",
)


def set_by_a_controller(key: str) -> bool:
    """Labels that pods get when they are made: no file holds them."""
    return key.partition("/")[0] in _BY_CONTROLLERS or key in ("job-name", "controller-uid", "pod-template-hash")


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A LabelSelector against labels. An empty one matches everything; what a controller will set is taken as there."""
    wanted = {key: text for key, text in mapping(selector, "matchLabels").items() if not set_by_a_controller(key)}
    if not wanted.items() <= dict(labels).items():
        return False
    for item in rows(selector, "matchExpressions"):
        if set_by_a_controller(str(item.get("key"))):
            continue
        value, values = labels.get(str(item.get("key"))), item.get("values") or []
        operator = item.get("operator")
        held = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not held.get(str(operator), False):
            return False
    return True


def at(data: Any, path: str) -> Any:
    """The value at a dotted path, or None where the way ends."""
    for key in path.split("."):
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def mapping(data: Any, path: str) -> dict[str, Any]:
    value = at(data, path)
    return dict(value) if isinstance(value, Mapping) else {}


def rows(data: Any, path: str) -> list[Mapping[str, Any]]:
    """The mappings of a list, in order."""
    value = at(data, path)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, Sequence) else []


def number(data: Any, path: str, default: int) -> int:
    """A whole number, or the API's default where there is none (schemas allow null)."""
    value = at(data, path)
    return value if isinstance(value, int) else default


def words(data: Any, path: str) -> list[str]:
    value = at(data, path)
    return [str(word) for word in value] if isinstance(value, Sequence) and not isinstance(value, str) else []


class _Loader(yaml.CSafeLoader):
    """YAML as kubectl reads it: dates and `8080:80` stay text, `y` means yes, `0o17` and `1e3` are numbers.

    A key given twice is noted, where kubectl takes the last.
    """

    duplicates: list[tuple[str, int]]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    self.duplicates.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        found = cast("dict[Any, Any]", super().construct_mapping(node, deep))
        return {str(key).lower() if isinstance(key, bool) else key: part for key, part in found.items()}


_TAG = "tag:yaml.org,2002:"
_OTHERWISE = (f"{_TAG}timestamp", f"{_TAG}int", f"{_TAG}float")  # read by YAML 1.1's rules there, by Go's here
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _OTHERWISE]
    for first, found in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_INT = re.compile(r"[-+]?(?:0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
# What an unquoted word is to Go's reader and not to PyYAML's: its tag, the words, and how they may begin.
PLAIN_WORDS = (
    (f"{_TAG}bool", re.compile("[yYnN]$"), list("yYnN")),
    (f"{_TAG}int", _INT, list("-+0123456789")),
    (f"{_TAG}float", _FLOAT, list("-+0123456789.")),
)
for _tag, _pattern, _first in PLAIN_WORDS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor(f"{_TAG}bool", lambda loader, node: str(node.value).lower() in ("y", "yes", "on", "true"))
_IGNORE = re.compile(r"^\s*#\s*lint-manifests:\s*ignore\s+(.+?)\s*$")
_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: str(node.value))  # a lone `=`, in many CRDs


def read_objects(text: str, source: str) -> tuple[list[KubeObject], list[Finding]]:
    """Every object of a YAML stream, lists opened, and a finding for each key that is given twice.

    Raises ManifestError: not YAML, or a document without apiVersion and kind.
    """
    objects: list[KubeObject] = []
    findings: list[Finding] = []
    loader = _Loader(text)
    loader.duplicates = []
    lines, begun = text.splitlines(), 0
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # `check_node` has said that there is one
            document = loader.construct_document(node)
            end = max(node.end_mark.line, node.start_mark.line + 1)
            ignored = _ignored(lines[begun:end])
            opened = list(_open(document, source, node.start_mark.line + 1, ignored))
            begun = end
            findings += [_unknown_rule(source, rule) for rule in sorted(ignored - SEVERITIES.keys())]
            objects += opened
            title = opened[0].title if opened else source
            findings += [_twice(title, source, key, line) for key, line in loader.duplicates]
            loader.duplicates.clear()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError(
            source, got=" ".join(str(error).split())[:300], expected="valid YAML", fix="mend the line named here"
        ) from error
    finally:
        loader.dispose()
    return objects, findings


def _twice(title: str, source: str, key: str, line: int) -> Finding:
    where = f"line {line} of {source}"
    return Finding("duplicate-key", title, where, f"the key {key!r} twice", "each key once", "remove one of the two")


def _ignored(lines: Sequence[str]) -> frozenset[str]:
    """Rules that comments of a document switch off for its objects: `# lint-manifests: ignore image-tag, token`."""
    found = (match.group(1) for line in lines if (match := _IGNORE.match(line)))
    return frozenset(rule for text in found for rule in re.split(r"[\s,]+", text) if rule)


def _unknown_rule(source: str, rule: str) -> Finding:
    expected = f"one of {', '.join(sorted(SEVERITIES))}"
    return Finding("ignore-comment", source, "a comment", rule, expected, "correct the rule's name")


def _open(document: Any, source: str, line: int, ignored: frozenset[str]) -> Iterator[KubeObject]:
    if document is None:
        return
    if not isinstance(document, dict) or not all(isinstance(document.get(key), str) for key in ("apiVersion", "kind")):
        raise ManifestError(
            source,
            got=f"a document that is {type(document).__name__} without apiVersion and kind",
            expected="Kubernetes objects",
            fix="give manifests only; Helm templates must be rendered first",
        )
    kind, items = document["kind"], document.get("items")
    if kind == "List" or (kind.endswith("List") and isinstance(items, list)):
        shared = {"apiVersion": document["apiVersion"], "kind": kind.removesuffix("List")} if kind != "List" else {}
        for item in items or []:
            yield from _open({**shared, **item} if isinstance(item, dict) else item, source, line, ignored)
        return
    yield KubeObject(document, source, line, ignored)
