"""The model store: a claim, or a bucket under the claim's name; and its cache on the node."""

from __future__ import annotations

from typing import Any

from builders.manifests.lint.quantity import canonical
from builders.manifests.parts import REPOSITORY, STORE, building_pod, serving_pod
from builders.manifests.patches import Patch, merge, namespace_of
from builders.spec import DeploymentSpec

USER = 10001  # of every container; the images say the same


def store(spec: DeploymentSpec) -> list[Patch]:
    """The claim, or the bucket instead of it."""
    model_store = spec.kubernetes.model_store
    resources = {"requests": {"storage": canonical(f"{model_store.size_gib}Gi")}}
    claim: dict[str, Any] = {"accessModes": [model_store.access], "resources": resources}
    if model_store.storage_class is not None:
        claim["storageClassName"] = model_store.storage_class
    patches = [merge("claim.yaml", "v1", "PersistentVolumeClaim", "model-store", spec=claim)]
    if model_store.kind != "claim":
        patches = _bucket(spec)
    if model_store.cache_gib:
        sizes, names = {"ephemeral-storage": canonical(f"{model_store.cache_gib + 4}Gi")}, serving_pod()
        box = {"resources": {"requests": sizes, "limits": sizes}}
        room = {"emptyDir": {"sizeLimit": canonical(f"{model_store.cache_gib}Gi")}}
        pod = {
            "initContainers": [{"name": names.init_container, **box}],
            "containers": [{"name": names.container, **box}],
            "volumes": [{"name": names.volume(REPOSITORY), **room}],
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
    users = [("apps/v1", "Deployment", "serving", serving_pod(), True)]
    if spec.kubernetes.build_in_cluster:
        users.append(("batch/v1", "Job", "engine-build", building_pod(), False))
    for version, kind, name, pod, read_only in users:
        attributes = {"bucketName": spec.kubernetes.model_store.bucket, "mountOptions": "implicit-dirs"}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": read_only, "volumeAttributes": attributes}
        volume = {"name": pod.volume(STORE), "persistentVolumeClaim": None, "csi": csi}
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
    """Mountpoint for S3 knows volumes that are made by hand only: the claim binds one that is the bucket.

    Volumes belong to no namespace, so its name holds the namespace besides the spec's name. It names no storage class:
    the server drops an empty one from a volume, and keeps it in a claim.
    """
    model_store, name = spec.kubernetes.model_store, f"models-{namespace_of(spec)}"
    size = canonical(f"{model_store.size_gib}Gi")
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": size},  # asked for, and without meaning
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "mountOptions": ["allow-delete", "allow-other", f"uid={USER}", f"gid={USER}"],
            "csi": {
                "driver": "s3.csi.aws.com",
                "volumeHandle": f"{namespace_of(spec)}-{spec.name}-{model_store.bucket}",
                "volumeAttributes": {"bucketName": model_store.bucket, "authenticationSource": "pod"},
            },
        },
    }
    claim = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "volumeName": name,
        "resources": {"requests": {"storage": size}},
    }
    return [
        Patch("volume.yaml", None, volume),
        merge("claim.yaml", "v1", "PersistentVolumeClaim", "model-store", spec=claim),
    ]
