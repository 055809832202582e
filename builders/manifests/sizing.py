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
    """One pod, and when there should be more of them.

    `memory_mib` is the limit and holds /dev/shm and the gateway. `pending_requests` and `queue_us` are what a pod may
    show before another one comes: requests in its queues, and mean microseconds that a request waited.
    """

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
    """Raises SpecError for an SLO that the queue alone breaks; UnsupportedError for a replica beyond one node."""
    cluster = spec.kubernetes
    gpus = gpus_per_pod(spec) if platform == "gpu" else 0
    cpus = cluster.cpus or 8 * gpus or 4
    shm_mib = cluster.shm_mib or (2048 * gpus if gpus > 1 else 256)
    memory_gib = cluster.memory_gib or 16 * gpus or 4
    queue_us = allowed_queue_us(spec)
    return Sizing(
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


def gpus_per_pod(spec: DeploymentSpec) -> int:
    """One for each rank: tensor x pipeline."""
    ranks, most = spec.parallel.tensor * spec.parallel.pipeline, spec.kubernetes.gpus_per_node
    if ranks > most:
        raise UnsupportedError(
            "parallel",
            got=f"{ranks} ranks (tensor {spec.parallel.tensor} x pipeline {spec.parallel.pipeline})",
            expected=f"at most kubernetes.gpus_per_node={most}: the ranks of a replica are processes of one pod so far",
            fix="share the model among fewer ranks, or name a larger node",
        )
    return ranks


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
