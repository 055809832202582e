"""The sets of objects that were applied, kept in the cluster: what to go back to, and what an older set left behind.

They lie in a ConfigMap, so that who may not read Secrets may still see them and go back. Secrets of a set are kept
apart, in a Secret, and only their names stand in the record. The revisions that a Deployment keeps would not do: they
hold pod templates only, and taking one back leaves the fields without the manager that applied them, so that the next
apply merges wrongly (kubernetes/kubernetes#112911).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from cluster.api import Cluster
from cluster.apply import MANAGER
from cluster.errors import ClusterError
from cluster.kinds import CONFIG_MAPS, Object, ObjectName, metadata
from cluster.packing import canonical, pack, stub, unpack
from cluster.refusal import Operation
from cluster.sealed import read_sealed, seal, write_sealed

Outcome = Literal["started", "ready", "failed"]
KEPT = 5  # a ConfigMap holds 1 MiB, a compressed set some 10 KiB
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
    """Oldest first. `version` guards against two writers; None before the first revision.

    `strays` name the objects of failed sets that have been dropped from the record: they may still be in the cluster.
    `secrets` are contents that are not written yet, by digest.
    """

    name: str
    revisions: tuple[Revision, ...] = ()
    version: str | None = None
    strays: tuple[Object, ...] = ()
    secrets: Mapping[str, Object] = field(default_factory=dict)

    @property
    def current(self) -> Revision | None:
        return self.revisions[-1] if self.revisions else None

    @property
    def live(self) -> tuple[Object, ...]:
        """What may be in the cluster: the last set that was ready, and what was tried on top of it."""
        ready = self.last_ready(before=self.current.number + 1) if self.current else None
        tried = [item for item in self.revisions if not ready or item.number >= ready.number]
        return (*self.strays, *(item for revision in tried for item in revision.documents))

    def begin(self, documents: Sequence[Object], restores: int | None = None) -> History:
        """With one more revision, at first of unknown outcome; the same set again is the same revision again.

        Old revisions go, but never the last that was ready; of the failed ones that go, the objects' names stay.
        """
        sealed, secrets = seal(documents)
        if self.current is not None and restores is None and canonical(self.current.documents) == canonical(sealed):
            outcome: Outcome = "ready" if self.current.outcome == "ready" else "started"
            return replace(
                self, revisions=(*self.revisions[:-1], replace(self.current, outcome=outcome)), secrets=secrets
            )
        number = self.current.number + 1 if self.current else 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        kept = self.revisions[-(KEPT - 1) :]
        ready = self.last_ready(before=number)
        if ready is not None and ready not in kept:
            kept = (ready, *kept[1:])
        gone = [item for item in self.revisions if item not in kept and (ready is None or item.number > ready.number)]
        names = (*self.strays, *(stub(item) for old in gone for item in old.documents))
        strays = {canonical(name): name for name in names}
        revisions = (*kept, Revision(number, now, "started", tuple(sealed), restores))
        return replace(self, revisions=revisions, strays=tuple(strays.values()), secrets=secrets)

    def end(self, outcome: Outcome) -> History:
        """With the outcome of the newest revision. A set that is ready has had everything else deleted."""
        strays = () if outcome == "ready" else self.strays
        return replace(
            self, revisions=(*self.revisions[:-1], replace(self.revisions[-1], outcome=outcome)), strays=strays
        )

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
    record = cluster.get(CONFIG_MAPS, cluster.namespace, _record(name))
    if record is None:
        return History(name)
    try:
        rows = unpack(record["data"]["revisions"])
        revisions = tuple(Revision(**{**item, "documents": tuple(item["documents"])}) for item in rows["revisions"])
        strays = tuple(rows["strays"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ClusterError(
            f"ConfigMap {cluster.namespace}/{_record(name)}",
            got=f"no record of applied sets ({error})",
            expected="what `trireme deploy` wrote",
            fix="delete this ConfigMap; what is deployed stays as it is, but there is nothing to undo to",
        ) from error
    return History(name, revisions, str(metadata(record)["resourceVersion"]), strays)


def write_history(cluster: Cluster, history: History) -> History:
    """Returns it with its new version. Raises ClusterError (409) when another deployment wrote in between."""
    about: dict[str, Any] = {
        "name": _record(history.name),
        "namespace": cluster.namespace,
        "labels": {"app.kubernetes.io/managed-by": MANAGER, "app.kubernetes.io/instance": history.name},
    }
    kept = [item for revision in history.revisions for item in revision.documents]
    write_sealed(cluster, about, history.secrets, kept)  # first: a record must not name what is not there
    rows = [{**vars(item), "documents": list(item.documents)} for item in history.revisions]
    packed = pack({"revisions": rows, "strays": list(history.strays)})
    if history.version is not None:
        about["resourceVersion"] = history.version
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"revisions": packed}}
    new = history.version is None
    action = Operation("create" if new else "update", CONFIG_MAPS, cluster.namespace, _record(history.name))
    path = CONFIG_MAPS.path(cluster.namespace, None if new else _record(history.name))
    answer = cluster.send("POST" if new else "PUT", path, action, {"fieldManager": MANAGER}, body)
    return replace(history, version=str(metadata(answer)["resourceVersion"]), secrets={})


def documents_of(cluster: Cluster, history: History, revision: Revision) -> tuple[Object, ...]:
    """The set as it was applied, its Secrets included. Raises ClusterError where these may not be read."""
    return read_sealed(cluster, _record(history.name), revision.documents)


def _record(name: str) -> str:
    return f"{MANAGER}-revisions-{name}"
