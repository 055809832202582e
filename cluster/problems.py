"""Why a pod does not run: its own words, and the next step. Pure functions of what the cluster said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.kinds import Object, conditions, name_of
from cluster.observe import Observed, is_bound, is_ready
from cluster.refusal import quota_fix
from runtime.errors import UNPROVEN

_UNPROVEN_FIX = "run the pod on another kind of node, or build for this one: the model gives other outputs there"
_ERROR = "error: "
CRASHES = 2  # restarts before a container that ends counts as broken, not as unlucky


@dataclass(frozen=True)
class Problem:
    """`waits`: it may end by itself as the cluster changes (a node comes, a volume binds), so only a deadline decides.

    `container` names whose log tells more.
    """

    subject: str
    reason: str
    fix: str
    waits: bool = False
    container: str | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}. Fix: {self.fix}"


_IMAGE_FIX = "check the image's name and tag, that its registry can be reached, and the pull secret"
_WAITING = {
    "ErrImagePull": _IMAGE_FIX,
    "ImagePullBackOff": _IMAGE_FIX,
    "ErrImageNeverPull": "load the image onto the nodes (`kind load docker-image`), or change imagePullPolicy",
    "InvalidImageName": "correct the image's name",
    "CreateContainerConfigError": "create the ConfigMap or Secret that it names",
    "CreateContainerError": "correct what the container runtime names",
    "RunContainerError": "correct the command, or what the container runtime names",
}


def problems(seen: Observed) -> list[Problem]:
    """Every problem of the workload's pods, those that will not mend by themselves first."""
    found = [*_refused_pods(seen)]
    for pod in seen.pods:
        if not is_ready(pod):
            found += _pod_problems(pod, seen)
    return sorted(dict.fromkeys(found), key=lambda problem: problem.waits)


def _refused_pods(seen: Observed) -> Iterator[Problem]:
    """Pods that the server would not create: quota, Pod Security, admission."""
    for owner in [item for item in (seen.workload, *seen.replica_sets) if item is not None]:
        failure = conditions(owner).get("ReplicaFailure") or conditions(owner).get("FailedCreate")
        if failure and failure.get("status") == "True":
            yield _refused(seen, str(failure.get("message")))
            return  # the Deployment repeats what its ReplicaSet says
    told = [event for event in seen.events if _is_refusal(event)]
    if told and not seen.pods:  # a Job has no such condition, only events
        yield _refused(seen, str(_newest(told).get("message")))


def _refused(seen: Observed, message: str) -> Problem:
    if "exceeded quota" in message or "failed quota" in message:
        fix = quota_fix(seen.name.namespace)
    else:
        fix = "change the pod template as the message says"
    return Problem(f"pods of {seen.name}", message, fix)


def _is_refusal(event: Object) -> bool:
    """Services and the like may have the same name."""
    kind = (event.get("involvedObject") or {}).get("kind", "Job")
    return event.get("reason") == "FailedCreate" and kind in ("Job", "StatefulSet", "LeaderWorkerSet")


def _pod_problems(pod: Object, seen: Observed) -> Iterator[Problem]:
    subject, status = f"pod {name_of(pod)}", pod.get("status") or {}
    if status.get("phase") == "Failed" and status.get("reason"):
        reason = f"{status['reason']}: {status.get('message', '')}".rstrip(": ")
        fix = "see `kubectl describe node` for pressure, and the pod's requests and limits"
        yield Problem(subject, reason, fix, waits=True)  # its controller has started another
    for state in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        yield from _container_problems(subject, state, pod, retried=seen.name.kind == "Job")
    scheduled = conditions(pod).get("PodScheduled", {})
    if scheduled.get("status") == "False":
        yield from _unscheduled(subject, str(scheduled.get("message", "")), pod, seen)
    else:
        yield from _told_by_events(subject, pod, seen)


