"""What an apply of workloads does not show, because their pods come later: tried on the server before anything changes.

A Pod of each template is created in a dry run, so that admission judges it: quota, limits, PriorityClass, Pod Security.
Storage classes are looked up. What these credentials may not try is said, and not taken for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.api import Cluster
from cluster.apply import Applied, dry_run
from cluster.errors import ClusterError, Tolerated
from cluster.kinds import PODS, STORAGE_CLASSES, VOLUMES, Object, ObjectName, metadata
from cluster.refusal import Operation
from cluster.rights import may

_TEMPLATES = {
    "Deployment": (("template",),),
    "StatefulSet": (("template",),),
    "Job": (("template",),),
    "LeaderWorkerSet": (("leaderWorkerTemplate", "leaderTemplate"), ("leaderWorkerTemplate", "workerTemplate")),
}
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def rehearse(cluster: Cluster, documents: Sequence[Object], force: bool) -> list[Applied]:
    """The set's dry run, its storage classes and its pods. Raises ClusterError for what the server would refuse."""
    planned = dry_run(cluster, documents, force)
    _look_up_storage(cluster, planned)
    _try_pods(cluster, planned)
    return planned


def _try_pods(cluster: Cluster, planned: Sequence[Applied]) -> None:
    """`planned` is the set's dry run. Raises ClusterError for the first pod that the server would refuse."""
    made = {item.name.name for item in planned if item.name.kind == "ServiceAccount" and item.change == "created"}
    for item in planned:
        for template in _new_templates(item):
            namespace = str(item.name.namespace or cluster.namespace)
            if not may(cluster, Operation("create", PODS, namespace)):
                cluster.warn(f"pods of {item.name} were not tried before: no right to create pods in {namespace}")
                break
            _try_pod(cluster, item, template, namespace, made)


def _new_templates(item: Applied) -> Iterator[Object]:
    """Templates of which pods are to come: the server is not asked about an object that it cannot judge yet."""
    if item.change in ("unchecked", "unchanged"):
        return
    for path in _TEMPLATES.get(item.name.kind, ()):
        old, new = _template(item.before, path), _template(item.after, path)
        if new and (old is None or item.change == "replaced" or old.get("spec") != new.get("spec")):
            yield new


def _template(item: Object | None, path: Sequence[str]) -> Any:
    found: Any = (item or {}).get("spec")
    for key in path:
        found = (found or {}).get(key)
    return found


def _try_pod(cluster: Cluster, item: Applied, template: Object, namespace: str, made: set[str]) -> None:
    """An account that the set itself brings is not there yet; the default one stands in for it."""
    spec = dict(template["spec"])
    if spec.get("serviceAccountName") in made:
        spec = {key: found for key, found in spec.items() if key not in ("serviceAccountName", "serviceAccount")}
    if item.name.kind == "Job":
        spec.setdefault("restartPolicy", "Never")
    labels = {
        key: text for key, text in (metadata(template).get("labels") or {}).items() if "controller-uid" not in key
    }
    about = {"generateName": f"{item.name.name[:50]}-", "labels": labels, "namespace": namespace}
    annotations = metadata(template).get("annotations")
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {**about, "annotations": annotations or {}}, "spec": spec}
    action = Operation("create", PODS, namespace)
    try:
        cluster.send("POST", PODS.path(namespace), action, {"dryRun": "All"}, body)
    except ClusterError as error:
        if "quota" in str(error.got) and _makes_room(item):
            return
        raise ClusterError(
            f"a pod of {item.name}", got=error.got, expected=error.expected, fix=error.fix, code=error.code
        ) from error


def _makes_room(item: Applied) -> bool:
    """Whether pods of before leave first: what they use is free then, which a dry run does not know."""
    if item.before is None:
        return False
    if item.change == "replaced":
        return True
    spec = (item.after or {}).get("spec") or {}
    rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
    groups = (spec.get("rolloutStrategy") or {}).get("rollingUpdateConfiguration") or {}
    surge = rolling.get("maxSurge", groups.get("maxSurge", "25%"))
    return str(surge) in ("0", "0%") or (spec.get("strategy") or {}).get("type") == "Recreate"


def _look_up_storage(cluster: Cluster, planned: Sequence[Applied]) -> None:
    """Raises ClusterError for a new claim of a storage class that the cluster does not have."""
    for item in planned:
        if item.name.kind != "PersistentVolumeClaim" or item.change != "created" or item.after is None:
            continue
        spec = item.after.get("spec") or {}
        store = spec.get("storageClassName")
        if store:
            _require_class(cluster, item.name, str(store))
        elif store is None and not spec.get("volumeName") and not _has_default(cluster):
            cluster.warn(
                f"{item.name} names no storage class, and the cluster has no default: it binds a volume made by hand"
            )


def _require_class(cluster: Cluster, claim: ObjectName, store: str) -> None:
    try:
        found = cluster.get(STORAGE_CLASSES, None, store)
    except ClusterError as error:
        if error.code != 403:
            raise
        cluster.warn(f"storage class {store} of {claim} was not looked up: no right to get storage classes")
        return
    if found is not None or _has_volume(cluster, claim, store):
        return
    raise ClusterError(
        str(claim),
        got=f"storage class {store}, which the cluster does not have, and no volume of it either",
        expected="a storage class of the cluster",
        fix="correct kubernetes.model_store.storage_class: kubectl get storageclass",
        code=404,
    )


def _has_volume(cluster: Cluster, claim: ObjectName, store: str) -> bool:
    """Volumes made by hand may name a class that is no object."""
    with Tolerated(403):
        volumes = cluster.list_objects(VOLUMES, "").items
        return any((item.get("spec") or {}).get("storageClassName") == store for item in volumes)
    cluster.warn(
        f"the cluster has no storage class {store} for {claim}; whether it has such a volume was not looked up"
    )
    return True


def _has_default(cluster: Cluster) -> bool:
    """True also where these credentials may not look."""
    with Tolerated(403):
        classes = cluster.list_objects(STORAGE_CLASSES, "").items
        return any((metadata(item).get("annotations") or {}).get(_DEFAULT_CLASS) == "true" for item in classes)
    return True
