"""The autoscaler: its bounds, and the signals that it follows."""

from __future__ import annotations

from typing import Any

from builders.manifests.lint.quantity import canonical
from builders.manifests.patches import Patch, namespace_of, replace
from builders.manifests.sizing import Sizing, nodes_of
from builders.spec import DeploymentSpec


def scaler(spec: DeploymentSpec, sizing: Sizing) -> list[Patch]:
    """Bounds and thresholds of the autoscaler."""
    scaling = spec.kubernetes.scaling
    patches = []
    if scaling.by == "hpa":
        operations = [
            replace("/spec/minReplicas", scaling.min_replicas),
            replace("/spec/maxReplicas", scaling.max_replicas),
            replace("/spec/metrics", _pod_metrics(spec, sizing)),
            replace("/spec/behavior/scaleDown/stabilizationWindowSeconds", scaling.scale_down_s),
        ]
        patches.append(Patch("hpa.yaml", {"kind": "HorizontalPodAutoscaler", "name": "serving"}, operations))
    if scaling.by == "keda":
        window = "/spec/advanced/horizontalPodAutoscalerConfig/behavior/scaleDown/stabilizationWindowSeconds"
        operations = [
            replace("/spec/minReplicaCount", scaling.min_replicas),
            replace("/spec/maxReplicaCount", scaling.max_replicas),
            replace("/spec/fallback/replicas", scaling.min_replicas),
            replace("/spec/triggers", _triggers(spec, sizing)),
            replace(window, scaling.scale_down_s),
        ]
        patches.append(Patch("scaled-object.yaml", {"kind": "ScaledObject", "name": "serving"}, operations))
    return patches


def pods_of(spec: DeploymentSpec) -> str:
    """PromQL's selector of this deployment's pods. Not `.*`: a spec may be named as the beginning of another's pods."""
    ending = "[a-z0-9]+-[a-z0-9]+" if nodes_of(spec) == 1 else "[0-9]+"  # the leaders of groups
    return f'namespace="{namespace_of(spec)}",pod=~"{spec.name}-serving-{ending}"'


def signals(spec: DeploymentSpec, sizing: Sizing) -> dict[str, str]:
    """Metric of a pod -> the average over pods that is kept. Generation waits for slots and cache, not in Triton."""
    if spec.generates:
        waiting = max(1, int(spec.generation.slots * spec.kubernetes.scaling.queue_share))
        return {"trireme_generation_waiting": str(waiting), "trireme_generation_cache_use": "800m"}
    return {
        "trireme_pending_requests": str(sizing.pending_requests),
        "trireme_queue_microseconds_per_request": str(sizing.queue_us),
    }


def _pod_metrics(spec: DeploymentSpec, sizing: Sizing) -> list[dict[str, Any]]:
    return [
        {
            "type": "Pods",
            "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": canonical(value)}},
        }
        for name, value in signals(spec, sizing).items()
    ]


_QUERIES = {  # metric -> (PromQL of the whole deployment, KEDA's metric type)
    "trireme_pending_requests": ("sum(nv_inference_pending_request_count{%s})", "AverageValue"),
    "trireme_queue_microseconds_per_request": (
        "sum(rate(nv_inference_queue_duration_us{%s}[1m]))"
        " / (max(sum by (model) (rate(nv_inference_request_success{%s}[1m]))) > 0) or vector(0)",
        "Value",
    ),
    "trireme_generation_waiting": ("sum(trireme_generation_waiting{%s})", "AverageValue"),
    "trireme_generation_cache_use": ("avg(trireme_generation_cache_use{%s})", "Value"),
}


def _triggers(spec: DeploymentSpec, sizing: Sizing) -> list[dict[str, Any]]:
    pods = pods_of(spec)
    triggers = []
    for name, value in signals(spec, sizing).items():
        query, kind = _QUERIES[name]
        metadata = {
            "serverAddress": spec.kubernetes.scaling.prometheus,
            "query": query.replace("%s", pods),
            "threshold": "0.8" if value == "800m" else value,
            "ignoreNullValues": "false",
        }
        short = name.removeprefix("trireme_").replace("_", "-")
        triggers.append({"type": "prometheus", "name": short, "metricType": kind, "metadata": metadata})
    return triggers
