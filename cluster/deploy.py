"""A deployment from start to end: rights, a dry run of the whole, the record, the apply, the wait; and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.api import Cluster
from cluster.apply import Applied, apply, delete, dry_run, names
from cluster.control import ensure_control_secret
from cluster.errors import ClusterError, RolloutError
from cluster.kinds import Object, ObjectName
from cluster.observe import WORKLOADS
from cluster.revision import History, Revision, left_behind, read_history, write_history
from cluster.rights import needed_to_apply, require_rights
from cluster.rollout import Patience, RolloutProgress, wait

Report = Callable[[Sequence[RolloutProgress]], None]


@dataclass(frozen=True)
class Deployed:
    """`deleted` are objects of the set before that this one no longer has; `left` hold data and are for the user."""

    revision: Revision
    applied: tuple[Applied, ...]
    progress: tuple[RolloutProgress, ...]
    deleted: tuple[ObjectName, ...]
    left: tuple[ObjectName, ...]


def deploy(
    cluster: Cluster,
    name: str,
    documents: Sequence[Object],
    patience: Patience,
    report: Report,
    *,
    force: bool = False,
    undo_on_failure: bool = False,
) -> Deployed:
    """Applies the set and waits until its workloads are ready.

    Nothing is changed when rights are missing or the server refuses any object: ClusterError. Raises RolloutError when
    the workloads do not become ready; with `undo_on_failure` the last set that was ready is back then.
    """
    require_rights(cluster, needed_to_apply(cluster, documents))
    dry_run(cluster, documents, force)
    try:
        return _carry_out(cluster, read_history(cluster, name), documents, patience, report, force, None)
    except RolloutError as error:
        if not undo_on_failure:
            raise
        raise RolloutError(f"{error}\n{_way_back(cluster, name, patience, report)}") from error


def undo(cluster: Cluster, name: str, patience: Patience, report: Report, *, force: bool = False) -> Deployed:
    """Applies the last set before the current one that became ready, deletes what only the current one has, and waits.

    The way back is a revision of its own. Raises ClusterError when there is no such set.
    """
    history = read_history(cluster, name)
    earlier = history.last_ready(before=_undone(history))
    if earlier is None:
        raise ClusterError(
            f"undo of {name} in namespace {cluster.namespace}",
            got=f"{len(history.revisions)} recorded sets, and none before the current one that became ready",
            expected="an earlier set to go back to",
            fix="deploy a spec that works",
        )
    return _carry_out(cluster, history, earlier.documents, patience, report, force, earlier.number)


def _undone(history: History) -> int:
    """Under which number to look: two undos in a row go two sets back, and not to and fro."""
    current = history.current
    if current is None:
        return 0
    return current.restores if current.restores is not None and current.outcome == "ready" else current.number


def _carry_out(
    cluster: Cluster,
    history: History,
    documents: Sequence[Object],
    patience: Patience,
    report: Report,
    force: bool,
    restores: int | None,
) -> Deployed:
    before = history.live
    namespaces = [item for item in documents if item["kind"] == "Namespace"]
    rest = [item for item in documents if item["kind"] != "Namespace"]
    applied = list(apply(cluster, namespaces, force))  # the record lies in one of them
    history = write_history(cluster, history.begin(documents, restores))
    try:
        ensure_control_secret(cluster, rest)  # before the pods, which read it once
        applied += apply(cluster, rest, force)
        found = wait(cluster, workloads(cluster, documents), patience, report)
        # Only now: until the last old pod has gone, its ConfigMap of the hash before must be there for a restart.
        doomed, left = left_behind(names(cluster, before), names(cluster, documents))
        deleted = tuple(item for item in doomed if delete(cluster, item))
    except (RolloutError, ClusterError) as error:
        with contextlib.suppress(ClusterError):  # the record then says `started`, which undo reads alike
            write_history(cluster, history.end("failed"))
        if isinstance(error, RolloutError):
            raise
        raise RolloutError(f"cut off after the dry run had passed: {error}") from error
    history = write_history(cluster, history.end("ready"))
    return Deployed(history.revisions[-1], tuple(applied), tuple(found), deleted, tuple(left))


def _way_back(cluster: Cluster, name: str, patience: Patience, report: Report) -> str:
    try:
        restored = undo(cluster, name, patience, report)
    except ClusterError as error:
        return f"not undone: {error}"
    except RolloutError as error:
        return f"undone, but what was restored is not ready either: {error}"
    return f"undone: revision {restored.revision.restores} is back as revision {restored.revision.number}"


def time_limit_s(documents: Sequence[Object]) -> float:
    """A little more than the deadlines that the objects set themselves; 15 minutes where they set none."""
    keys = {"Deployment": "progressDeadlineSeconds", "Job": "activeDeadlineSeconds"}
    found = [float((item.get("spec") or {}).get(keys.get(item["kind"], ""), 0)) for item in documents]
    return 60.0 + (max(found, default=0.0) or 840.0)


def workloads(cluster: Cluster, documents: Sequence[Object]) -> list[ObjectName]:
    """Those that a rollout waits for. One that an autoscaler may keep at zero pods is ready at zero."""
    return [name for name in names(cluster, documents) if name.kind in WORKLOADS]
