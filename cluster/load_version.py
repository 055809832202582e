"""A new model version on running pods: laid out and loaded pod by pod, at the pace of their readiness.

The version is a publication in the store. The pod's launcher lays it out beside the one that serves, asked on the
health port; the load is a gRPC call, and Triton switches when the new version is ready, so a load takes no pod away by
itself. It may still: memory for two versions, a readiness probe that fails. So a pod is touched only while the
disruption budget could do without it, and the next one waits until it is ready again. A version that fails in the first
pod is never tried in the second, and that pod goes back to the old one. When all pods have the version, it is written
down for pods to come.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.api import Cluster, Query
from cluster.apply import MANAGER
from cluster.control import VERSION_MAP, mounted_version_map
from cluster.errors import ClusterError, RolloutError
from cluster.kinds import (
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    PODS,
    Object,
    ObjectName,
    label_selector,
    metadata,
    name_of,
)
from cluster.observe import is_leaving, is_ready, observe
from cluster.port_forward import PortForward
from cluster.refusal import Operation
from cluster.rights import require_rights
from runtime.model_control import load, not_ready
from runtime.settings import ADMIN_HEADER

VERSION_KEY = "version"  # as k8s/base/deployment.yaml mounts it into the init container
_ROUNDS = 10  # of pods that came while the others were loaded


@dataclass(frozen=True)
class ModelVersion:
    """`models` in the order to load them, an ensemble after its parts; each is ready at `version`. `staged` is the
    version that is laid out beside it and has not answered yet."""

    models: tuple[str, ...]
    version: int
    staged: int | None
    refused: str | None = None  # why the version that was asked for was given up


@dataclass(frozen=True)
class LoadPace:
    """`load_s`: for the layout and for each model in one pod. `ready_s`: for the budget to allow a pod, and for a pod
    to be ready again."""

    load_s: float = 300.0
    ready_s: float = 300.0
    pause_s: float = 0.5


@dataclass(frozen=True)
class PodPorts:
    grpc: int = 8001
    health: int = 8003


def load_version(
    cluster: Cluster,
    workload: ObjectName,
    version: int,
    secret: str,
    *,
    ports: PodPorts | None = None,
    pace: LoadPace | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Brings the version into every pod of the workload, and writes it down; returns the pods' names.

    Raises RolloutError at the first pod that fails, with which pods have the new version and which have not; what pods
    to come will serve is then as before. Raises ClusterError without the right to write it down.
    """
    namespace = workload.namespace or cluster.namespace
    rollout = _Rollout(cluster, namespace, version, secret, ports or PodPorts(), pace or LoadPace(), report)
    pointer = mounted_version_map(observe(cluster, workload).workload or {}) or VERSION_MAP
    require_rights(cluster, [Operation(verb, CONFIG_MAPS, namespace, pointer) for verb in ("get", "create", "patch")])
    done: list[str] = []
    written = False
    for _ in range(_ROUNDS):
        pods = [name_of(pod) for pod in observe(cluster, workload).pods if not is_leaving(pod)]
        if not pods:
            raise RolloutError(f"{workload}: no pods of its newest revision. Fix: deploy it first (`trireme deploy`)")
        coming = [pod for pod in pods if pod not in done]
        if written and not coming:
            return done
        for pod in coming:
            done += _with_reason(rollout, pod, done, pods)
        if not written:
            _write_down(cluster, namespace, pointer, version)
            written = True  # and once more: pods that began before this have read the number of before
    raise RolloutError(f"{workload}: still new pods after {_ROUNDS} rounds. Fix: run it again when it has settled")


def _with_reason(rollout: _Rollout, pod: str, done: Sequence[str], pods: Sequence[str]) -> list[str]:
    """The pod, or nothing when it has gone by itself."""
    try:
        return [pod] if rollout.bring(pod) else []
    except (ClusterError, RolloutError) as error:
        rest = [name for name in pods if name not in done]
        raise RolloutError(
            f"{pod}: {error}. Version {rollout.version} is in {len(done)} of {len(pods)} pods ({_listed(done)}); "
            f"{_listed(rest)} keep what they served. Fix: mend the version and publish it, or load the old one"
        ) from error


