"""What a spec changes in the components: patches as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builders.manifests.sizing import Sizing
from builders.spec import DeploymentSpec, Platform

USER = 10001  # of every container; the images say the same
_GPU_MAJOR, _GPU_MINOR = "nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"  # NVIDIA's feature discovery


@dataclass(frozen=True)
class Patch:
    """A strategic merge (`content` a mapping) or JSON patch (a list) of one object; without a target, a new object."""

    file: str
    target: dict[str, str] | None
    content: Any


def merge(file: str, api_version: str, kind: str, name: str, **body: Any) -> Patch:
    """A strategic merge of one object."""
    content = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, **body}
    return Patch(file, {"kind": kind, "name": name}, content)


def replica(spec: DeploymentSpec, sizing: Sizing) -> list[Patch]:
    """The Deployment: one pod's size and its times."""
    cluster = spec.kubernetes
    devices = {cluster.gpu_resource: sizing.gpus} if sizing.gpus and cluster.gpus_by == "device-plugin" else {}
    memory = f"{sizing.memory_mib}Mi"
    asked = {"cpu": str(sizing.cpus), "memory": memory, **devices}
    triton = {
        "name": "triton",
        "startupProbe": {"failureThreshold": sizing.startup_failures},
        "lifecycle": {"preStop": {"sleep": {"seconds": cluster.pre_stop_s}}},
        "resources": {"requests": asked, "limits": asked},
    }
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": sizing.grace_s,
        "containers": [triton],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{sizing.shm_mib}Mi"}}],
    }
    if devices:
        pod["initContainers"] = [{"name": "fetch", "resources": {"requests": devices, "limits": devices}}]
    if cluster.images.pull_secret:
        pod["imagePullSecrets"] = [{"name": cluster.images.pull_secret}]
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    pod |= node_choice(spec, spec.engine.targets if sizing.gpus else ())
    body: dict[str, Any] = {"progressDeadlineSeconds": sizing.progress_deadline_s, "template": {"spec": pod}}
    if cluster.scaling.by == "none":
        body["replicas"] = cluster.scaling.min_replicas
    patches = [merge("deployment.yaml", "apps/v1", "Deployment", "serving", spec=body)]
    if sizing.gpus > 1 and cluster.gpus_by == "dra":
        count = [{"op": "replace", "path": "/spec/spec/devices/requests/0/exactly/count", "value": sizing.gpus}]
        patches.append(Patch("claim.yaml", {"kind": "ResourceClaimTemplate", "name": "gpus"}, count))
    if devices and cluster.gpu_resource != "nvidia.com/gpu":
        patches.append(_without_whole_gpus())
    return patches


def _without_whole_gpus() -> Patch:
    """The component asks for whole GPUs; a MIG slice or a shared GPU has a name of its own."""
    gone = [
        {"op": "remove", "path": f"/spec/template/spec/{box}/0/resources/{kind}/nvidia.com~1gpu"}
        for box in ("initContainers", "containers")
        for kind in ("requests", "limits")
    ]
    return Patch("whole-gpus.yaml", {"kind": "Deployment", "name": "serving"}, gone)


def node_choice(spec: DeploymentSpec, targets: Sequence[str]) -> dict[str, Any]:
    """Nodes with the labels asked for, and with a GPU of one of the targets (`sm89`) if there are any."""
    choice: dict[str, Any] = {}
    if spec.kubernetes.node_selector:
        choice["nodeSelector"] = dict(spec.kubernetes.node_selector)
    if targets:
        terms = [
            {
                "matchExpressions": [
                    {"key": _GPU_MAJOR, "operator": "In", "values": [target[2:-1]]},
                    {"key": _GPU_MINOR, "operator": "In", "values": [target[-1]]},
                ]
            }
            for target in targets
        ]
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        choice["affinity"] = {"nodeAffinity": required}
    return choice


