"""A deployment from start to end: rights, a dry run of the whole, the record, the apply, the wait; and the way back.

Whatever fails, the last line of the error says what state things are in, and what `trireme undo` would do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.api import Cluster
from cluster.apply import Applied, apply, delete, dry_run, names
from cluster.control import ensure_secrets
from cluster.errors import ClusterError, RolloutError, Tolerated
from cluster.kinds import Object, ObjectName
from cluster.observe import WORKLOADS
from cluster.preflight import rehearse
from cluster.revision import History, Revision, documents_of, left_behind, read_history, write_history
from cluster.rights import needed_to_apply, require_rights
from cluster.rollout import Patience, RolloutProgress, wait

Report = Callable[[Sequence[RolloutProgress]], None]
UNTOUCHED = "State: nothing was changed, so there is nothing for `trireme undo` to take back"


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

    Nothing is changed when rights are missing or the server refuses any object, or any pod that is to come:
    ClusterError. Raises RolloutError when the workloads do not become ready; with `undo_on_failure` the last set that
    was ready is back then.
    """
    with _nothing_changed():
        history = read_history(cluster, name)
        doomed, _ = left_behind(names(cluster, history.live), names(cluster, documents))
        require_rights(cluster, needed_to_apply(cluster, documents, doomed))
        rehearse(cluster, documents, force)
    try:
        with _interruption_told(cluster, name):
            return _carry_out(cluster, history, documents, patience, report, force)
    except RolloutError as error:
        last = _way_back(cluster, name, patience, report) if undo_on_failure else _state(cluster, name)
        raise RolloutError(f"{error}\n{last}") from error


def plan(cluster: Cluster, documents: Sequence[Object], force: bool = False) -> list[Applied]:
    """What a deployment would do, judged by the server. Raises ClusterError for what it would refuse."""
    with _nothing_changed():
        return rehearse(cluster, documents, force)


def undo(cluster: Cluster, name: str, patience: Patience, report: Report, *, force: bool = False) -> Deployed:
    """Applies the last set before the current one that became ready, deletes what only the current one has, and waits.

    What serves comes first. Jobs of that set have done their work when it became ready: they do not run again, and one
    that the failed set left in their place is deleted. The way back is a revision of its own. Raises ClusterError when
    there is no such set, RolloutError when it is not ready (again).
    """
    with _nothing_changed():
        history = read_history(cluster, name)
        earlier = history.last_ready(before=_undone(history))
        if earlier is None:
            raise ClusterError(
                f"undo of {name} in namespace {cluster.namespace}",
                got=f"{len(history.revisions)} recorded sets, and none before the current one that became ready",
                expected="an earlier set to go back to",
                fix="deploy a spec that works",
            )
        documents = documents_of(cluster, history, earlier)
    try:
        with _interruption_told(cluster, name):
            return _carry_out(cluster, history, documents, patience, report, force, earlier.number)
    except RolloutError as error:
        raise RolloutError(f"{error}\n{_state(cluster, name)}") from error


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
    restores: int | None = None,
) -> Deployed:
    """Raises RolloutError whatever fails; the record says `failed` then, or `ready` still where it is the same set."""
    before = history.live
    with _nothing_changed(
        "State: nothing of the set was applied, but its Namespace perhaps: no need for `trireme undo`"
    ):
        namespaces = [item for item in documents if item["kind"] == "Namespace"]
        applied = list(apply(cluster, namespaces, force))  # the record lies in one of them
        history = history.begin(documents, restores)
        steady = history.revisions[-1].outcome == "ready"  # the same set again
        history = history if steady else write_history(cluster, history)
    try:
        rest = [item for item in documents if item["kind"] != "Namespace"]
        found, deleted = _bring(cluster, rest, patience, report, force, restores is not None, applied)
        # Only now: until the last old pod has gone, its ConfigMap of the hash before must be there for a restart.
        doomed, left = left_behind(names(cluster, before), names(cluster, documents))
        deleted += [item for item in doomed if delete(cluster, item)]
        done = history.end("ready")
        if not steady:
            write_history(cluster, done)
    except (RolloutError, ClusterError) as error:
        if not steady:
            with contextlib.suppress(ClusterError):  # the record then says `started`, which undo reads alike
                write_history(cluster, history.end("failed"))
        if isinstance(error, RolloutError):
            raise
        raise RolloutError(f"cut off after the dry run had passed: {error}") from error
    return Deployed(done.revisions[-1], tuple(applied), tuple(found), tuple(deleted), tuple(left))


