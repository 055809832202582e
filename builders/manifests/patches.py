"""What a spec changes in the pods of the components: patches as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builders.errors import UnsupportedError
from builders.manifests.lint.quantity import canonical
from builders.manifests.parts import CONTROL, KEYS, SHM, VERSION, serving_pod
from builders.manifests.sizing import Sizing
from builders.spec import DeploymentSpec, Platform

GPU = "nvidia.com/gpu"
_GPU_MAJOR, _GPU_MINOR = f"{GPU}.compute.major", f"{GPU}.compute.minor"  # NVIDIA's feature discovery


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


def replace(path: str, value: object) -> dict[str, object]:
    return {"op": "replace", "path": path, "value": value}


def namespace_of(spec: DeploymentSpec) -> str:
    return spec.kubernetes.namespace or spec.name


def api_keys_secret(spec: DeploymentSpec) -> str:
    return spec.kubernetes.access.api_keys_secret or f"{spec.name}-api-keys"


def replica(spec: DeploymentSpec, sizing: Sizing) -> list[Patch]:
    """The Deployment: one pod's size and its times."""
    cluster, names = spec.kubernetes, serving_pod()
    devices = {cluster.gpu_resource: str(sizing.gpus)} if sizing.gpus and cluster.gpus_by == "device-plugin" else {}
    asked = {"cpu": str(sizing.cpus), "memory": canonical(f"{sizing.memory_mib}Mi"), **devices}
    triton = {
        "name": names.container,
        "startupProbe": {"failureThreshold": sizing.startup_failures},
        "lifecycle": {"preStop": {"sleep": {"seconds": cluster.pre_stop_s}}},
        "resources": {"requests": asked, "limits": asked},
    }
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": sizing.grace_s,
        "containers": [triton],
        "volumes": _volumes(spec, sizing),
    }
    if devices:
        box = {"name": names.init_container, "resources": {"requests": devices, "limits": devices}}
        pod["initContainers"] = [box]
    if cluster.images.pull_secret:
        pod["imagePullSecrets"] = [{"name": cluster.images.pull_secret}]
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    pod |= node_choice(spec, spec.engine.targets if sizing.gpus else (), gpu=sizing.gpus > 0)
    body: dict[str, Any] = {"progressDeadlineSeconds": sizing.progress_deadline_s, "template": {"spec": pod}}
    if cluster.scaling.by == "none":
        body["replicas"] = cluster.scaling.min_replicas
    patches = [merge("deployment.yaml", "apps/v1", "Deployment", "serving", spec=body)]
    if sizing.gpus > 1 and cluster.gpus_by == "dra":
        count = [replace("/spec/spec/devices/requests/0/exactly/count", sizing.gpus)]
        patches.append(Patch("claim.yaml", {"kind": "ResourceClaimTemplate", "name": "gpus"}, count))
    if devices and cluster.gpu_resource != GPU:
        patches.append(_without_whole_gpus())
    return patches


def group(spec: DeploymentSpec, sizing: Sizing) -> list[Patch]:
    """The LeaderWorkerSet that the Deployment's pod becomes where a replica spans nodes. Raises UnsupportedError."""
    if sizing.nodes == 1:
        return []
    if sizing.gpus and len(spec.engine.targets) > 1:
        raise UnsupportedError(
            "engine.targets",
            got=", ".join(spec.engine.targets),
            expected=f"one type of GPU: the {sizing.nodes} nodes of a replica must be alike",
            fix="name the one that the replica runs on",
        )
    patches = []
    replicas = replace("/spec/replicas", spec.kubernetes.scaling.min_replicas)
    scalers = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}
    if kind := scalers.get(spec.kubernetes.scaling.by):
        replicas = {"op": "remove", "path": "/spec/replicas"}  # the autoscaler's
        scaled = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": "serving"}
        target = replace("/spec/scaleTargetRef", scaled)
        patches = [Patch("scaled.yaml", {"kind": kind, "name": "serving"}, [target])]
    changes = [replace("/spec/leaderWorkerTemplate/size", sizing.nodes), replicas]
    return [Patch("group.yaml", {"kind": "LeaderWorkerSet", "name": "serving"}, changes), *patches]


def _volumes(spec: DeploymentSpec, sizing: Sizing) -> list[dict[str, Any]]:
    """What the pod mounts that the set does not hold gets the spec's name here: kustomize prefixes its own only."""
    names = serving_pod()
    version = {"configMap": {"name": f"{spec.name}-model-version", "optional": True}}
    control = {"secret": {"secretName": f"{spec.name}-triton-control", "optional": sizing.nodes == 1}}
    # A merge: which keys of it are mounted stays as the base says.
    keys = {"secret": {"secretName": api_keys_secret(spec)}}
    return [
        {"name": names.volume(SHM), "emptyDir": {"medium": "Memory", "sizeLimit": canonical(f"{sizing.shm_mib}Mi")}},
        {"name": names.volume(VERSION), **version},
        {"name": names.volume(CONTROL), **control},
        *([] if spec.kubernetes.access.no_auth else [{"name": names.volume(KEYS), **keys}]),
    ]


def _without_whole_gpus() -> Patch:
    """The component asks for whole GPUs; a MIG slice or a shared GPU has a name of its own."""
    gone = [
        {"op": "remove", "path": f"/spec/template/spec/{box}/0/resources/{kind}/{GPU.replace('/', '~1')}"}
        for box in ("initContainers", "containers")
        for kind in ("requests", "limits")
    ]
    return Patch("whole-gpus.yaml", {"kind": "Deployment", "name": "serving"}, gone)


def node_choice(spec: DeploymentSpec, targets: Sequence[str], gpu: bool) -> dict[str, Any]:
    """Nodes with the labels asked for, with a GPU of one of the targets (`sm89`) if there are any, and their taints.

    A merge replaces the list of tolerations, so the one for GPUs is said again.
    """
    cluster = spec.kubernetes
    choice: dict[str, Any] = {}
    if cluster.node_selector:
        choice["nodeSelector"] = dict(cluster.node_selector)
    if targets:
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": _terms(spec, targets)}}
        choice["affinity"] = {"nodeAffinity": required}
    tolerations = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}] if gpu else []
    for item in cluster.tolerations:
        of_value = {"operator": "Exists"} if item.value is None else {"operator": "Equal", "value": item.value}
        tolerations.append({"key": item.key, **of_value, **({"effect": item.effect} if item.effect else {})})
    if tolerations:
        choice["tolerations"] = tolerations
    return choice


def _terms(spec: DeploymentSpec, targets: Sequence[str]) -> list[dict[str, Any]]:
    """One for each type of GPU: by the labels that the spec gives it, else by those of NVIDIA's feature discovery."""
    terms = []
    for target in targets:
        discovered = {_GPU_MAJOR: target[2:-1], _GPU_MINOR: target[-1]}
        labels = spec.kubernetes.gpu_node_labels.get(target, discovered)
        rules = [{"key": key, "operator": "In", "values": [value]} for key, value in labels.items()]
        terms.append({"matchExpressions": rules})
    return terms


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
