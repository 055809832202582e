"""CustomResourceDefinitions that the user gives, as the JSON schemas that the API server checks by.

The structural schemas of CRDs are closed here: a field that they do not know is refused under strict validation.
https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builders.manifests.lint.objects import KubeObject, at, mapping, rows

_SCHEMA_WORDS = (
    "type", "enum", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems", "uniqueItems",
    "minProperties", "maxProperties", "required", "multipleOf",
)  # fmt: skip
_OBJECT = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


def definitions(objects: Sequence[KubeObject]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The schema of every version that a CRD among the objects serves."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for item in objects:
        if item.kind != "CustomResourceDefinition":
            continue
        group, kind = at(item.data, "spec.group"), at(item.data, "spec.names.kind")
        for version in rows(item.data, "spec.versions"):
            if version.get("served", True):
                schema = _closed(mapping(version, "schema.openAPIV3Schema"))
                schema["properties"] = {**schema.get("properties", {}), **_OBJECT}
                found[f"{group}/{version.get('name')}", str(kind)] = schema
    return found


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """One level: unknown fields are refused unless the schema keeps them; int-or-string and nullable as they say."""
    made: dict[str, Any] = {key: schema[key] for key in _SCHEMA_WORDS if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        made = {**{key: value for key, value in made.items() if key != "type"}, "type": ["integer", "string"]}
    if "properties" in schema:
        made["properties"] = {key: _closed(part) for key, part in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), Mapping):
        made["additionalProperties"] = _closed(schema["additionalProperties"])
    elif schema.get("x-kubernetes-embedded-resource"):
        made["properties"] = {**made.get("properties", {}), **_OBJECT}
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if isinstance(schema.get("items"), Mapping):
        made["items"] = _closed(schema["items"])
    for word in ("allOf", "anyOf", "oneOf"):  # value rules of a part; its fields are named outside
        if word in schema:
            made[word] = [_rules(part) for part in schema[word]]
    if "not" in schema:
        made["not"] = _rules(schema["not"])
    if schema.get("nullable"):
        made = {"anyOf": [{"type": "null"}, made]}
    return made


def _rules(schema: Mapping[str, Any]) -> dict[str, Any]:
    made = _closed(schema)
    made.pop("additionalProperties", None)
    return made
