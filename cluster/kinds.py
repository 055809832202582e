"""Names of objects, and of the places where the API server keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

Object = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Resource:
    """Where the objects of one kind live. `plural` is what rights are granted on."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool

    @property
    def group(self) -> str:
        """Empty for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def granted_as(self) -> str:
        """As rights name it: `deployments.apps`, `pods`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Path on the API server; without a name, of the whole list."""
        parts = [root_path(self.api_version)]
        if self.namespaced and namespace:
            parts.append(f"namespaces/{quote(namespace, safe='')}")
        parts += [self.plural, *(quote(part, safe="") for part in (name, subresource) if part)]
        return "/".join(parts)


@dataclass(frozen=True, order=True)
class ObjectName:
    """One object, as it is known before the server has been asked."""

    api_version: str
    kind: str
    namespace: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


# The kinds that this package asks for by itself; all others come from discovery.
PODS = Resource("v1", "Pod", "pods", True)
EVENTS = Resource("v1", "Event", "events", True)
CLAIMS = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims", True)
NAMESPACES = Resource("v1", "Namespace", "namespaces", False)
SECRETS = Resource("v1", "Secret", "secrets", True)
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps", True)
VOLUMES = Resource("v1", "PersistentVolume", "persistentvolumes", False)
STORAGE_CLASSES = Resource("storage.k8s.io/v1", "StorageClass", "storageclasses", False)
DEFINITIONS = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", False)
REPLICA_SETS = Resource("apps/v1", "ReplicaSet", "replicasets", True)
DISRUPTION_BUDGETS = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", True)
ACCESS_REVIEWS = Resource("authorization.k8s.io/v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", False)


def root_path(api_version: str) -> str:
    """`/api/v1` for the core group, `/apis/<group>/<version>` for all others."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def metadata(item: Object) -> Object:
    found: Object = item.get("metadata") or {}
    return found


def name_of(item: Object) -> str:
    return str(metadata(item).get("name", ""))


def conditions(item: Object) -> dict[str, Object]:
    """Status conditions by type."""
    return {str(found.get("type")): found for found in (item.get("status") or {}).get("conditions") or ()}


def owned_by(items: tuple[Object, ...], owner: Object) -> Iterator[Object]:
    """Those that name `owner` as an owner, by its uid."""
    uid = metadata(owner).get("uid")
    for item in items:
        if any(reference.get("uid") == uid for reference in metadata(item).get("ownerReferences") or ()):
            yield item


def label_selector(item: Object) -> str:
    """The `spec.selector` of a workload as the API's query takes it; matchExpressions included."""
    selector = (item.get("spec") or {}).get("selector") or {}
    parts = [f"{key}={text}" for key, text in (selector.get("matchLabels") or {}).items()]
    for rule in selector.get("matchExpressions") or ():
        key, operator, values = rule["key"], rule["operator"], ",".join(rule.get("values") or ())
        forms = {"In": f"{key} in ({values})", "NotIn": f"{key} notin ({values})", "Exists": key}
        parts.append(forms.get(operator, f"!{key}"))  # DoesNotExist
    return ",".join(parts)
