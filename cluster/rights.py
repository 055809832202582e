"""What these credentials may do, asked before anything is changed: all that is missing in one answer.

Rights may be granted on single objects (`resourceNames`), so what is not granted on a kind is asked by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.api import Cluster
from cluster.apply import Target, namespace_exists, targets
from cluster.control import secret_places
from cluster.kinds import (
    ACCESS_REVIEWS,
    CLAIMS,
    CONFIG_MAPS,
    EVENTS,
    PODS,
    REPLICA_SETS,
    SECRETS,
    Object,
    ObjectName,
)
from cluster.observe import WORKLOADS
from cluster.refusal import Operation, no_rights
from cluster.revision import LASTING

_APPLY = ("get", "create", "patch")  # a server-side apply that creates needs both create and patch
_WATCH = ("list", "watch")
PORT_FORWARD = ("get", "create")  # the websocket's handshake is a GET, and the server asks for create as well


def needed_to_apply(
    cluster: Cluster, documents: Sequence[Object], doomed: Sequence[ObjectName] = ()
) -> list[Operation]:
    """For the set itself, for watching its rollout, for the record of what was applied, and to delete `doomed`.

    Nothing for a Namespace that is there: it stays as it is.
    """
    found = [item for item in targets(cluster, documents) if isinstance(item, Target) and not _stays(cluster, item)]
    actions = []
    for item in found:
        verbs = _APPLY if item.resource.kind in LASTING else (*_APPLY, "delete")
        verbs = (*verbs, *_WATCH) if item.resource.kind in WORKLOADS else verbs
        actions += [Operation(verb, item.resource, item.name.namespace, item.name.name) for verb in verbs]
    for name in doomed:
        resource = cluster.resource(name.api_version, name.kind)
        if resource is not None:
            actions.append(Operation("delete", resource, name.namespace, name.name))
    for place in dict.fromkeys(item.name.namespace for item in found if item.name.namespace):
        actions += [Operation("list", resource, place) for resource in (PODS, EVENTS, REPLICA_SETS)]
        actions += [Operation("get", CLAIMS, place), Operation("get", PODS, place, subresource="log")]
    actions += [Operation(verb, CONFIG_MAPS, cluster.namespace) for verb in ("get", "create", "update")]
    actions += [Operation("create", SECRETS, place) for place, _ in secret_places(cluster, documents)]
    return list(dict.fromkeys(actions))


def _stays(cluster: Cluster, item: Target) -> bool:
    return item.name.kind == "Namespace" and namespace_exists(cluster, item.name.name)


def require_rights(cluster: Cluster, actions: Sequence[Operation]) -> None:
    """Raises ClusterError that lists every verb and resource that is missing.

    A verb that is missing on all objects of a kind that were asked about stands there once, without names.
    """
    kinds: dict[Operation, list[Operation]] = {}
    for action in actions:
        whole = Operation(action.verb, action.resource, action.namespace, None, action.subresource)
        kinds.setdefault(whole, []).append(action)
    missing: list[Operation] = []
    for whole, single in kinds.items():
        if may(cluster, whole):
            continue
        refused = [action for action in single if action.name is None or not may(cluster, action)]
        missing += [whole] if len(refused) == len(single) else refused
    if missing:
        raise no_rights(missing, "these credentials")


def may(cluster: Cluster, action: Operation) -> bool:
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
