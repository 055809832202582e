"""What the cluster says of one workload: the object, its current pods, and what explains their state."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.api import Cluster, Query
from cluster.errors import ClusterError
from cluster.kinds import (
    CLAIMS,
    EVENTS,
    PODS,
    REPLICA_SETS,
    Object,
    ObjectName,
    Resource,
    conditions,
    label_selector,
    metadata,
    name_of,
    owned_by,
)
from cluster.refusal import is_transient

WORKLOADS = ("Deployment", "LeaderWorkerSet", "Job")
_REVISION = "deployment.kubernetes.io/revision"
_EXPLAINED = 3  # pods whose events are asked for: the others fail for the same reasons


@dataclass(frozen=True)
class Observed:
    """`workload` is None when the cluster has no such object. `pods` are those of the newest revision.

    `claims` are those that the pods mount; `events` are of pods that are not ready, of claims that are not bound, and
    of a workload without pods: a Job whose pods are refused says so nowhere else.
    """

    name: ObjectName
    workload: Object | None
    version: str = ""
    pods: tuple[Object, ...] = ()
    replica_sets: tuple[Object, ...] = ()
    claims: tuple[Object, ...] = ()
    events: tuple[Object, ...] = ()


def observe(cluster: Cluster, name: ObjectName) -> Observed:
    """Raises ClusterError when the cluster does not answer or these credentials may not look."""
    resource, namespace = _resource(cluster, name), name.namespace or cluster.namespace
    listing = cluster.list_objects(resource, namespace, {"fieldSelector": f"metadata.name={name.name}"})
    if not listing.items:
        return Observed(name, None, listing.version)
    workload = listing.items[0]
    pods, sets = _pods(cluster, workload, namespace)
    claims = _claims(cluster, pods, namespace)
    puzzling = [name_of(pod) for pod in pods if not is_ready(pod)][:_EXPLAINED]
    puzzling += [name_of(claim) for claim in claims if not is_bound(claim)][:_EXPLAINED]
    puzzling += [name.name] if not pods else []
    events = tuple(
        event
        for subject in puzzling
        for event in cluster.list_objects(EVENTS, namespace, {"fieldSelector": f"involvedObject.name={subject}"}).items
    )
    return Observed(name, workload, listing.version, pods, sets, claims, events)


def wait_for_change(
    cluster: Cluster, seen: Observed, seconds: float, pause_s: float, sleep: Callable[[float], object] = time.sleep
) -> None:
    """Returns after the next event of the workload, or after about `seconds`.

    Pods change without an event of their workload, so `seconds` is also how old news of them may become. A version that
    the server has forgotten (410), or a watch that breaks, ends it early, but never before `pause_s`.
    """
    resource, namespace = _resource(cluster, seen.name), seen.name.namespace or cluster.namespace
    query: Query = {
        "fieldSelector": f"metadata.name={seen.name.name}",
        "resourceVersion": seen.version,
        "timeoutSeconds": math.ceil(seconds),
    }
    begun = time.monotonic()
    try:
        for event in cluster.stream(resource, namespace, query, read_s=seconds):
            if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                return
            if event["type"] == "ERROR":
                break  # most often 410 Gone; the next look lists again
    except ClusterError as error:
        if error.code != 410 and not is_transient(error):
            raise
    except json.JSONDecodeError:
        pass  # a line cut off by a broken connection
    sleep(max(0.0, pause_s - (time.monotonic() - begun)))


def last_words(cluster: Cluster, pod: Object, container: str, lines: int = 10) -> str:
    """The end of the log of a container that failed: of its last run, else of this one. Empty when there is none."""
    about = metadata(pod)
    for previous in (True, False):
        query: Query = {"container": container, "tailLines": lines, "previous": previous}
        try:
            text = cluster.log(str(about["namespace"]), str(about["name"]), query)
        except ClusterError:
            continue  # no earlier run, no right to logs: the reason stands without them
        if text.strip():
            return text.rstrip()
    return ""


def is_ready(pod: Object) -> bool:
    return conditions(pod).get("Ready", {}).get("status") == "True" and not is_leaving(pod)


def has_run(pod: Object) -> bool:
    """Whether any of its containers was ever started."""
    status = pod.get("status") or {}
    for state in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        now, before = state.get("state") or {}, state.get("lastState") or {}
        if now.get("running") is not None or now.get("terminated") or before.get("terminated"):
            return True
    return status.get("phase") in ("Running", "Succeeded", "Failed")


def is_leaving(pod: Object) -> bool:
    return "deletionTimestamp" in metadata(pod)


def is_bound(claim: Object) -> bool:
    return bool((claim.get("status") or {}).get("phase") == "Bound")


def _resource(cluster: Cluster, name: ObjectName) -> Resource:
    found = cluster.resource(name.api_version, name.kind)
    if found is None:
        raise ClusterError(
            str(name),
            got=f"a cluster without the kind {name.kind} of {name.api_version}",
            expected="a kind that the cluster serves",
            fix="install its custom resource definition",
            code=404,
        )
    return found


def _pods(cluster: Cluster, workload: Object, namespace: str) -> tuple[tuple[Object, ...], tuple[Object, ...]]:
    """Pods of the newest revision, and the ReplicaSet that makes them."""
    kind = workload["kind"]
    if kind == "LeaderWorkerSet":
        selector = f"leaderworkerset.sigs.k8s.io/name={name_of(workload)}"
        return cluster.list_objects(PODS, namespace, {"labelSelector": selector}).items, ()
    selector = label_selector(workload)
    if not selector:  # a Job that the server has not filled in yet
        return (), ()
    pods = cluster.list_objects(PODS, namespace, {"labelSelector": selector}).items
    if kind != "Deployment":
        return tuple(owned_by(pods, workload)), ()
    sets = tuple(owned_by(cluster.list_objects(REPLICA_SETS, namespace, {"labelSelector": selector}).items, workload))
    newest = tuple(item for item in sets if _revision(item) == _revision(workload))
    return tuple(pod for item in newest for pod in owned_by(pods, item)), newest


def _revision(item: Object) -> str:
    return str((metadata(item).get("annotations") or {}).get(_REVISION, ""))


def _claims(cluster: Cluster, pods: tuple[Object, ...], namespace: str) -> tuple[Object, ...]:
    names = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods
        if not is_ready(pod)
        for volume in (pod.get("spec") or {}).get("volumes") or ()
        if "persistentVolumeClaim" in volume
    }
    found = (cluster.get(CLAIMS, namespace, name) for name in sorted(names))
    return tuple(item for item in found if item is not None)