def store(spec: DeploymentSpec) -> list[Patch]:
    """The claim, or the bucket instead of it."""
    model_store = spec.kubernetes.model_store
    resources = {"requests": {"storage": f"{model_store.size_gib}Gi"}}
    claim: dict[str, Any] = {"accessModes": [model_store.access], "resources": resources}
    if model_store.storage_class is not None:
        claim["storageClassName"] = model_store.storage_class
    patches = [merge("claim.yaml", "v1", "PersistentVolumeClaim", "model-store", spec=claim)]
    if model_store.kind != "claim":
        patches = _bucket(spec)
    if model_store.cache_gib:
        sizes = {"ephemeral-storage": f"{model_store.cache_gib + 4}Gi"}
        box = {"resources": {"requests": sizes, "limits": sizes}}
        pod = {
            "initContainers": [{"name": "fetch", **box}],
            "containers": [{"name": "triton", **box}],
            "volumes": [{"name": "repository", "emptyDir": {"sizeLimit": f"{model_store.cache_gib}Gi"}}],
        }
        patches.append(merge("cache.yaml", "apps/v1", "Deployment", "serving", spec={"template": {"spec": pod}}))
    return patches


def _bucket(spec: DeploymentSpec) -> list[Patch]:
    """A bucket under the claim's name. The pods' account carries the cloud identity that may read and write it."""
    model_store = spec.kubernetes.model_store
    of_s3 = model_store.kind == "s3"
    patches = _s3_volume(spec) if of_s3 else _gcs_volumes(spec)
    if model_store.identity:
        key = "eks.amazonaws.com/role-arn" if of_s3 else "iam.gke.io/gcp-service-account"
        metadata = {"name": "serving", "annotations": {key: model_store.identity}}
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
        patches.append(Patch("account.yaml", {"kind": "ServiceAccount", "name": "serving"}, account))
    return patches


def _gcs_volumes(spec: DeploymentSpec) -> list[Patch]:
    """Cloud Storage FUSE is mounted in the pod itself, so the claim goes."""
    gone = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "model-store"},
        "$patch": "delete",
    }
    patches = [Patch("claim.yaml", {"kind": "PersistentVolumeClaim", "name": "model-store"}, gone)]
    users = [("apps/v1", "Deployment", "serving", True)]
    if spec.kubernetes.build_in_cluster:
        users.append(("batch/v1", "Job", "engine-build", False))
    for version, kind, name, read_only in users:
        attributes = {"bucketName": spec.kubernetes.model_store.bucket, "mountOptions": "implicit-dirs"}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": read_only, "volumeAttributes": attributes}
        volume = {"name": "models", "persistentVolumeClaim": None, "csi": csi}
        template = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": {"volumes": [volume]}}
        patches.append(merge(f"{name}.yaml", version, kind, name, spec={"template": template}))
    return [*patches, Patch("policy.yaml", None, _bucket_policy())]


def _bucket_policy() -> dict[str, Any]:
    """The mount runs beside the server: it needs HTTPS, and GKE's metadata server for its identity."""
    metadata = [
        ("169.254.169.252/32", 988),  # GKE 1.21 and newer
        ("169.254.169.254/32", 80),  # Dataplane V2
    ]
    egress: list[dict[str, Any]] = [{"ports": [{"protocol": "TCP", "port": 443}]}]
    for block, port in metadata:
        egress.append({"to": [{"ipBlock": {"cidr": block}}], "ports": [{"protocol": "TCP", "port": port}]})
    selector = {"matchLabels": {"app.kubernetes.io/name": "trireme"}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "bucket"},
        "spec": {"podSelector": selector, "policyTypes": ["Egress"], "egress": egress},
    }


