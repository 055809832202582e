"""The controllers of the fake cluster: a thread that moves every workload one step at a time.

What a pod does follows from its image: `images[image]` is "runs" (the default), or one of the ways to fail below.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.cluster.fake_cluster import LWS, FakeCluster, Key

_TICK_S = 0.02
_DEPLOYMENTS, _SETS = ("apps/v1", "deployments"), ("apps/v1", "replicasets")
_PODS, _EVENTS = ("v1", "pods"), ("v1", "events")
_SHORT_OF_GPUS = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
_UNBOUND = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."
_QUOTA = 'pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=4, used: 4, limited: 4'


def _waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def _crashed(reason: str, code: int) -> dict[str, Any]:
    ended = {"lastState": {"terminated": {"reason": reason, "exitCode": code}}, "restartCount": 3}
    return {**_waiting("CrashLoopBackOff", "back-off 40s restarting failed container"), **ended}


CONTAINERS = {
    "missing": _waiting("ImagePullBackOff", 'Back-off pulling image "bad": not found'),
    "unconfigured": _waiting("CreateContainerConfigError", 'configmap "settings" not found'),
    "crashes": _crashed("Error", 1),
    "greedy": _crashed("OOMKilled", 137),
    "slow": {"state": {"running": {}}, "ready": False},
}
UNSCHEDULED = {"no-gpus": _SHORT_OF_GPUS, "no-volume": _UNBOUND}


@contextmanager
def running(cluster: FakeCluster, deadline_ticks: int = 40) -> Iterator[None]:
    """`deadline_ticks`: after so many steps without progress a Deployment has missed its deadline."""
    stopped = threading.Event()
    controllers = Controllers(cluster, deadline_ticks)

    def work() -> None:
        while not stopped.wait(_TICK_S):
            with cluster.changed:
                controllers.step()

    thread = threading.Thread(target=work, name="controllers")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


class Controllers:
    def __init__(self, cluster: FakeCluster, deadline_ticks: int) -> None:
        self._cluster, self._deadline = cluster, deadline_ticks
        self._idle: dict[str, int] = {}
        self._ticks = 0

    def step(self) -> None:
        self._ticks += 1
        for key, item in self._cluster.find(*_DEPLOYMENTS):
            self._deployment(key, copy.deepcopy(item))
        for key, item in self._cluster.find("batch/v1", "jobs"):
            self._job(key, copy.deepcopy(item))
        for key, item in self._cluster.find(*LWS):
            self._groups(key, copy.deepcopy(item))
        for key, item in self._cluster.find("policy/v1", "poddisruptionbudgets"):
            self._budget(key, copy.deepcopy(item))

    def _deployment(self, key: Key, item: dict[str, Any]) -> None:
        if item["spec"].get("paused"):
            return
        newest = self._replica_set(key, item)
        wanted, pods = item["spec"].get("replicas", 1), self._owned(_PODS, newest)
        if self._behaviour(item) == "quota":
            self._condition(newest, "ReplicaFailure", _QUOTA)
        elif len(pods) < wanted:
            self._start_pod(newest, item["spec"]["template"], len(pods))
        ready = sum(self._advance(*pod) for pod in pods[:wanted])
        for extra, _ in pods[wanted:]:
            self._cluster.remove(extra)
        old = [pod for owner, _ in self._owned(_SETS, key) if owner != newest for pod in self._owned(_PODS, owner)]
        for (old_key, _), _ in zip(old, range(len(old) - (wanted - ready)), strict=False):
            self._cluster.remove(old_key)
        status = self._status(key, item, len(pods), len(old), ready, wanted)
        if status != item.get("status"):
            self._write(key, status=status)

    def _status(self, key: Key, item: Any, pods: int, old: int, ready: int, wanted: int) -> dict[str, Any]:
        done = ready >= wanted and not old
        figures = f"{item['metadata']['generation']} {pods} {old} {ready}"
        self._idle[figures + key[3]] = ticks = self._idle.get(figures + key[3], 0) + 1
        late = not done and ticks > self._deadline
        reason = "NewReplicaSetAvailable" if done else "ProgressDeadlineExceeded" if late else "ReplicaSetUpdated"
        return {
            "observedGeneration": item["metadata"]["generation"],
            "replicas": pods + old,
            "updatedReplicas": pods,
            "availableReplicas": ready,
            "conditions": [{"type": "Progressing", "status": str(not late), "reason": reason}],
        }

    def _replica_set(self, key: Key, item: dict[str, Any]) -> Key:
        template = item["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
        target = (*_SETS, key[2], f"{key[3]}-{digest}")
        revision = item["metadata"].get("annotations", {}).get("deployment.kubernetes.io/revision", "0")
        existing = self._cluster.objects.get(target)
        if existing is None or existing["metadata"]["annotations"]["deployment.kubernetes.io/revision"] != revision:
            revision = str(int(revision) + 1)
            about = {**self._child(key), "annotations": {"deployment.kubernetes.io/revision": revision}}
            about["labels"] = template["metadata"]["labels"]
            self._cluster.store(target, {"metadata": about, "spec": {"template": template}})
            self._write(key, annotations={"deployment.kubernetes.io/revision": revision})
            item["metadata"] = copy.deepcopy(self._cluster.objects[key]["metadata"])
        return target

    def _start_pod(self, owner: Key, template: dict[str, Any], number: int, labels: Any = None) -> None:
        name = f"{owner[3]}-{number}"
        about = {**self._child(owner), "labels": {**template["metadata"].get("labels", {}), **(labels or {})}}
        self._cluster.store(
            (*_PODS, owner[2], name), {"metadata": about, "spec": template["spec"], "status": {"phase": "Pending"}}
        )

    def _advance(self, key: Key, pod: dict[str, Any]) -> bool:
        """One step of a pod's life; whether it is ready."""
        container = pod["spec"]["containers"][0]
        behaviour = self._cluster.images.get(container["image"], "runs")
        if behaviour in UNSCHEDULED:
            unscheduled = {"type": "PodScheduled", "status": "False", "message": UNSCHEDULED[behaviour]}
            status = {"phase": "Pending", "conditions": [unscheduled]}
        elif behaviour == "runs" and pod["status"]["phase"] == "Running":
            status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        else:
            state = CONTAINERS.get(behaviour, {"state": {"running": {}}})
            if behaviour == "missing" and self._ticks % 2:  # as the kubelet's words go to and fro
                state = _waiting("ErrImagePull", 'failed to pull image "bad": not found')
            states = [{"name": container["name"], "image": container["image"], "restartCount": 0, **state}]
            status = {"phase": "Running" if behaviour == "runs" else "Pending", "containerStatuses": states}
        if pod["status"] != status:
            self._write(key, status=status)
        return behaviour == "runs" and "conditions" in status

    def _job(self, key: Key, item: dict[str, Any]) -> None:
        item["spec"].setdefault("selector", {"matchLabels": {"batch.kubernetes.io/job-name": key[3]}})
        pods, behaviour = self._owned(_PODS, key), self._behaviour(item)
        if behaviour == "quota":  # no condition says so, only an event
            told = (*_EVENTS, key[2], f"{key[3]}.failedcreate")
            about = {"involvedObject": {"kind": "Job", "name": key[3]}, "reason": "FailedCreate", "message": _QUOTA}
            if told not in self._cluster.objects:
                self._cluster.store(told, {"metadata": {}, "type": "Warning", **about})
        elif not pods:
            self._start_pod(key, item["spec"]["template"], 0, item["spec"]["selector"]["matchLabels"])
            self._write(key, spec=item["spec"], status={"active": 1})
        elif behaviour in UNSCHEDULED or behaviour in ("missing", "unconfigured", "slow"):
            self._advance(*pods[0])  # the Job waits, until its deadline
        elif behaviour == "runs":
            self._finish(key, item, {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]})
        else:
            self._advance(*pods[0])
            message = "Job has reached the specified backoff limit"
            failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": message}
            self._finish(key, item, {"failed": 1, "conditions": [failed]})

    def _finish(self, key: Key, item: dict[str, Any], status: dict[str, Any]) -> None:
        if item.get("status") != status:
            self._write(key, status=status)

    def _groups(self, key: Key, item: dict[str, Any]) -> None:
        """A LeaderWorkerSet: one more group ready with each step."""
        wanted, template = item["spec"]["replicas"], item["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        pods = self._owned(_PODS, key)
        if len(pods) < wanted:
            label = {"leaderworkerset.sigs.k8s.io/name": key[3]}
            self._start_pod(key, {"metadata": {}, **template}, len(pods), label)
        ready = sum(self._advance(*pod) for pod in pods)
        condition = {
            "type": "Available",
            "status": str(ready >= wanted),
            "observedGeneration": item["metadata"]["generation"],
        }
        status = {
            "replicas": len(pods),
            "updatedReplicas": len(pods),
            "readyReplicas": ready,
            "conditions": [condition],
        }
        self._finish(key, item, status)

    def _budget(self, key: Key, item: dict[str, Any]) -> None:
        labels = item["spec"]["selector"]["matchLabels"].items()
        pods = [pod for _, pod in self._cluster.find(*_PODS) if labels <= pod["metadata"]["labels"].items()]
        healthy = sum("conditions" in pod["status"] and pod["status"]["phase"] == "Running" for pod in pods)
        spare = item["spec"].get("maxUnavailable", 0) + healthy - len(pods)
        allowed = max(0, healthy - item["spec"]["minAvailable"] if "minAvailable" in item["spec"] else spare)
        status = {"observedGeneration": item["metadata"]["generation"], "disruptionsAllowed": allowed}
        self._finish(key, item, status)

    def _behaviour(self, item: dict[str, Any]) -> str:
        return self._cluster.images.get(item["spec"]["template"]["spec"]["containers"][0]["image"], "runs")

    def _owned(self, kind: tuple[str, str], owner: Key) -> list[tuple[Key, dict[str, Any]]]:
        uid = self._cluster.objects[owner]["metadata"]["uid"]
        return [
            (key, copy.deepcopy(item))
            for key, item in self._cluster.find(*kind)
            if any(reference["uid"] == uid for reference in item["metadata"].get("ownerReferences", ()))
        ]

    def _child(self, owner: Key) -> dict[str, Any]:
        found = self._cluster.objects[owner]
        return {"ownerReferences": [{"uid": found["metadata"]["uid"], "kind": found["kind"], "name": owner[3]}]}

    def _condition(self, key: Key, kind: str, message: str) -> None:
        status = {"conditions": [{"type": kind, "status": "True", "reason": "FailedCreate", "message": message}]}
        if self._cluster.objects[key].get("status") != status:
            self._write(key, status=status)

    def _write(self, key: Key, annotations: Any = None, **parts: Any) -> None:
        item = copy.deepcopy(self._cluster.objects[key])
        item.update(parts)
        if annotations:
            item["metadata"]["annotations"] = {**item["metadata"].get("annotations", {}), **annotations}
        self._cluster.store(key, item)


def event(cluster: FakeCluster, subject: str, reason: str, message: str, kind: str = "Warning") -> None:
    """An event about an object of namespace prod, as the kubelet, the scheduler or a provisioner writes it."""
    key = (*_EVENTS, "prod", f"{subject}.{reason.lower()}")
    about = {"involvedObject": {"name": subject}, "reason": reason, "message": message, "type": kind}
    cluster.store(key, {"metadata": {}, **about})
