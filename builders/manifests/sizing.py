"""From a spec to the numbers in its manifests. Arithmetic only; `manifests` writes what this decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from builders.errors import SpecError, UnsupportedError
from builders.manifests.lint.lifecycle import MARGIN_S
from builders.spec import DeploymentSpec, Platform

STARTUP_PERIOD_S = 5
_GATEWAY_MIB = 512  # bodies that it holds, 256 MiB at most, and itself
_SPARE_S = 20  # of the grace period, and of a rollout's deadline for the image
_IMAGE_S = 600
_DEFAULT_P95_MS = 500.0  # where the spec promises none


@dataclass(frozen=True)
class Sizing:
    """One pod, and when there should be more of them. `nodes`: pods of a replica, with `ranks` in each.

    `memory_mib` is the limit and holds /dev/shm and the gateway. `pending_requests` and `queue_us` are what a pod may
    show before another one comes: requests in its queues, and mean microseconds that a request waited.
    """

    nodes: int
    ranks: int
    gpus: int
    cpus: int
    threads: int
    memory_mib: int
    shm_mib: int
    startup_failures: int
    progress_deadline_s: int
    grace_s: int
    pending_requests: int
    queue_us: int


def size(spec: DeploymentSpec, platform: Platform) -> Sizing:
    """Raises SpecError for an SLO that the queue alone breaks; UnsupportedError for ranks that nodes cannot share."""
    cluster = spec.kubernetes
    nodes = nodes_of(spec)
    ranks = spec.parallel.ranks // nodes
    gpus = ranks if platform == "gpu" else 0
    cpus = cluster.cpus or 8 * gpus or 4
    shm_mib = cluster.shm_mib or (2048 * gpus if gpus > 1 else 256)
    memory_gib = cluster.memory_gib or 16 * gpus or 4
    queue_us = allowed_queue_us(spec)
    return Sizing(
        nodes=nodes,
        ranks=ranks,
        gpus=gpus,
        cpus=cpus,
        threads=spec.serving.threads or max(1, cpus // spec.instances_on(platform)),
        memory_mib=1024 * memory_gib + shm_mib + _GATEWAY_MIB,
        shm_mib=shm_mib,
        startup_failures=math.ceil(cluster.load_s / STARTUP_PERIOD_S),
        progress_deadline_s=cluster.fetch_s + cluster.load_s + _IMAGE_S,
        grace_s=cluster.pre_stop_s + cluster.drain_s + MARGIN_S + _SPARE_S,
        pending_requests=allowed_pending(spec, queue_us, spec.instances_on(platform)),
        queue_us=queue_us,
    )


def nodes_of(spec: DeploymentSpec) -> int:
    """The fewest that hold all ranks. Tensor ranks meet in every layer, so they share a node; whole pipeline stages go
    to the nodes, as many to each.
    """
    parallel, most = spec.parallel, spec.kubernetes.gpus_per_node
    if parallel.ranks <= most:
        return 1
    said = f"{parallel.ranks} ranks (tensor {parallel.tensor} x pipeline {parallel.pipeline})"
    if not spec.generates:
        raise UnsupportedError(
            "parallel",
            got=f"{said} for model.task={spec.model.task}",
            expected=f"at most kubernetes.gpus_per_node={most}: only language models span nodes",
            fix="share the model among fewer ranks, or name a larger node",
        )
    for nodes in range(2, parallel.pipeline + 1):
        if parallel.pipeline % nodes == 0 and parallel.ranks // nodes <= most:
            return nodes
    raise UnsupportedError(
        "parallel",
        got=said,
        expected=f"stages of at most kubernetes.gpus_per_node={most} tensor ranks, which share a node",
        fix="lower parallel.tensor and raise parallel.pipeline, or name a larger node",
    )


def allowed_queue_us(spec: DeploymentSpec) -> int:
    """The share of the p95 target that waiting may take; never under the delay that batching adds on purpose."""
    p95_us = 1000 * (spec.slo.p95_latency_ms or _DEFAULT_P95_MS)
    if p95_us <= spec.serving.queue_delay_us:
        raise SpecError(
            "slo.p95_latency_ms",
            got=f"{spec.slo.p95_latency_ms} ms",
            expected=f"more than serving.queue_delay_us={spec.serving.queue_delay_us}, which every lone request waits",
            fix="lower serving.queue_delay_us, or raise the target",
        )
    return max(int(p95_us * spec.kubernetes.scaling.queue_share), 2 * spec.serving.queue_delay_us)


def allowed_pending(spec: DeploymentSpec, queue_us: int, instances: int) -> int:
    """Requests that a pod can hold and still answer in time.

    By Little's law, the rate that one pod must bear times the time that a request may wait. Without a promised
    throughput: one full batch for each instance. Never more than half of the queue, which refuses what does not fit.
    """
    full = spec.serving.max_batch_size * instances
    if spec.slo.min_throughput_per_s is not None:
        per_pod = spec.slo.min_throughput_per_s / spec.kubernetes.scaling.min_replicas
        full = min(full, math.ceil(per_pod * queue_us / 1e6))
    return max(1, min(full, spec.serving.queue_size // 2))
