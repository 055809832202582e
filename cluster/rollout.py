"""How far a workload is, and the wait until it is there.

`progress` is a pure reduction of what the cluster said, by the rules of the controllers' own documentation:
https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#deployment-status and, for jobs,
https://kubernetes.io/docs/concepts/workloads/controllers/job/#terminal-job-conditions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.api import Cluster
from cluster.errors import ClusterError, RolloutError
from cluster.kinds import ObjectName, conditions, metadata, name_of
from cluster.observe import Observed, last_words, observe, wait_for_change
from cluster.problems import Problem, problems
from cluster.refusal import is_transient

State = Literal["progressing", "done", "failed"]


@dataclass(frozen=True)
class RolloutProgress:
    """`ready` of `wanted` pods; for a job, completions. `text` is one line for a person."""

    name: ObjectName
    state: State
    ready: int
    wanted: int
    text: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Patience:
    """`problem_s`: how long a problem that does not mend by itself may last; a registry hiccup is shorter.

    `refresh_s`: how old news of pods may become. `pause_s`: the least time between two looks.
    """

    timeout_s: float = 900.0
    problem_s: float = 60.0
    refresh_s: float = 3.0
    pause_s: float = 0.5


def progress(seen: Observed) -> RolloutProgress:
    """Where the workload is. A problem alone does not make it `failed`: its controller may still get over it."""
    if seen.workload is None:
        return RolloutProgress(seen.name, "failed", 0, 0, "it is not in the cluster (any more)")
    reduce = {"Deployment": _deployment, "LeaderWorkerSet": _leader_worker_set, "Job": _job}[seen.name.kind]
    state, ready, wanted, text = reduce(seen.workload)
    found = () if state == "done" else tuple(problems(seen))
    return RolloutProgress(seen.name, state, ready, wanted, text, found)


def looks_at(cluster: Cluster, names: Sequence[ObjectName], settled: bool) -> list[RolloutProgress]:
    """One look at each workload. `settled`: their set became ready, so a Job that has gone since has ended well."""
    found = [progress(observe(cluster, name)) for name in names]
    return [
        RolloutProgress(item.name, "done", 0, 0, "it has ended, and was removed after its time to live")
        if settled and item.name.kind == "Job" and not item.wanted
        else item
        for item in found
    ]


Reduced = tuple[State, int, int, str]


def _seen(workload: Any) -> bool:
    """Whether the status is about this generation; until then it tells of the previous one."""
    return bool((workload.get("status") or {}).get("observedGeneration", 0) >= metadata(workload).get("generation", 0))


def _deployment(workload: Any) -> Reduced:
    status, wanted = workload.get("status") or {}, int(workload["spec"].get("replicas", 1))
    updated, available = int(status.get("updatedReplicas", 0)), int(status.get("availableReplicas", 0))
    if not _seen(workload):
        return "progressing", 0, wanted, "the controller has not seen the change yet"
    found = conditions(workload).get("Progressing", {})
    if found.get("reason") == "ProgressDeadlineExceeded":
        limit = workload["spec"].get("progressDeadlineSeconds", 600)
        return "failed", min(updated, available), wanted, f"no progress within its deadline of {limit} s"
    if workload["spec"].get("paused"):
        return "progressing", min(updated, available), wanted, "paused: `kubectl rollout resume` lets it go on"
    if updated < wanted:
        return "progressing", min(updated, available), wanted, f"{updated} of {wanted} pods are of the new revision"
    if int(status.get("replicas", 0)) > updated:
        old = int(status["replicas"]) - updated
        return "progressing", min(updated, available), wanted, f"{old} pods of the old revision are to end"
    if available < updated:
        return "progressing", available, wanted, f"{available} of {wanted} pods are available"
    return "done", available, wanted, f"{available} pods are available"


def _leader_worker_set(workload: Any) -> Reduced:
    """Replicas are groups of pods: one is ready when its leader and all its workers are."""
    status, wanted = workload.get("status") or {}, int(workload["spec"].get("replicas", 1))
    ready, updated = int(status.get("readyReplicas", 0)), int(status.get("updatedReplicas", 0))
    condition, generation = conditions(workload).get("Available", {}), metadata(workload).get("generation")
    by_condition = condition.get("observedGeneration", generation) == generation  # older releases have nothing else
    known = _seen(workload) if "observedGeneration" in status else by_condition
    if not known:
        return "progressing", 0, wanted, "the controller has not seen the change yet"
    if updated < wanted:
        return "progressing", min(ready, updated), wanted, f"{updated} of {wanted} groups are of the new revision"
    if ready < wanted or (condition.get("status") != "True" and wanted > 0):
        return "progressing", min(ready, updated), wanted, f"{ready} of {wanted} groups are ready"
    return "done", ready, wanted, f"{ready} groups are ready"


def _job(workload: Any) -> Reduced:
    status, wanted = workload.get("status") or {}, int(workload["spec"].get("completions") or 1)
    done, found = int(status.get("succeeded", 0)), conditions(workload)
    if found.get("Complete", {}).get("status") == "True":
        return "done", done, wanted, f"{done} of {wanted} completed"
    if found.get("Failed", {}).get("status") == "True":
        reason = f"{found['Failed'].get('reason')}: {found['Failed'].get('message')}"
        return "failed", done, wanted, reason
    if workload["spec"].get("suspend"):
        return "progressing", done, wanted, "suspended: a queue controller or `spec.suspend: false` starts it"
    return "progressing", done, wanted, f"{done} of {wanted} completed, {status.get('active', 0)} pods run"


def wait(
    cluster: Cluster,
    names: Sequence[ObjectName],
    patience: Patience,
    report: Callable[[Sequence[RolloutProgress]], None],
) -> list[RolloutProgress]:
    """Returns when every workload is done. `report` hears of each look.

    Raises RolloutError with the pods' own reasons when one has failed, when a problem lasts, or when the time is up.
    """
    end, since = time.monotonic() + patience.timeout_s, dict[tuple[str, str], float]()
    while True:
        try:
            seen = [observe(cluster, name) for name in names]
        except ClusterError as error:  # managed control planes go away for a while when they are upgraded
            if not is_transient(error) or time.monotonic() >= end:
                raise
            time.sleep(patience.pause_s)
            continue
        found = [progress(item) for item in seen]
        report(found)
        if all(item.state == "done" for item in found):
            return found
        now = time.monotonic()
        since = {problem: since.get(problem, now) for problem in _lasting(found)}
        too_long = {problem for problem, begun in since.items() if now - begun >= patience.problem_s}
        failed = [item for item in found if item.state == "failed" or _lasting([item]) & too_long]
        if failed or now >= end:
            late = "" if failed else f"not ready within {patience.timeout_s:.0f} s; "
            unfinished = failed or [item for item in found if item.state != "done"]
            raise RolloutError("\n".join(f"{late}{_reason(cluster, item, seen)}" for item in unfinished))
        waiting = next(look for look, item in zip(seen, found, strict=True) if item.state != "done")
        wait_for_change(cluster, waiting, min(patience.refresh_s, end - now), patience.pause_s)


def _lasting(found: Sequence[RolloutProgress]) -> set[tuple[str, str]]:
    """What will not mend by itself, by pod and remedy: the words change with each attempt to pull or to start."""
    return {(problem.subject, problem.fix) for item in found for problem in item.problems if not problem.waits}


def _reason(cluster: Cluster, item: RolloutProgress, seen: Sequence[Observed]) -> str:
    """One line with the next step, and under it the last of a broken container's log."""
    if not item.problems:
        where = f"-n {item.name.namespace} {item.name.kind.lower()}/{item.name.name}"
        return f"{item.name}: {item.text}. Fix: look at `kubectl describe {where}` and the pods' logs"
    first = item.problems[0]
    more = f" (and {len(item.problems) - 1} more problems)" if len(item.problems) > 1 else ""
    line = f"{item.name}: {item.text}; {first}{more}"
    pods = [pod for look in seen for pod in look.pods if first.container and f"pod {name_of(pod)}," in first.subject]
    words = last_words(cluster, pods[0], first.container) if pods and first.container else ""
    return line + "".join(f"\n    {text}" for text in words.splitlines())