def _write_down(cluster: Cluster, namespace: str, pointer: str, version: int) -> None:
    """For the init containers of pods to come."""
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": pointer, "namespace": namespace},
        "data": {VERSION_KEY: str(version)},
    }
    query: Query = {"fieldManager": MANAGER, "force": True}
    action = Operation("patch", CONFIG_MAPS, namespace, pointer)
    cluster.send("PATCH", CONFIG_MAPS.path(namespace, pointer), action, query, body)


@dataclass(frozen=True)
class _Rollout:
    cluster: Cluster
    namespace: str
    version: int
    secret: str
    ports: PodPorts
    pace: LoadPace
    report: Callable[[str], None]

    def bring(self, pod: str) -> bool:
        """Lays the version out in one pod and loads it; False when the pod has gone by itself."""
        if not _await_budget(self.cluster, self.namespace, pod, self.pace):
            self.report(f"{pod}: has gone meanwhile")
            return False
        # One that has just come has no server yet.
        _await_ready(self.cluster, self.namespace, pod, self.pace, "it is not ready yet")
        with self._forward(pod, self.ports.health) as control, self._forward(pod, self.ports.grpc) as triton:
            self.report(f"{pod}: loading version {self.version}")
            wanted = self._ask("POST", control.address)
            try:
                self._load(triton.address, wanted)
                self._require_loaded(control.address, triton.address, wanted)
                _await(lambda: self._has_answered(control.address), self.pace, "it has not proven itself")
                _settle(self.cluster, self.namespace, pod, self.pace)
                _await_ready(self.cluster, self.namespace, pod, self.pace, "it is not ready again")
                _require_version(triton.address, wanted)  # a server that died of the load is back without it
            except (ClusterError, RolloutError) as error:
                raise RolloutError(f"{error}; {self._give_up(control.address, triton.address)}") from error
        self.report(f"{pod}: serves version {self.version}")
        return True

    def _forward(self, pod: str, port: int) -> PortForward:
        return PortForward(self.cluster, self.namespace, partial(str, pod), port)

    def _ask(self, method: str, address: str) -> ModelVersion:
        """The launcher lays the version out (POST), or takes it back (DELETE); what is to be loaded now."""
        connection = http.client.HTTPConnection(address, timeout=self.pace.load_s)
        try:
            connection.request(method, f"/versions/{self.version}", headers={ADMIN_HEADER: self.secret})
            answer = connection.getresponse()
            text = answer.read(4096).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise RolloutError(f"no answer on its port {self.ports.health} ({reason})") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise RolloutError(text or f"its launcher answers with {answer.status}")
        found = json.loads(text)
        return ModelVersion(tuple(found["models"]), int(found["version"]), found["staged"], found.get("refused"))

    def _load(self, address: str, wanted: ModelVersion) -> None:
        """A load answers only when the model is ready or has failed."""
        with _triton(address) as client:
            load(client, wanted.models, self.secret, self.pace.load_s)

    def _require_loaded(self, control: str, triton: str, wanted: ModelVersion) -> None:
        try:
            _require_version(triton, wanted)
        except RolloutError:
            self._has_answered(control)  # the launcher may have given it up between two loads, and says why
            raise

    def _has_answered(self, address: str) -> bool:
        """The launcher's own probe is a true inference and the version's proof, and it tells which version passed."""
        found = self._ask("GET", address)
        if self.version not in (found.version, found.staged):
            why = found.refused or "inferences failed"
            raise RolloutError(f"its launcher has gone back to version {found.version}: {why}")
        return found.version == self.version

    def _give_up(self, control: str, triton: str) -> str:
        """Parts that were loaded before the one that failed go back too."""
        try:
            before = self._ask("DELETE", control)
            self._load(triton, before)
        except RolloutError as error:
            return f"it could not be brought back ({error}), which is left to its supervisor"
        return f"it serves version {before.version}"


