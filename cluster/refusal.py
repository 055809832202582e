"""What an API server refuses, in one line with the next step.

The server answers with a `Status` object: `reason`, `message`, `details.causes`. Quotas and Pod Security come as 403
too, and only their message tells them from missing rights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.kinds import Object, Resource

_WHO = re.compile(r'User "([^"]+)"')
_SHOWN = 500  # characters of an answer that is no Status, as from a proxy


@dataclass(frozen=True)
class Operation:
    """What was tried: a verb on a resource, as rights name them, and on which object."""

    verb: str
    resource: Resource
    namespace: str | None = None
    name: str | None = None
    subresource: str | None = None

    @property
    def granted_as(self) -> str:
        first, dot, group = self.resource.granted_as.partition(".")
        return f"{first}{f'/{self.subresource}' if self.subresource else ''}{dot}{group}"

    def __str__(self) -> str:
        where = f" in namespace {self.namespace}" if self.namespace and self.resource.namespaced else ""
        return f"{self.verb} {self.granted_as}{f' {self.name}' if self.name else ''}{where}"


def read_status(body: bytes) -> Object:
    """The Status object of an answer; whatever else it was stands in `message`."""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    return {"message": " ".join(body.decode(errors="replace").split())[:_SHOWN] or "an empty answer"}


def refused(action: Operation, code: int, status: Object) -> ClusterError:
    """The error for an answer of the server that is no success."""
    message = str(status.get("message") or status.get("reason") or f"HTTP {code}")
    causes: Sequence[Object] = (status.get("details") or {}).get("causes") or ()
    if code == 403:
        return _forbidden(action, message)
    if code == 409 and any(cause.get("reason") == "FieldManagerConflict" for cause in causes):
        return _conflict(action, causes)
    expected, fix = _KNOWN.get(code, ("a successful answer", "look at the API server's own logs, then try again"))
    if code in (400, 422) and causes:
        message = "; ".join(f"{cause.get('field') or '.'}: {cause.get('message')}" for cause in causes)
    return ClusterError(str(action), got=message, expected=expected, fix=fix, code=code)


def is_transient(error: ClusterError) -> bool:
    """Whether the server may well answer when it is asked again."""
    return error.code in (0, 429) or error.code >= 500


_KNOWN = {
    400: ("a valid object", "correct the manifest; `trireme lint-manifests` finds most mistakes offline"),
    401: ("credentials that the cluster accepts", "log in again, or choose another context of the kubeconfig"),
    404: (
        "a namespace and a kind that exist",
        "create the namespace (or set kubernetes.create_namespace: true), or install the custom resource definitions",
    ),
    409: ("an object that nobody else changes now", "run the command again when the other change is done"),
    422: ("a valid object", "correct the manifest; a field that cannot change needs the object deleted first"),
    429: ("a server with room for requests", "try again later"),
}


def quota_fix(namespace: str | None) -> str:
    return f"lower the replicas or requests, or raise it: kubectl describe quota -n {namespace}"


def _forbidden(action: Operation, message: str) -> ClusterError:
    if "exceeded quota" in message or "failed quota" in message or "must specify limits" in message:
        expected = "room in the namespace's ResourceQuota"
        fix = quota_fix(action.namespace)
    elif "no PriorityClass with name" in message:
        expected = "a PriorityClass that the cluster has"
        fix = "make it, or correct kubernetes.priority_class: kubectl get priorityclass"
    elif "violates PodSecurity" in message:
        expected, fix = "pods within the namespace's Pod Security level", "set the securityContext that it names"
    elif "being terminated" in message:
        expected, fix = "a namespace that stays", f"wait until namespace {action.namespace} is gone, then run again"
    elif "admission webhook" in message or "ValidatingAdmissionPolicy" in message:
        expected, fix = "an object that the cluster's policy admits", "change what the policy names, or ask its owner"
    else:
        who = _WHO.search(message)
        return no_rights([action], who.group(1) if who else "these credentials")
    return ClusterError(str(action), got=message, expected=expected, fix=fix, code=403)


def no_rights(missing: Sequence[Operation], who: str) -> ClusterError:
    """The verbs and resources that `who` may not use, all in one line."""
    namespace = next((action.namespace for action in missing if action.namespace), None)
    listed = ", ".join(_missing(action, beyond=namespace is not None) for action in missing)
    scope, option = (f" in namespace {namespace}", f" -n {namespace}") if namespace else ("", "")
    role = "Role" if namespace else "ClusterRole"
    if namespace and not all(action.resource.namespaced for action in missing):
        role = "Role, and a ClusterRole for what belongs to the whole cluster,"
    return ClusterError(
        f"rights of {who}{scope}",
        got=f"no right to {listed}",
        expected="these verbs on these resources",
        fix=f"ask for a {role} that grants them; `kubectl auth can-i --list{option}` shows what there is",
        code=403,
    )


def _missing(action: Operation, beyond: bool) -> str:
    """`beyond`: others of the list are in a namespace, so one that is not says so."""
    name = f" {action.name}" if action.name else ""
    where = " (cluster-wide)" if beyond and not action.resource.namespaced else ""
    return f"{action.verb} {action.granted_as}{name}{where}"


def _conflict(action: Operation, causes: Sequence[Object]) -> ClusterError:
    """Fields that another manager set. Its name comes quoted in the message of each cause."""
    fields: dict[str, list[str]] = {}
    for cause in causes:
        owner = re.search(r'conflict with "([^"]+)"', str(cause.get("message")))
        fields.setdefault(owner.group(1) if owner else "another manager", []).append(str(cause.get("field")))
    owners = "; ".join(f"{', '.join(names)} set by {owner}" for owner, names in fields.items())
    return ClusterError(
        str(action),
        got=owners,
        expected="fields that nobody else has set to other values",
        fix="leave these fields out of the manifest, or take them over with --force-conflicts",
        code=409,
    )
