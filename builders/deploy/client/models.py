"""A new model version on running pods: loaded over gRPC pod by pod, at the pace of their readiness.

The version is a directory that the pods see; Triton loads it beside the one that serves and switches when it is ready,
so a load takes no pod away by itself. It may still: memory for two versions, a readiness probe that fails. So a pod is
touched only while the disruption budget could do without it, and the next one waits until it is ready again. A version
that fails in the first pod is never tried in the second, and the old one goes on serving in that pod too.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from builders.deploy.client.cluster import Cluster
from builders.deploy.client.objects import (
    DISRUPTION_BUDGETS,
    PODS,
    SECRETS,
    Object,
    ObjectName,
    label_selector,
    metadata,
    name_of,
)
from builders.deploy.client.observe import is_leaving, is_ready, observe
from builders.deploy.client.port_forward import PortForward
from builders.errors import ClusterError, RolloutError

CONTROL_HEADER = "triton-grpc-protocol-trireme-admin"  # what `--grpc-restricted-protocol` of the launcher asks for
_ASK_S = 30.0


@dataclass(frozen=True)
class ModelVersion:
    """`models` in the order to load them, an ensemble after its parts; each is ready at `version`."""

    models: tuple[str, ...]
    version: int


@dataclass(frozen=True)
class Pace:
    """`load_s`: for one model in one pod. `ready_s`: for the budget to allow a pod, and for a pod to be ready again."""

    load_s: float = 300.0
    ready_s: float = 300.0
    pause_s: float = 0.5


def load_version(
    cluster: Cluster,
    workload: ObjectName,
    wanted: ModelVersion,
    headers: Mapping[str, str],
    *,
    grpc_port: int = 8001,
    pace: Pace | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Loads the version in every pod of the workload; returns the pods' names.

    Raises RolloutError at the first pod that fails, with which pods have the new version and which have not.
    """
    pace, namespace = pace or Pace(), workload.namespace or cluster.namespace
    pods = [name_of(pod) for pod in observe(cluster, workload).pods if not is_leaving(pod)]
    if not pods:
        raise RolloutError(f"{workload}: no pods of its newest revision. Fix: deploy it first (`trireme deploy`)")
    done: list[str] = []
    for pod in pods:
        try:
            if not _await_budget(cluster, namespace, pod, pace):
                report(f"{pod}: has gone meanwhile")  # scaled down; what starts from now on loads the newest version
                continue
            report(f"{pod}: loading version {wanted.version}")
            with PortForward(cluster, namespace, partial(str, pod), grpc_port) as forward:
                _load(forward.address, wanted, headers, pace.load_s)
                _await_ready(cluster, namespace, pod, pace)
                _require_version(forward.address, wanted)  # a server that died of the load is back without it
        except (ClusterError, RolloutError) as error:
            rest = [name for name in pods if name not in done]
            raise RolloutError(
                f"{pod}: {error}. Version {wanted.version} is in {len(done)} of {len(pods)} pods ({_listed(done)}); "
                f"{_listed(rest)} keep what they served. Fix: mend the version and load it again"
            ) from error
        done.append(pod)
        report(f"{pod}: serves version {wanted.version}")
    return done


def control_headers(cluster: Cluster, secret: str, key: str) -> dict[str, str]:
    """The gRPC metadata that opens repository control, from the Secret that the pods were given."""
    found = cluster.get(SECRETS, cluster.namespace, secret)
    text = ((found or {}).get("data") or {}).get(key)
    if not text:
        raise ClusterError(
            f"Secret {cluster.namespace}/{secret}",
            got="no such Secret" if found is None else f"no key {key}",
            expected="the secret that the pods' launcher was given",
            fix="give --control-secret NAME/KEY as the pods' manifest names it",
        )
    return {CONTROL_HEADER: base64.b64decode(text).decode().strip()}


def allows(budget: Object, pod_ready: bool) -> bool:
    """Whether the budget could do without one pod more; a pod that is not ready counts as missing already."""
    status = budget.get("status") or {}
    if status.get("observedGeneration", 0) < metadata(budget).get("generation", 0):
        return False  # figures of a budget that was changed since
    return not pod_ready or int(status.get("disruptionsAllowed", 0)) > 0


def _await_budget(cluster: Cluster, namespace: str, pod: str, pace: Pace) -> bool:
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


def _await_ready(cluster: Cluster, namespace: str, pod: str, pace: Pace) -> None:
    def ready() -> bool:
        item = cluster.get(PODS, namespace, pod)
        if item is None:
            raise RolloutError("it is gone since the load")
        return is_ready(item)

    item = cluster.get(PODS, namespace, pod)
    # Until its probe has had the time to fail, Ready may still tell of the time before.
    time.sleep(min(settle_s(item) if item else 0.0, pace.ready_s))
    _await(ready, pace, "it is not ready again")


def _await(holds: Callable[[], bool], pace: Pace, otherwise: str) -> None:
    end = time.monotonic() + pace.ready_s
    while not holds():
        if time.monotonic() >= end:
            raise RolloutError(f"{otherwise} within {pace.ready_s:.0f} s")
        time.sleep(pace.pause_s)


def _load(address: str, wanted: ModelVersion, headers: Mapping[str, str], seconds: float) -> None:
    """A load answers only when the model is ready or has failed."""
    with _triton(address) as client:
        for model in wanted.models:
            client.load_model(model, headers=dict(headers), client_timeout=seconds)
    _require_version(address, wanted)


def _require_version(address: str, wanted: ModelVersion) -> None:
    with _triton(address) as client:
        for model in wanted.models:
            if not client.is_model_ready(model, str(wanted.version), client_timeout=_ASK_S):
                raise RolloutError(f"{model} has no version {wanted.version} after the load; is it in the store?")


@contextmanager
def _triton(address: str) -> Iterator[Any]:
    """Raises RolloutError with Triton's own words."""
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    client = InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)])
    try:
        yield client
    except InferenceServerException as error:
        raise RolloutError(f"Triton: {error.message()}") from error
    finally:
        client.close()


def _listed(pods: Sequence[str]) -> str:
    return ", ".join(pods) or "none"
