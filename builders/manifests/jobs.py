"""The engine-build Jobs: one for everything, or one for each type of GPU that engines are built on."""

from __future__ import annotations

from typing import Any

import yaml

from builders.manifests.parts import building_pod
from builders.manifests.patches import Patch, merge, node_choice
from builders.manifests.render import K8S
from builders.spec import DeploymentSpec, Platform


def builds_on_gpu(spec: DeploymentSpec, platform: Platform) -> bool:
    """TensorRT builds for the GPU it runs on; TensorRT for RTX builds for any, without one."""
    return platform == "gpu" and spec.engine.flavour == "tensorrt"


def jobs(spec: DeploymentSpec, platform: Platform) -> list[Patch]:
    """Patches of the component's Job, and further Jobs where there are several types of GPU."""
    if not builds_on_gpu(spec, platform):
        return [_patched(spec, node_choice(spec, (), gpu=False))]
    first, *others = spec.engine.targets
    patched = _patched(spec, _on(spec, first))
    return [patched, *(Patch(f"job-{target}.yaml", None, _further(spec, target)) for target in others)]


def _patched(spec: DeploymentSpec, pod: dict[str, Any]) -> Patch:
    if spec.kubernetes.images.pull_secret:
        pod = {**pod, "imagePullSecrets": [{"name": spec.kubernetes.images.pull_secret}]}
    if spec.kubernetes.huggingface_token:
        boxes = pod.get("containers", [{"name": building_pod().container}])
        pod = {**pod, "containers": [{**box, "env": [_token(spec)]} for box in boxes]}
    body = {"activeDeadlineSeconds": spec.kubernetes.fetch_s, "template": {"spec": pod}}
    return merge("job.yaml", "batch/v1", "Job", "engine-build", spec=body)


def _on(spec: DeploymentSpec, target: str) -> dict[str, Any]:
    """What the pod of a Job adds to run on one type of GPU."""
    gpu = {spec.kubernetes.gpu_resource: "1"}
    container = {
        "name": building_pod().container,
        "args": [*_component_job()[1]["args"], f"--target={target}"],
        "resources": {"requests": gpu, "limits": gpu},
    }
    return {**node_choice(spec, (target,), gpu=True), "containers": [container]}


def _token(spec: DeploymentSpec) -> dict[str, Any]:
    """As huggingface_hub reads it."""
    return {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": spec.kubernetes.huggingface_token, "key": "token"}},
    }


def _further(spec: DeploymentSpec, target: str) -> dict[str, Any]:
    """A whole Job: kustomize can change one, but not multiply it."""
    job, container = _component_job()
    changes = _on(spec, target)
    (builder,) = changes.pop("containers")
    for kind, gpu in builder["resources"].items():
        container["resources"][kind] |= gpu
    container["args"] = builder["args"]
    if spec.kubernetes.huggingface_token:
        container["env"].append(_token(spec))
    job["metadata"]["name"] += f"-{target}"
    job["spec"]["activeDeadlineSeconds"] = spec.kubernetes.fetch_s
    pod = job["spec"]["template"]["spec"]
    pod |= changes
    if spec.kubernetes.images.pull_secret:
        pod["imagePullSecrets"] = [{"name": spec.kubernetes.images.pull_secret}]
    return job


def _component_job() -> tuple[dict[str, Any], dict[str, Any]]:
    """The component's Job, fresh, and its container."""
    job = yaml.safe_load((K8S / "components" / "engine-build" / "job.yaml").read_text())
    return job, job["spec"]["template"]["spec"]["containers"][0]