def _s3_volume(spec: DeploymentSpec) -> list[Patch]:
    """Mountpoint for S3 knows volumes that are made by hand only: the claim binds one that is the bucket."""
    model_store = spec.kubernetes.model_store
    size = f"{model_store.size_gib}Gi"
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "models"},
        "spec": {
            "capacity": {"storage": size},  # asked for, and without meaning
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "mountOptions": ["allow-delete", "allow-other", f"uid={USER}", f"gid={USER}"],
            "csi": {
                "driver": "s3.csi.aws.com",
                "volumeHandle": f"{spec.name}-{model_store.bucket}",
                "volumeAttributes": {"bucketName": model_store.bucket, "authenticationSource": "pod"},
            },
        },
    }
    claim = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "volumeName": "models",
        "resources": {"requests": {"storage": size}},
    }
    return [
        Patch("volume.yaml", None, volume),
        merge("claim.yaml", "v1", "PersistentVolumeClaim", "model-store", spec=claim),
    ]


def scaler(spec: DeploymentSpec, sizing: Sizing) -> list[Patch]:
    """Bounds and thresholds of the autoscaler, and the route's names."""
    scaling = spec.kubernetes.scaling
    patches = []
    if scaling.by == "hpa":
        operations = [
            _replace("/spec/minReplicas", scaling.min_replicas),
            _replace("/spec/maxReplicas", scaling.max_replicas),
            _replace("/spec/metrics", _pod_metrics(spec, sizing)),
            _replace("/spec/behavior/scaleDown/stabilizationWindowSeconds", scaling.scale_down_s),
        ]
        patches.append(Patch("hpa.yaml", {"kind": "HorizontalPodAutoscaler", "name": "serving"}, operations))
    if scaling.by == "keda":
        window = "/spec/advanced/horizontalPodAutoscalerConfig/behavior/scaleDown/stabilizationWindowSeconds"
        operations = [
            _replace("/spec/minReplicaCount", scaling.min_replicas),
            _replace("/spec/maxReplicaCount", scaling.max_replicas),
            _replace("/spec/fallback/replicas", scaling.min_replicas),
            _replace("/spec/triggers", _triggers(spec, sizing)),
            _replace(window, scaling.scale_down_s),
        ]
        patches.append(Patch("scaled-object.yaml", {"kind": "ScaledObject", "name": "serving"}, operations))
    gateway = spec.kubernetes.gateway
    if gateway is not None:
        reach = [
            _replace("/spec/gatewayClassName", gateway.class_name),
            _replace("/spec/listeners/0/hostname", gateway.hostname),
            _replace("/spec/listeners/0/tls/certificateRefs/0/name", gateway.tls_secret),
        ]
        patches.append(Patch("gateway.yaml", {"kind": "Gateway", "name": "serving"}, reach))
        hosts = [_replace("/spec/hostnames", [gateway.hostname])]
        patches.append(Patch("route.yaml", {"kind": "GRPCRoute", "name": "serving"}, hosts))
    return patches


def _replace(path: str, value: object) -> dict[str, object]:
    return {"op": "replace", "path": path, "value": value}


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
        {"type": "Pods", "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": value}}}
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
    pods = f'namespace="{spec.kubernetes.namespace or spec.name}",pod=~"{spec.name}-serving-.*"'
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


def images(spec: DeploymentSpec, platform: Platform) -> list[dict[str, str]]:
    """Names, and the tag of this release. The GPU's images hold NVIDIA's Triton."""
    chosen = spec.kubernetes.images
    prefix = f"{chosen.registry.rstrip('/')}/" if chosen.registry else ""
    builder = "builder-gpu" if platform == "gpu" and spec.engine.flavour == "tensorrt" else "builder"
    serving = {"name": "trireme/serving", "newName": f"{prefix}trireme/serving{'-gpu' if platform == 'gpu' else ''}"}
    pinned = {"digest": chosen.serving_digest} if chosen.serving_digest else {"newTag": chosen.tag}
    return [
        {**serving, **pinned},
        {"name": "trireme/builder", "newName": f"{prefix}trireme/{builder}", "newTag": chosen.tag},
    ]
