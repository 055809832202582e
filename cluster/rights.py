"""What these credentials may do, asked before anything is changed: all that is missing in one answer."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.api import Cluster
from cluster.apply import Target, targets
from cluster.kinds import (
    ACCESS_REVIEWS,
    CLAIMS,
    EVENTS,
    PODS,
    REPLICA_SETS,
    SECRETS,
    Object,
    Resource,
)
from cluster.observe import WORKLOADS
from cluster.refusal import Operation, no_rights
from cluster.revision import LASTING

_APPLY = ("get", "create", "patch")  # a server-side apply that creates needs both create and patch
_WATCH = ("list", "watch")
PORT_FORWARD = ("get", "create")  # the websocket's handshake is a GET, and the server asks for create as well


def needed_to_apply(cluster: Cluster, documents: Sequence[Object]) -> list[Operation]:
    """For the set itself, for watching its rollout, and for the record of what was applied."""
    found = [item for item in targets(cluster, documents) if isinstance(item, Target)]
    places: dict[tuple[Resource, str | None], None] = {(item.resource, item.name.namespace): None for item in found}
    actions = [
        Operation(verb, resource, place)
        for resource, place in places
        for verb in (_APPLY if resource.kind in LASTING else (*_APPLY, "delete"))
    ]
    for place in dict.fromkeys(place for _, place in places if place):
        actions += [Operation("list", resource, place) for resource in (PODS, EVENTS, REPLICA_SETS)]
        actions += [Operation("get", CLAIMS, place), Operation("get", PODS, place, subresource="log")]
    workloads = [(item.resource, item.name.namespace) for item in found if item.name.kind in WORKLOADS]
    actions += [Operation(verb, resource, place) for resource, place in workloads for verb in _WATCH]
    actions += [Operation(verb, SECRETS, cluster.namespace) for verb in ("get", "create", "update")]
    return list(dict.fromkeys(actions))


def require_rights(cluster: Cluster, actions: Sequence[Operation]) -> None:
    """Raises ClusterError that lists every verb and resource that is missing."""
    missing = [action for action in actions if not _allowed(cluster, action)]
    if missing:
        raise no_rights(missing, "these credentials")


def _allowed(cluster: Cluster, action: Operation) -> bool:
    """By a SelfSubjectAccessReview, which every authenticated user may make."""
    attributes = {
        "verb": action.verb,
        "group": action.resource.group,
        "resource": action.resource.plural,
        "subresource": action.subresource,
        "namespace": action.namespace,
        "name": action.name,
    }
    review = {
        "apiVersion": ACCESS_REVIEWS.api_version,
        "kind": ACCESS_REVIEWS.kind,
        "spec": {"resourceAttributes": {key: text for key, text in attributes.items() if text}},
    }
    answer = cluster.send("POST", ACCESS_REVIEWS.path(), Operation("create", ACCESS_REVIEWS), body=review)
    return bool((answer.get("status") or {}).get("allowed"))
