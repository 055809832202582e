"""Fields of roles, definitions, webhooks, settings and quotas that go together, as the API server checks them.

Source: kubernetes.io/docs/reference/kubernetes-api, each kind's own page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from builders.manifests.lint import formats
from builders.manifests.lint.objects import Finding, KubeObject, ObjectSet, at, mapping, refused, rows, words
from builders.manifests.lint.quantity import parse_quantity

_SECRET_KEYS = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}
_TYPES = ("object", "array", "string", "integer", "number", "boolean")
_MOST_DATA = 2**20


def admin_kinds(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        if (rule := _OF.get(item.kind)) is not None:
            yield from rule(item)


def _role(item: KubeObject) -> Iterator[Finding]:
    for index, rule in enumerate(rows(item.data, "rules")):
        where, paths = f"rules[{index}]", words(rule, "nonResourceURLs")
        if not words(rule, "verbs"):
            yield refused(item, f"{where}.verbs", "none", "at least one verb")
        if paths and item.kind == "Role":
            yield refused(item, f"{where}.nonResourceURLs", ", ".join(paths), "a ClusterRole for these")
        if paths and (words(rule, "resources") or words(rule, "apiGroups")):
            yield refused(item, where, "resources and nonResourceURLs", "one of them")
        if not paths and not (words(rule, "resources") and words(rule, "apiGroups")):
            yield refused(item, where, "no resources or no apiGroups", 'both; the core group is ""')


def _binding(item: KubeObject) -> Iterator[Finding]:
    for index, row in enumerate(rows(item.data, "subjects")):
        if item.kind == "ClusterRoleBinding" and row.get("kind") == "ServiceAccount" and not row.get("namespace"):
            yield refused(item, f"subjects[{index}].namespace", "nothing", "the account's namespace")
        if not row.get("name"):
            yield refused(item, f"subjects[{index}].name", "nothing", "a name")
        if row.get("kind") == "ServiceAccount" and row.get("apiGroup"):
            yield refused(item, f"subjects[{index}].apiGroup", str(row["apiGroup"]), "none for a ServiceAccount")


def _definition(item: KubeObject) -> Iterator[Finding]:
    spec = mapping(item.data, "spec")
    wanted = f"{at(spec, 'names.plural')}.{spec.get('group')}"
    versions = rows(spec, "versions")
    if item.name != wanted:
        yield refused(item, "metadata.name", item.name, wanted)
    stored = [str(row.get("name")) for row in versions if row.get("storage")]
    if len(stored) != 1:
        yield refused(item, "spec.versions", f"{len(stored)} that are stored", "one with storage: true")
    for index, row in enumerate(versions):
        where, schema = f"spec.versions[{index}].schema.openAPIV3Schema", mapping(row, "schema.openAPIV3Schema")
        if not schema:
            yield refused(item, where, "nothing", "a schema")
        elif schema.get("type") not in (None, "object"):
            yield refused(item, f"{where}.type", str(schema["type"]), "object")
        else:
            yield from _structure(item, where, schema)


def _structure(item: KubeObject, where: str, schema: Mapping[str, Any]) -> Iterator[Finding]:
    """Every level says its type, but those that may be a number or a text, or keep what they do not know."""
    free = schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") not in (None, *_TYPES):
        yield refused(item, f"{where}.type", str(schema["type"]), f"one of {', '.join(_TYPES)}")
    if not schema.get("type") and not free:
        yield refused(item, f"{where}.type", "nothing", "a type on each level: schemas are structural")
    for name, part in mapping(schema, "properties").items():
        if isinstance(part, Mapping):
            yield from _structure(item, f"{where}.properties.{name}", part)
    for key in ("items", "additionalProperties"):
        if part := mapping(schema, key):
            yield from _structure(item, f"{where}.{key}", part)


def _webhooks(item: KubeObject) -> Iterator[Finding]:
    for index, row in enumerate(rows(item.data, "webhooks")):
        where, name, client = f"webhooks[{index}]", str(row.get("name")), mapping(row, "clientConfig")
        if name.count(".") < 2 or not formats.is_dns_name(name):
            yield refused(item, f"{where}.name", name, "a full name of three parts, as guard.example.org")
        if not {"v1", "v1beta1"} & set(words(row, "admissionReviewVersions")):
            yield refused(item, f"{where}.admissionReviewVersions", "neither v1 nor v1beta1", "one of them")
        for place, rule in enumerate(rows(row, "rules")):
            if "*" in (found := words(rule, "resources")) and any("/" not in word for word in found if word != "*"):
                yield refused(item, f"{where}.rules[{place}].resources", ", ".join(found), "* alone")
        if ("url" in client) == ("service" in client):
            yield refused(item, f"{where}.clientConfig", "both or neither", "url or service")


def _config_map(item: KubeObject) -> Iterator[Finding]:
    size = sum(len(str(text).encode()) for part in ("data", "binaryData") for text in mapping(item.data, part).values())
    if size > _MOST_DATA:
        yield refused(item, "data", f"{size} bytes", f"{_MOST_DATA} bytes at most")
    yield from _keys(item, "data", "binaryData")
    for key in sorted(mapping(item.data, "data").keys() & mapping(item.data, "binaryData").keys()):
        yield refused(item, f"binaryData.{key}", "a key of data too", "each key once")


def _secret(item: KubeObject) -> Iterator[Finding]:
    yield from _keys(item, "data", "stringData")
    data = mapping(item.data, "data")
    for key, text in data.items():
        if isinstance(text, str) and not formats.is_base64(text):
            yield refused(item, f"data.{key}", "no base64", "base64, or the text itself under stringData")
    for key in _SECRET_KEYS.get(str(item.data.get("type")), ()):
        if key not in data and key not in mapping(item.data, "stringData"):
            yield refused(item, f"data.{key}", "nothing", f"a value: type {item.data['type']} has it")


def _keys(item: KubeObject, *parts: str) -> Iterator[Finding]:
    for part in parts:
        for key in mapping(item.data, part):
            if not formats.is_data_key(str(key)):
                yield refused(item, part, f"the key {key}", "letters, digits, `-`, `_`, `.`")


def _storage_class(item: KubeObject) -> Iterator[Finding]:
    for index, term in enumerate(rows(item.data, "allowedTopologies")):
        for place, row in enumerate(rows(term, "matchLabelExpressions")):
            if not words(row, "values"):
                where = f"allowedTopologies[{index}].matchLabelExpressions[{place}].values"
                yield refused(item, where, "none", "at least one")


def _priority(item: KubeObject) -> Iterator[Finding]:
    if item.name.startswith("system-"):
        yield refused(item, "metadata.name", item.name, "another prefix: system- is Kubernetes' own")


def _quota(item: KubeObject) -> Iterator[Finding]:
    for name, value in mapping(item.data, "spec.hard").items():
        amount, counted = parse_quantity(value), "." not in str(name) or str(name).startswith("count/")
        whole = counted and str(name) not in ("cpu", "memory", "storage", "ephemeral-storage")
        if amount is None or amount < 0 or (whole and amount % 1):
            expected = "a whole number" if whole else "a quantity"
            yield refused(item, f"spec.hard.{name}", str(value), expected)


def _limits(item: KubeObject) -> Iterator[Finding]:
    for index, row in enumerate(rows(item.data, "spec.limits")):
        found = {key: mapping(row, key) for key in ("min", "defaultRequest", "default", "max")}
        for key, amounts in found.items():
            for name, value in amounts.items():
                if parse_quantity(value) is None:
                    yield refused(item, f"spec.limits[{index}].{key}.{name}", str(value), "a quantity")
        for name, value in mapping(row, "maxLimitRequestRatio").items():
            if (ratio := parse_quantity(value)) is None or ratio < 1:
                yield refused(item, f"spec.limits[{index}].maxLimitRequestRatio.{name}", str(value), "1 or more")
        for low, high in (("min", "max"), ("min", "default"), ("defaultRequest", "default"), ("default", "max"),
                          ("defaultRequest", "max"), ("min", "defaultRequest")):  # fmt: skip
            for name in sorted(found[low].keys() & found[high].keys()):
                less, more = parse_quantity(found[low][name]), parse_quantity(found[high][name])
                if less is not None and more is not None and less > more:
                    where = f"spec.limits[{index}].{low}.{name}"
                    yield refused(item, where, str(found[low][name]), f"at most {high}, {found[high][name]}")


_OF: dict[str, Callable[[KubeObject], Iterator[Finding]]] = {
    "Role": _role, "ClusterRole": _role, "RoleBinding": _binding, "ClusterRoleBinding": _binding,
    "CustomResourceDefinition": _definition, "ValidatingWebhookConfiguration": _webhooks,
    "MutatingWebhookConfiguration": _webhooks, "ConfigMap": _config_map, "Secret": _secret,
    "PriorityClass": _priority, "StorageClass": _storage_class, "ResourceQuota": _quota, "LimitRange": _limits,
}  # fmt: skip
