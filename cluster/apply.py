"""Server-side apply of a set of objects: checked as a whole by the server first, then applied in order.

The server merges by field ownership, under the field manager `trireme`: a field that this set no longer has goes, one
that somebody else owns (a replica count that an autoscaler sets) stays, and to change one that another manager set is a
conflict, which is reported with its owner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.api import Cluster, Query
from cluster.errors import ClusterError, Tolerated
from cluster.kinds import NAMESPACES, Object, ObjectName, Resource, conditions, metadata
from cluster.observe import has_run, observe
from cluster.refusal import Operation

MANAGER = "trireme"
Change = Literal["created", "changed", "replaced", "unchanged", "kept", "unchecked"]

# What others need comes first; a Deployment before its ConfigMap would start pods that fail for nothing.
_FIRST = (
    "Namespace", "CustomResourceDefinition", "PriorityClass", "StorageClass", "ResourceQuota", "LimitRange",
    "NetworkPolicy", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Secret",
    "ConfigMap", "PersistentVolume", "PersistentVolumeClaim", "ResourceClaimTemplate", "Service", "PodDisruptionBudget",
)  # fmt: skip
_LAST = ("Job", "Deployment", "StatefulSet", "LeaderWorkerSet", "HorizontalPodAutoscaler", "ScaledObject")
_LOOKS, _LOOK_S = 100, 0.2  # at an object that is being deleted
_JOB_LABELS = ("controller-uid", "job-name")
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

    `replaced`: a Job that has ended, or has not started yet, makes room for its successor: its template cannot change.
    `kept`: a Namespace that is there; others live in it too. `unchecked`: a dry run of an object whose namespace or
    kind the same set would create: the server cannot judge it. `conflict` names fields of others that it would change.
    """

    name: ObjectName
    change: Change
    before: Object | None
    after: Object | None
    conflict: str | None = None


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


def namespace_exists(cluster: Cluster, name: str) -> bool:
    """True also where these credentials may not look: then it is not theirs to make."""
    with Tolerated(403):
        return cluster.get(NAMESPACES, None, name) is not None
    return True


def dry_run(
    cluster: Cluster, documents: Sequence[Object], force: bool = False, show_conflicts: bool = False
) -> list[Applied]:
    """What an apply would do, judged by the server with its admission; nothing is changed.

    Raises ClusterError for the first object that the server refuses. With `show_conflicts` a conflict with another
    manager is no refusal, but stands with what taking the fields over would change.
    """
    planned = targets(cluster, documents)
    found, missing = [], set()
    for item in planned:
        if isinstance(item, ObjectName):
            found.append(Applied(item, "unchecked", None, None))
        elif item.name.namespace in missing:
            found.append(Applied(item.name, "unchecked", None, item.body))
        else:
            done = _try(cluster, item, force, show_conflicts)
            found.append(done)
            if item.name.kind == "Namespace" and done.change == "created":
                missing.add(item.name.name)
    return found


def _try(cluster: Cluster, target: Target, force: bool, show_conflicts: bool) -> Applied:
    try:
        return _send(cluster, target, force, dry=True)
    except ClusterError as error:
        if error.code != 409 or not show_conflicts:
            raise
        return replace(_send(cluster, target, force=True, dry=True), conflict=str(error.got))


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
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
    with Tolerated(404):
        cluster.send("DELETE", resource.path(name.namespace, name.name), action, body=options)
        return True
    return False


def _send(cluster: Cluster, target: Target, force: bool, dry: bool) -> Applied:
    name, resource = target.name, target.resource
    if name.kind == "Namespace" and namespace_exists(cluster, name.name):
        return Applied(name, "kept", None, None)
    before = cluster.get(resource, name.namespace, name.name)
    dry_only: Query = {"dryRun": "All"} if dry else {}
    query: Query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "force": force, **dry_only}
    action = Operation("patch", resource, name.namespace, name.name)
    path = resource.path(name.namespace, name.name)
    try:
        after = cluster.send("PATCH", path, action, query, target.body)
    except ClusterError as error:
        if before is None or not _is_fixed(name, error):
            raise
        _require_replaceable(cluster, name, before, error)
        if dry:
            return Applied(name, "replaced", before, _successor(cluster, target, query))
        _delete_and_wait(cluster, name, resource)
        return Applied(name, "replaced", before, cluster.send("PATCH", path, action, query, target.body))
    if before is None:
        return Applied(name, "created", None, after)
    return Applied(name, "unchanged" if bare(before) == bare(after) else "changed", before, after)


def _is_fixed(name: ObjectName, error: ClusterError) -> bool:
    """Whether the server refuses to change a Job's template."""
    return name.kind == "Job" and error.code == 422 and "immutable" in str(error)


def _require_replaceable(cluster: Cluster, name: ObjectName, job: Object, error: ClusterError) -> None:
    """It has ended; or no container of it ever started (no such image, no room, no volume), so nothing is lost."""
    if any(conditions(job).get(kind, {}).get("status") == "True" for kind in ("Complete", "Failed")):
        return
    if any(has_run(pod) for pod in observe(cluster, name).pods):
        raise ClusterError(
            str(name),
            got="a change of its template while it runs",
            expected="a Job that has ended, or has not started yet: templates of Jobs cannot change",
            fix=f"wait until it ends, or end it: kubectl delete job -n {name.namespace} {name.name}",
            code=422,
        ) from error


def _successor(cluster: Cluster, target: Target, query: Query) -> Object:
    """The Job as it would be, with the server's defaults: a dry run under a name that is free."""
    name, path = f"{target.name.name[:57]}-next", target.resource.path(target.name.namespace)
    body = {**target.body, "metadata": {**metadata(target.body), "name": name}}
    action = Operation("patch", target.resource, target.name.namespace, name)
    found = cluster.send("PATCH", f"{path}/{name}", action, query, body)
    return {**found, "metadata": {**metadata(found), "name": target.name.name}}


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
    whole = {**{key: found for key, found in item.items() if key != "status"}, "metadata": about}
    return _without_own_labels(whole) if whole.get("kind") == "Job" else whole


def _without_own_labels(job: dict[str, Any]) -> dict[str, Any]:
    """Each Job selects its pods by labels that the server makes up for it."""
    spec = {key: found for key, found in (job.get("spec") or {}).items() if key != "selector"}
    template = dict(spec.get("template") or {})
    about = dict(metadata(template))
    labels = {
        key: text for key, text in (about.get("labels") or {}).items() if key.rpartition("/")[2] not in _JOB_LABELS
    }
    about = {key: found for key, found in {**about, "labels": labels}.items() if found}
    return {**job, "spec": {**spec, "template": {**template, "metadata": about}}}