def allows(budget: Object, pod_ready: bool) -> bool:
    """Whether the budget could do without one pod more; a pod that is not ready counts as missing already."""
    status = budget.get("status") or {}
    if status.get("observedGeneration", 0) < metadata(budget).get("generation", 0):
        return False  # figures of a budget that was changed since
    return not pod_ready or int(status.get("disruptionsAllowed", 0)) > 0


def _await_budget(cluster: Cluster, namespace: str, pod: str, pace: LoadPace) -> bool:
    """True when every budget that covers the pod could do without it; False when the pod has gone by itself."""

    def free() -> bool:
        item = cluster.get(PODS, namespace, pod)
        if item is None or is_leaving(item):
            return True
        return all(allows(budget, is_ready(item)) for budget in _budgets(cluster, namespace, item))

    _await(free, pace, "its disruption budget does not allow to do without it")
    found = cluster.get(PODS, namespace, pod)
    return found is not None and not is_leaving(found)


def _budgets(cluster: Cluster, namespace: str, pod: Object) -> list[Object]:
    found = cluster.list_objects(DISRUPTION_BUDGETS, namespace).items
    return [item for item in found if _selects(cluster, namespace, item, name_of(pod))]


def _selects(cluster: Cluster, namespace: str, budget: Object, pod: str) -> bool:
    """Asked of the server, whose selectors know more than equality."""
    query = {"labelSelector": label_selector(budget)}
    return pod in {name_of(item) for item in cluster.list_objects(PODS, namespace, query).items}


def settle_s(pod: Object) -> float:
    """How long the kubelet may take to notice that a pod is not ready: its slowest probe, failing as often as it may.

    Defaults: https://kubernetes.io/docs/tasks/configure-pod-container/configure-liveness-readiness-startup-probes/
    """
    probes = [item.get("readinessProbe") or {} for item in (pod.get("spec") or {}).get("containers") or ()]
    return max((p.get("periodSeconds", 10) * p.get("failureThreshold", 3) for p in probes if p), default=0.0)


def _await_ready(cluster: Cluster, namespace: str, pod: str, pace: LoadPace, otherwise: str) -> None:
    def ready() -> bool:
        item = cluster.get(PODS, namespace, pod)
        if item is None:
            raise RolloutError("it has gone meanwhile")
        return is_ready(item)

    _await(ready, pace, otherwise)


def _settle(cluster: Cluster, namespace: str, pod: str, pace: LoadPace) -> None:
    """Until its probe has had the time to fail, Ready may still tell of the time before."""
    item = cluster.get(PODS, namespace, pod)
    time.sleep(min(settle_s(item) if item else 0.0, pace.ready_s))


def _await(holds: Callable[[], bool], pace: LoadPace, otherwise: str) -> None:
    end = time.monotonic() + pace.ready_s
    while not holds():
        if time.monotonic() >= end:
            raise RolloutError(f"{otherwise} within {pace.ready_s:.0f} s")
        time.sleep(pace.pause_s)


def _require_version(address: str, wanted: ModelVersion) -> None:
    with _triton(address) as client:
        for model in not_ready(client, wanted.models, wanted.version):
            raise RolloutError(f"{model} has no version {wanted.version} after the load")


@contextmanager
def _triton(address: str) -> Iterator[Any]:
    """Raises RolloutError with Triton's own words."""
    from tritonclient.utils import InferenceServerException

    from runtime.channel import connect

    client = connect(address)
    try:
        yield client
    except InferenceServerException as error:
        raise RolloutError(f"Triton: {error.message()}") from error
    finally:
        client.close()


def _listed(pods: Sequence[str]) -> str:
    return ", ".join(pods) or "none"