def _container_problems(subject: str, state: Object, pod: Object, retried: bool) -> Iterator[Problem]:
    """`retried`: how often it may fail is the Job's to decide."""
    waiting = (state.get("state") or {}).get("waiting") or {}
    ended = (state.get("lastState") or {}).get("terminated") or (state.get("state") or {}).get("terminated") or {}
    reason, where = str(waiting.get("reason", "")), f"{subject}, container {state.get('name')}"
    if reason in _WAITING:
        text = f"{reason}: {waiting.get('message') or state.get('image')}"
        yield Problem(where, text, _WAITING[reason])
        return
    once = (pod.get("spec") or {}).get("restartPolicy") == "Never"
    failed, said = ended.get("exitCode", 0) != 0, _last_words(str(ended.get("message") or ""))
    unproven = UNPROVEN in said  # another try gives the same
    if failed and (unproven or reason == "CrashLoopBackOff" or once or state.get("restartCount", 0) >= CRASHES):
        name = str(state.get("name"))
        if ended.get("reason") == "OOMKilled":
            text, fix = f"killed: over its memory limit{_memory_limit(pod, name)}", "raise the memory limit"
        else:
            text = f"exits with {ended['exitCode']}, {state.get('restartCount', 0)} restarts" + (said and f": {said}")
            fix = _UNPROVEN_FIX if unproven else "read the end of its log"
        yield Problem(where, text, fix, waits=retried, container=name)


def _last_words(message: str) -> str:
    """The error that a container of ours ends with; the kubelet keeps the end of its log as the termination message."""
    errors = [line for line in message.splitlines() if line.startswith(_ERROR)]
    return errors[-1].removeprefix(_ERROR).rstrip(". ") if errors else ""


def _memory_limit(pod: Object, container: str) -> str:
    for item in (pod.get("spec") or {}).get("containers") or ():
        limit = ((item.get("resources") or {}).get("limits") or {}).get("memory")
        if item.get("name") == container and limit:
            return f" of {limit}"
    return ""


def _unscheduled(subject: str, message: str, pod: Object, seen: Observed) -> Iterator[Problem]:
    unbound = [claim for claim in seen.claims if not is_bound(claim)]
    if "PersistentVolumeClaim" in message and unbound:
        for claim in unbound:
            yield _unbound(claim, seen)
        return
    scale_up = next((str(e.get("message")) for e in _events(pod, seen) if e.get("reason") == "NotTriggerScaleUp"), "")
    if "Insufficient nvidia.com/gpu" in message or "nvidia.com/gpu" in scale_up:
        fix = "add nodes with enough free GPUs, with the NVIDIA device plugin on them, or ask for fewer GPUs a pod"
    elif "untolerated taint" in message:
        fix = "add a toleration for the taint that it names"
    elif "node affinity" in message or "node selector" in message:
        fix = "label a node as the pod's nodeSelector asks, or correct the selector"
    else:
        fix = "add nodes, or lower the pod's requests"
    text = f"no node takes it: {message}" + (f" (autoscaler: {scale_up})" if scale_up else "")
    yield Problem(subject, text, fix, waits=not scale_up)


def _unbound(claim: Object, seen: Observed) -> Problem:
    """A claim that waits for a volume; its events say what the provisioner thinks."""
    told = [event for event in _events(claim, seen) if event.get("type") == "Warning"]
    store = (claim.get("spec") or {}).get("storageClassName")
    reason = str(told[-1].get("message")) if told else f"no volume yet of storage class {store or '(the default)'}"
    fix = "name a storage class that the cluster has (`kubectl get storageclass`) and that knows the access mode"
    return Problem(f"PersistentVolumeClaim {name_of(claim)}", f"not bound: {reason}", fix, waits=True)


_EVENTS = {
    "FailedMount": "create what the volume names, and look at the storage driver",
    "FailedAttachVolume": "detach the volume from its other node, or use an access mode that allows both",
    "FailedCreatePodSandBox": "look at the node's container runtime and network plugin",
    "Unhealthy": "give the model more time in the startup probe, or read the server's log",
}


def _told_by_events(subject: str, pod: Object, seen: Observed) -> Iterator[Problem]:
    """The newest warning about a pod that is on a node and still not ready."""
    told = [event for event in _events(pod, seen) if event.get("reason") in _EVENTS]
    if told:
        event = _newest(told)
        yield Problem(subject, f"{event['reason']}: {event.get('message')}", _EVENTS[event["reason"]], waits=True)


def _newest(told: list[Object]) -> Object:
    return max(told, key=lambda found: str(found.get("lastTimestamp") or found.get("eventTime") or ""))


def _events(item: Object, seen: Observed) -> list[Object]:
    return [event for event in seen.events if (event.get("involvedObject") or {}).get("name") == name_of(item)]