def _bring(
    cluster: Cluster,
    documents: Sequence[Object],
    patience: Patience,
    report: Report,
    force: bool,
    back: bool,
    applied: list[Applied],
) -> tuple[list[RolloutProgress], list[ObjectName]]:
    """Applies and waits. On the way `back`, without the Jobs: what serves must not wait for one that hangs."""
    jobs = [item for item in documents if back and item["kind"] == "Job"]
    rest = [item for item in documents if item not in jobs]
    if back:
        _keep_secrets(cluster, rest)
    else:
        ensure_secrets(cluster, rest)  # before the pods, which wait for them or read them once
    applied += apply(cluster, rest, force)
    ended, hanging = _end_others(cluster, jobs, force)
    found = wait(cluster, workloads(cluster, rest), patience, report)
    if hanging:
        raise RolloutError("what serves is back and ready, but a Job of the failed set is left: " + "; ".join(hanging))
    return found, ended


def _keep_secrets(cluster: Cluster, documents: Sequence[Object]) -> None:
    """The way back needs no right to Secrets: the deployment before it made them."""
    with Tolerated(403):
        ensure_secrets(cluster, documents)


def _end_others(cluster: Cluster, jobs: Sequence[Object], force: bool) -> tuple[list[ObjectName], list[str]]:
    """Deletes Jobs that stand in place of `jobs` with another template; and why one could not be."""
    ended, hanging = [], []
    for item, name in zip(jobs, names(cluster, jobs), strict=True):
        try:
            resource = cluster.resource(name.api_version, name.kind)
            if resource is None or cluster.get(resource, name.namespace, name.name) is None:
                continue
            if _differs(cluster, item, force) and delete(cluster, name):
                ended.append(name)
        except ClusterError as error:
            hanging.append(str(error))
    return ended, hanging


def _differs(cluster: Cluster, item: Object, force: bool) -> bool:
    with Tolerated(422):
        return any(found.change == "replaced" for found in dry_run(cluster, [item], force))
    return True  # one that runs


@contextlib.contextmanager
def _nothing_changed(state: str = UNTOUCHED) -> Iterator[None]:
    """The last line of what is refused before anything was done."""
    try:
        yield
    except ClusterError as error:
        fix = f"{error.fix}\n{state}"
        raise ClusterError(error.what, got=error.got, expected=error.expected, fix=fix, code=error.code) from error


@contextlib.contextmanager
def _interruption_told(cluster: Cluster, name: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        cluster.warn(f"interrupted\n{_state(cluster, name)}")
        raise


def _way_back(cluster: Cluster, name: str, patience: Patience, report: Report) -> str:
    try:
        restored = undo(cluster, name, patience, report).revision
    except ClusterError as error:
        reason = str(error).removesuffix(UNTOUCHED).rstrip()
        return f"not undone: {reason}\n{_state(cluster, name)}"
    except RolloutError as error:
        return f"not undone: {error}"
    back = f"revision {restored.restores} is back as revision {restored.number}"
    return f"State: undone: {back}, ready; this was `trireme undo`"


def _state(cluster: Cluster, name: str) -> str:
    """What the cluster was last given, and what is there to go back to."""
    try:
        history = read_history(cluster, name)
    except ClusterError as error:
        return f"State: unknown ({error.got}); see `trireme status`, then `trireme undo`"
    current, earlier = history.current, history.last_ready(before=_undone(history))
    if current is None:
        return "State: no set is recorded, so there is nothing for `trireme undo` to take back; see `trireme status`"
    here = f"revision {current.number} ({_OUTCOMES[current.outcome]}) is in the cluster, whole or in part"
    if earlier is None:
        return f"State: {here}; `trireme undo` has no earlier set that became ready: deploy a corrected one"
    return f"State: {here}; `trireme undo` brings revision {earlier.number} back"


_OUTCOMES = {"started": "not known to be ready", "failed": "not ready", "ready": "was ready before"}


def time_limit_s(documents: Sequence[Object]) -> float:
    """A little more than the deadlines that the objects set themselves; 15 minutes where they set none."""
    keys = {"Deployment": "progressDeadlineSeconds", "Job": "activeDeadlineSeconds"}
    found = [float((item.get("spec") or {}).get(keys.get(item["kind"], ""), 0)) for item in documents]
    return 60.0 + (max(found, default=0.0) or 840.0)


def workloads(cluster: Cluster, documents: Sequence[Object]) -> list[ObjectName]:
    """Those that a rollout waits for. One that an autoscaler may keep at zero pods is ready at zero."""
    return [name for name in names(cluster, documents) if name.kind in WORKLOADS]
