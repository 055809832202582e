"""The sets of objects that were applied, kept in the cluster: what to go back to, and what an older set left behind.

They lie in one Secret, as Helm keeps its releases: a set may hold Secrets itself. The revisions that a Deployment keeps
would not do: they hold pod templates only, and taking one back leaves the fields without the manager that applied them,
so that the next apply merges wrongly (kubernetes/kubernetes#112911).
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from cluster.api import Cluster
from cluster.apply import MANAGER
from cluster.errors import ClusterError
from cluster.kinds import SECRETS, Object, ObjectName, metadata
from cluster.refusal import Operation

Outcome = Literal["started", "ready", "failed"]
KEPT = 5  # a Secret holds 1 MiB, a compressed set some 10 KiB
LASTING = (
    "PersistentVolumeClaim",
    "PersistentVolume",
    "Namespace",
    "CustomResourceDefinition",
)  # deleting them loses data


@dataclass(frozen=True)
class Revision:
    """One applied set. `restores` is the number of the revision that an undo took it from."""

    number: int
    applied_at: str
    outcome: Outcome
    documents: tuple[Object, ...]
    restores: int | None = None


@dataclass(frozen=True)
class History:
    """Oldest first. `version` guards against two writers; None before the first revision."""

    name: str
    revisions: tuple[Revision, ...] = ()
    version: str | None = None

    @property
    def current(self) -> Revision | None:
        return self.revisions[-1] if self.revisions else None

    @property
    def live(self) -> tuple[Object, ...]:
        """What may be in the cluster: the last set that was ready, and what was tried on top of it."""
        ready = self.last_ready(before=self.current.number + 1) if self.current else None
        return tuple(
            item
            for revision in self.revisions
            if not ready or revision.number >= ready.number
            for item in revision.documents
        )

    def begin(self, documents: Sequence[Object], restores: int | None = None) -> History:
        """With one more revision, at first of unknown outcome; old ones go, but never the last that was ready."""
        number = self.current.number + 1 if self.current else 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        kept = self.revisions[-(KEPT - 1) :]
        ready = self.last_ready(before=number)
        if ready is not None and ready not in kept:
            kept = (ready, *kept[1:])
        return replace(self, revisions=(*kept, Revision(number, now, "started", tuple(documents), restores)))

    def end(self, outcome: Outcome) -> History:
        """With the outcome of the newest revision."""
        return replace(self, revisions=(*self.revisions[:-1], replace(self.revisions[-1], outcome=outcome)))

    def last_ready(self, before: int) -> Revision | None:
        """The newest revision under `before` that rolled out."""
        found = [item for item in self.revisions if item.number < before and item.outcome == "ready"]
        return found[-1] if found else None


def left_behind(before: Sequence[ObjectName], after: Sequence[ObjectName]) -> tuple[list[ObjectName], list[ObjectName]]:
    """What only `before` has: first what is to be deleted, then what holds data and is only reported."""
    staying = set(after)
    gone = [name for name in dict.fromkeys(before) if name not in staying]
    return [name for name in gone if name.kind not in LASTING], [name for name in gone if name.kind in LASTING]


def read_history(cluster: Cluster, name: str) -> History:
    """Raises ClusterError when the record is none of ours."""
    secret = cluster.get(SECRETS, cluster.namespace, _secret(name))
    if secret is None:
        return History(name)
    try:
        packed = base64.b64decode(secret["data"]["revisions"])
        revisions = tuple(
            Revision(**{**item, "documents": tuple(item["documents"])}) for item in json.loads(gzip.decompress(packed))
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ClusterError(
            f"Secret {cluster.namespace}/{_secret(name)}",
            got=f"no record of applied sets ({error})",
            expected="what `trireme deploy` wrote",
            fix="delete this Secret; what is deployed stays as it is, but there is nothing to undo to",
        ) from error
    return History(name, revisions, str(metadata(secret)["resourceVersion"]))


def write_history(cluster: Cluster, history: History) -> History:
    """Returns it with its new version. Raises ClusterError (409) when another deployment wrote in between."""
    rows = [{**vars(item), "documents": list(item.documents)} for item in history.revisions]
    packed = base64.b64encode(gzip.compress(json.dumps(rows).encode(), mtime=0)).decode()
    about: dict[str, Any] = {
        "name": _secret(history.name),
        "namespace": cluster.namespace,
        "labels": {"app.kubernetes.io/managed-by": MANAGER, "app.kubernetes.io/instance": history.name},
    }
    if history.version is not None:
        about["resourceVersion"] = history.version
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": about, "data": {"revisions": packed}}
    new = history.version is None
    action = Operation("create" if new else "update", SECRETS, cluster.namespace, _secret(history.name))
    path = SECRETS.path(cluster.namespace, None if new else _secret(history.name))
    answer = cluster.send("POST" if new else "PUT", path, action, {"fieldManager": MANAGER}, body)
    return replace(history, version=str(metadata(answer)["resourceVersion"]))


def _secret(name: str) -> str:
    return f"{MANAGER}-revisions-{name}"
