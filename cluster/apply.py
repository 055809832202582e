"""Server-side apply of a set of objects: checked as a whole by the server first, then applied in order.

The server merges by field ownership, under the field manager `trireme`: a field that this set no longer has goes, one
that somebody else owns (a replica count that an autoscaler sets) stays, and to change one that another manager set is a
conflict, which is reported with its owner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.api import Cluster, Query
from cluster.errors import ClusterError
from cluster.kinds import NAMESPACES, Object, ObjectName, Resource, conditions, metadata
from cluster.refusal import Operation

MANAGER = "trireme"
Change = Literal["created", "changed", "replaced", "unchanged", "unchecked"]

# What others need comes first; a Deployment before its ConfigMap would start pods that fail for nothing.
_FIRST = (
    "Namespace", "CustomResourceDefinition", "PriorityClass", "StorageClass", "ResourceQuota", "LimitRange",
    "NetworkPolicy", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Secret",
    "ConfigMap", "PersistentVolume", "PersistentVolumeClaim", "ResourceClaimTemplate", "Service", "PodDisruptionBudget",
)  # fmt: skip
_LAST = ("Job", "Deployment", "StatefulSet", "LeaderWorkerSet", "HorizontalPodAutoscaler", "ScaledObject")
_LOOKS, _LOOK_S = 100, 0.2  # at an object that is being deleted
_SERVER_FIELDS = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink")


@dataclass(frozen=True)
class Target:
    """An object to apply, and where it goes."""

    name: ObjectName
    resource: Resource
    body: Object


@dataclass(frozen=True)
class Applied:
    """`before` and `after` are the object on the server; `before` is None for a new one.

    `replaced`: a finished Job, whose template cannot change, makes room for its successor.
    `unchecked`: a dry run of an object whose namespace or kind the same set would create: the server cannot judge it.
    """

    name: ObjectName
    change: Change
    before: Object | None
    after: Object | None


def in_order(documents: Sequence[Object]) -> list[Object]:
    """Namespaces and definitions first, workloads and what scales them last; otherwise as given."""

    def rank(item: Object) -> int:
        kind = item["kind"]
        if kind in _FIRST:
            return _FIRST.index(kind)
        return len(_FIRST) + (1 + _LAST.index(kind) if kind in _LAST else 0)

    return sorted(documents, key=rank)


def targets(cluster: Cluster, documents: Sequence[Object]) -> list[Target | ObjectName]:
    """Where each object goes, in order. A bare name: its kind is not known yet, the set itself defines it.

    Raises ClusterError for a kind that neither the cluster nor the set defines.
    """
    defined = {
        (f"{item['spec']['group']}/{version['name']}", item["spec"]["names"]["kind"])
        for item in documents
        if item["kind"] == "CustomResourceDefinition"
        for version in item["spec"]["versions"]
    }
    found: list[Target | ObjectName] = []
    for item in in_order(documents):
        version, kind, about = item["apiVersion"], item["kind"], metadata(item)
        resource = cluster.resource(version, kind)
        if resource is not None:
            namespace = str(about.get("namespace") or cluster.namespace) if resource.namespaced else None
            found.append(Target(ObjectName(version, kind, namespace, about["name"]), resource, item))
        elif (version, kind) in defined:
            found.append(ObjectName(version, kind, about.get("namespace"), about["name"]))
        else:
            raise ClusterError(
                f"{kind} {about.get('name')}",
                got=f"a cluster without the kind {kind} of {version}",
                expected="a kind that the cluster serves",
                fix=_INSTALL.get(version.partition("/")[0], "install its custom resource definition, or leave it out"),
                code=404,
            )
    return found


_INSTALL = {
    "leaderworkerset.x-k8s.io": "install LeaderWorkerSet, or deploy on one node",
    "keda.sh": "install KEDA, or set kubernetes.scaling.by: hpa",
    "monitoring.coreos.com": "install the Prometheus operator, or set kubernetes.monitoring: false",
    "gateway.networking.k8s.io": "install the Gateway API, or leave kubernetes.gateway out",
    "resource.k8s.io": "use a cluster with dynamic resource allocation, or set kubernetes.gpus_by: device-plugin",
}


def names(cluster: Cluster, documents: Sequence[Object]) -> list[ObjectName]:
    """The objects' names; of a kind that the cluster does not know, without a namespace."""
    found = []
    for item in documents:
        resource = cluster.resource(item["apiVersion"], item["kind"])
        inside = resource is not None and resource.namespaced
        namespace = str(metadata(item).get("namespace") or cluster.namespace) if inside else None
        found.append(ObjectName(item["apiVersion"], item["kind"], namespace, metadata(item)["name"]))
    return found


