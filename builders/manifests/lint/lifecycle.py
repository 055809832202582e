"""How pods come and go: grace, rollouts, disruption budgets, autoscalers, claims that several nodes share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from builders.manifests.lint.objects import (
    Finding,
    KubeObject,
    ObjectSet,
    Pod,
    at,
    mapping,
    matches,
    number,
    rows,
    words,
)
from builders.manifests.lint.references import environment, expand

MARGIN_S = 10  # to end what did not drain
_TRITON_EXIT_S = 30  # tritonserver's own default
_DEFAULT_GRACE_S = 30
_EXIT_FLAG = re.compile(r"--exit-timeout(?:-secs|-s)[= ](\d+)")
_BOUND = re.compile(r"[0-9]+%?")
_SLEEP = re.compile(r"\bsleep (\d+)")
_SCALED = ("Deployment", "StatefulSet", "LeaderWorkerSet", "ReplicaSet")


def grace(objects: ObjectSet) -> Iterator[Finding]:
    """preStop and drain both run within the grace period; what is left at its end is killed."""
    for pod in objects.pods():
        allowed = number(pod.spec, "terminationGracePeriodSeconds", _DEFAULT_GRACE_S)
        for path, container in pod.containers():
            pre_stop, drain = _pre_stop_s(container), _exit_timeout_s(objects, pod, container)
            needed = pre_stop + (drain + MARGIN_S if drain is not None else 1 if pre_stop else 0)
            if needed > allowed:
                parts = f"preStop {pre_stop} s" + (
                    f" + Triton's exit timeout {drain} s + {MARGIN_S} s" if drain is not None else ""
                )
                where = f"{pod.path}.terminationGracePeriodSeconds"
                got, fix = f"{allowed} s for {path.rpartition('.')[2]}: {parts}", "raise the grace period"
                yield Finding("grace", pod.owner.title, where, got, f"at least {needed} s", fix)
            if drain is not None and not pre_stop and "readinessProbe" in container:
                where, fix = f"{path}.lifecycle.preStop", "sleep for 5 s or more before SIGTERM arrives"
                expected = "a pause in which endpoints are withdrawn: Triton refuses connections from SIGTERM on"
                yield Finding("grace", pod.owner.title, where, "none", expected, fix)


def _pre_stop_s(container: Mapping[str, Any]) -> int:
    hook = mapping(container, "lifecycle.preStop")
    seconds = at(hook, "sleep.seconds")
    if isinstance(seconds, int):
        return seconds
    found = _SLEEP.search(" ".join(words(hook, "exec.command")))
    return int(found.group(1)) if found else 0


def _exit_timeout_s(objects: ObjectSet, pod: Pod, container: Mapping[str, Any]) -> int | None:
    """How long Triton drains, or None when this is no Triton."""
    known = environment(objects, pod, container) or {}
    line = " ".join(expand(word, known) for key in ("command", "args") for word in words(container, key))
    found = _EXIT_FLAG.search(line)
    if found:
        return int(found.group(1))
    return _TRITON_EXIT_S if "tritonserver" in line else None


def rollouts(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.of("Deployment"):
        update = mapping(item.data, "spec.strategy.rollingUpdate")
        if {str(update.get(key, "25%")) for key in ("maxSurge", "maxUnavailable")} <= {"0", "0%"}:
            got, fix = "maxSurge 0 and maxUnavailable 0", "give one of them 1"
            yield Finding("rollout", item.title, "spec.strategy.rollingUpdate", got, "one of them over 0", fix)
        if at(item.data, "spec.strategy.type") == "Recreate" and update:
            fix = "remove it, or use RollingUpdate"
            yield Finding("rollout", item.title, "spec.strategy", "Recreate with rollingUpdate", "one of them", fix)
    for item in objects.of("Job"):
        policy = at(item.data, "spec.template.spec.restartPolicy")
        if policy not in ("Never", "OnFailure"):
            where = "spec.template.spec.restartPolicy"
            yield Finding("rollout", item.title, where, str(policy), "Never or OnFailure", "set it: a Job must say")


def startup_within_deadline(objects: ObjectSet) -> Iterator[Finding]:
    """A rollout that is declared failed while the startup probe still waits."""
    for item in objects.of("Deployment"):
        deadline = number(item.data, "spec.progressDeadlineSeconds", 600)
        probes = [p for box in rows(item.data, "spec.template.spec.containers") if (p := mapping(box, "startupProbe"))]
        for probe in probes:
            budget = number(probe, "periodSeconds", 10) * number(probe, "failureThreshold", 3)
            budget += number(probe, "initialDelaySeconds", 0)
            if budget >= deadline:
                got, fix = f"{deadline} s, and the startup probe allows {budget} s", "raise progressDeadlineSeconds"
                yield Finding("probe", item.title, "spec.progressDeadlineSeconds", got, f"over {budget} s", fix)


def budgets(objects: ObjectSet) -> Iterator[Finding]:
    for budget in objects.of("PodDisruptionBudget"):
        selector = mapping(budget.data, "spec.selector")
        owners = {
            pod.owner.title: pod.owner
            for pod in objects.pods()
            if pod.owner.namespace == budget.namespace and matches(selector, pod.labels)
        }
        least, most = at(budget.data, "spec.minAvailable"), at(budget.data, "spec.maxUnavailable")
        if not owners and any(pod.owner.namespace == budget.namespace for pod in objects.pods()):
            got = f"{selector}, which no pod here carries"
            expected = "labels of a pod: without one in the cluster it guards nothing"
            yield Finding("not-here", budget.title, "spec.selector", got, expected, "correct the selector")
        if least is None and most is None:
            expected = "one of minAvailable and maxUnavailable: nothing is guarded else"
            yield Finding("budget", budget.title, "spec", "neither", expected, "give one")
        replicas = min((_least_replicas(objects, owner) for owner in owners.values()), default=0)
        if owners and not _evictable(least, most, replicas):
            got = f"minAvailable {least}" if least is not None else f"maxUnavailable {most}"
            fix = "use maxUnavailable: 1, or run more replicas"
            expected = f"a budget that lets one of {replicas} replicas go, or a node can never be drained"
            yield Finding("budget", budget.title, "spec", got, expected, fix)
        if at(budget.data, "spec.unhealthyPodEvictionPolicy") != "AlwaysAllow":
            where, expected = "spec.unhealthyPodEvictionPolicy", "AlwaysAllow: a pod that is not ready guards nothing"
            got = str(at(budget.data, where))
            yield Finding("budget", budget.title, where, got, expected, "set it; else a broken pod blocks a drain")


def _evictable(least: object, most: object, replicas: int) -> bool:
    if most is not None:
        return str(most) not in ("0", "0%")
    if least is None:
        return True
    text = str(least)
    if not _BOUND.fullmatch(text):
        return True
    needed = -(-replicas * int(text[:-1]) // 100) if text.endswith("%") else int(text)  # shares are rounded up
    return needed < replicas


def _least_replicas(objects: ObjectSet, owner: KubeObject) -> int:
    for scaler in objects.of("HorizontalPodAutoscaler", "ScaledObject"):
        if scaler.namespace == owner.namespace and _target(scaler) == (owner.kind, owner.name):
            default = 1 if scaler.kind == "HorizontalPodAutoscaler" else 0
            return number(scaler.data, f"spec.{_bounds(scaler)[0]}", default)
    return number(owner.data, "spec.replicas", 1)


def _bounds(scaler: KubeObject) -> tuple[str, str]:
    if scaler.kind == "HorizontalPodAutoscaler":
        return "minReplicas", "maxReplicas"
    return "minReplicaCount", "maxReplicaCount"


def _target(scaler: KubeObject) -> tuple[str, str]:
    target = mapping(scaler.data, "spec.scaleTargetRef")
    return str(target.get("kind", "Deployment")), str(target.get("name"))


def autoscalers(objects: ObjectSet) -> Iterator[Finding]:
    seen: dict[tuple[str, str, str], str] = {}
    for scaler in objects.of("HorizontalPodAutoscaler", "ScaledObject"):
        low, high = _bounds(scaler)
        least, most = at(scaler.data, f"spec.{low}"), at(scaler.data, f"spec.{high}")
        if least is not None and most is not None and least > most:
            got = f"{least} over {high} {most}"
            yield Finding("autoscaler", scaler.title, f"spec.{low}", got, "at most that", "swap them")
        kind, name = _target(scaler)
        target, where = objects.find(kind, name, scaler.namespace), "spec.scaleTargetRef"
        if target is None:
            if any(item.namespace == scaler.namespace for item in objects.of(*_SCALED)):
                got, fix = f"{kind}/{name}, which is not here", "correct kind and name"
                expected = "a workload here: without one in the cluster nothing is scaled"
                yield Finding("not-here", scaler.title, where, got, expected, fix)
        elif target.kind in _SCALED and at(target.data, "spec.replicas") is not None:
            got, fix = f"replicas {at(target.data, 'spec.replicas')} beside {scaler.title}", "remove replicas"
            expected = "no replicas: each apply would undo what the autoscaler did"
            yield Finding("autoscaled-replicas", target.title, "spec.replicas", got, expected, fix)
        other = seen.setdefault((scaler.namespace, kind, name), scaler.title)
        if other != scaler.title:
            got, fix = f"{scaler.title} and {other} on {kind}/{name}", "keep one: KEDA makes an HPA of its own"
            yield Finding("autoscaler", scaler.title, where, got, "one autoscaler a workload", fix)
        yield from _utilisation(objects, scaler, target)


def _utilisation(objects: ObjectSet, scaler: KubeObject, target: KubeObject | None) -> Iterator[Finding]:
    """A share of a request that is not there is never computed."""
    names = {
        str(at(m, "resource.name"))
        for m in rows(scaler.data, "spec.metrics")
        if at(m, "resource.target.type") == "Utilization"
    }
    for pod in objects.pods():
        if target is None or pod.owner is not target:
            continue
        for path, container in pod.containers():
            asked = {*mapping(container, "resources.requests"), *mapping(container, "resources.limits")}
            for name in sorted(names - asked):
                got, fix = f"no request for {name}", "set the request"
                expected = f"one: {scaler.title} measures against it"
                yield Finding("autoscaler", pod.owner.title, f"{path}.resources.requests", got, expected, fix)


def shared_claims(objects: ObjectSet) -> Iterator[Finding]:
    """Replicas land on several nodes; a ReadWriteOnce volume is on one."""
    for pod in objects.pods():
        if pod.owner.kind not in ("Deployment", "LeaderWorkerSet") or _most_replicas(objects, pod.owner) < 2:
            continue
        for name, volume in pod.volumes().items():
            name_of_claim = at(volume, "persistentVolumeClaim.claimName")
            claim = objects.find("PersistentVolumeClaim", name_of_claim, pod.owner.namespace)
            modes = words(claim.data, "spec.accessModes") if claim else []
            if modes and not set(modes) & {"ReadWriteMany", "ReadOnlyMany"}:
                where, fix = f"{pod.path}.volumes[{name}]", "use ReadWriteMany, or ReadOnlyMany for a filled store"
                got = f"{', '.join(modes)} for several replicas"
                expected = "a claim that several nodes can mount, or replicas on other nodes wait for ever"
                yield Finding("claim", pod.owner.title, where, got, expected, fix)


def _most_replicas(objects: ObjectSet, owner: KubeObject) -> int:
    for scaler in objects.of("HorizontalPodAutoscaler", "ScaledObject"):
        if scaler.namespace == owner.namespace and _target(scaler) == (owner.kind, owner.name):
            return number(scaler.data, f"spec.{_bounds(scaler)[1]}", 100)
    return number(owner.data, "spec.replicas", 1) * number(owner.data, "spec.leaderWorkerTemplate.size", 1)


def duplicates(objects: ObjectSet) -> Iterator[Finding]:
    seen: set[tuple[str, str, str, str]] = set()
    for item in objects.objects:
        if not at(item.data, "metadata.name"):
            continue  # the server makes up a name of its own for each
        group = item.api_version.rpartition("/")[0]
        key = (group, item.kind, item.namespace, item.name)
        if key in seen:
            got, fix = "the same object twice", "remove one: the second apply wins"
            yield Finding("duplicate-object", item.title, "metadata.name", got, "each object once", fix)
        seen.add(key)