def dry_run(cluster: Cluster, documents: Sequence[Object], force: bool = False) -> list[Applied]:
    """What an apply would do, judged by the server with its admission; nothing is changed.

    Raises ClusterError for the first object that the server refuses.
    """
    planned = targets(cluster, documents)
    coming = {item.name.name for item in planned if isinstance(item, Target) and item.name.kind == "Namespace"}
    missing = {name for name in coming if cluster.get(NAMESPACES, None, name) is None}
    found = []
    for item in planned:
        if isinstance(item, ObjectName):
            found.append(Applied(item, "unchecked", None, None))
        elif item.name.namespace in missing:
            found.append(Applied(item.name, "unchecked", None, item.body))
        else:
            found.append(_send(cluster, item, force, dry=True))
    return found


def apply(cluster: Cluster, documents: Sequence[Object], force: bool = False) -> Iterator[Applied]:
    """Applies one object after another and says what became of each. Raises ClusterError at the first refusal."""
    definitions = [item for item in documents if item["kind"] == "CustomResourceDefinition"]
    for target in targets(cluster, definitions):
        assert isinstance(target, Target)  # every cluster serves the kind of definitions
        yield _send(cluster, target, force, dry=False)
    if definitions:
        cluster.forget_kinds()
    rest = [item for item in documents if item["kind"] != "CustomResourceDefinition"]
    for target in targets(cluster, rest):
        assert isinstance(target, Target)
        yield _send(cluster, target, force, dry=False)


def delete(cluster: Cluster, name: ObjectName) -> bool:
    """Deletes an object and, in the background, what it owns. False when it had gone already."""
    resource = cluster.resource(name.api_version, name.kind)
    if resource is None:
        return False
    action = Operation("delete", resource, name.namespace, name.name)
    try:
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        cluster.send("DELETE", resource.path(name.namespace, name.name), action, body=options)
    except ClusterError as error:
        if error.code == 404:
            return False
        raise
    return True


def _send(cluster: Cluster, target: Target, force: bool, dry: bool) -> Applied:
    name, resource = target.name, target.resource
    before = cluster.get(resource, name.namespace, name.name)
    dry_only: Query = {"dryRun": "All"} if dry else {}
    query: Query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "force": force, **dry_only}
    action = Operation("patch", resource, name.namespace, name.name)
    path = resource.path(name.namespace, name.name)
    try:
        after = cluster.send("PATCH", path, action, query, target.body)
    except ClusterError as error:
        if before is None or name.kind != "Job" or error.code != 422 or "immutable" not in str(error):
            raise
        _require_finished(name, before, error)
        if dry:
            return Applied(name, "replaced", before, target.body)
        _delete_and_wait(cluster, name, resource)
        return Applied(name, "replaced", before, cluster.send("PATCH", path, action, query, target.body))
    if before is None:
        return Applied(name, "created", None, after)
    return Applied(name, "unchanged" if bare(before) == bare(after) else "changed", before, after)


def _require_finished(name: ObjectName, job: Object, error: ClusterError) -> None:
    if not any(conditions(job).get(kind, {}).get("status") == "True" for kind in ("Complete", "Failed")):
        raise ClusterError(
            str(name),
            got="a change of its template while it runs",
            expected="a Job that has ended: templates of Jobs cannot change",
            fix=f"wait until it ends, or end it: kubectl delete job -n {name.namespace} {name.name}",
            code=422,
        ) from error


def _delete_and_wait(cluster: Cluster, name: ObjectName, resource: Resource) -> None:
    delete(cluster, name)
    for _ in range(_LOOKS):
        if cluster.get(resource, name.namespace, name.name) is None:
            return
        time.sleep(_LOOK_S)
    raise ClusterError(
        str(name),
        got=f"still there {_LOOKS * _LOOK_S:.0f} s after it was deleted",
        expected="room for its successor",
        fix="look at the finalizers in its metadata",
        code=409,
    )


def bare(item: Object) -> dict[str, Any]:
    """The object without status and without what only the server writes: what two versions are compared by."""
    about = {key: found for key, found in metadata(item).items() if key not in _SERVER_FIELDS}
    return {**{key: found for key, found in item.items() if key != "status"}, "metadata": about}
