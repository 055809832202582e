"""API versions that are gone. Source: kubernetes.io/docs/reference/using-api/deprecation-guide"""

from __future__ import annotations

from collections.abc import Iterator

from builders.manifests.lint.objects import Finding, ObjectSet

# (old apiVersion, kinds; none means all of that version) -> (removed in, replacement)
_REMOVED: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("extensions/v1beta1", ("Deployment", "DaemonSet", "ReplicaSet"), "1.16", "apps/v1"),
    ("extensions/v1beta1", ("NetworkPolicy",), "1.16", "networking.k8s.io/v1"),
    ("extensions/v1beta1", ("Ingress",), "1.22", "networking.k8s.io/v1"),
    ("extensions/v1beta1", ("PodSecurityPolicy",), "1.16", "Pod Security labels on the namespace"),
    ("apps/v1beta1", (), "1.16", "apps/v1"),
    ("apps/v1beta2", (), "1.16", "apps/v1"),
    ("networking.k8s.io/v1beta1", ("Ingress", "IngressClass"), "1.22", "networking.k8s.io/v1"),
    ("rbac.authorization.k8s.io/v1beta1", (), "1.22", "rbac.authorization.k8s.io/v1"),
    ("rbac.authorization.k8s.io/v1alpha1", (), "1.22", "rbac.authorization.k8s.io/v1"),
    ("apiextensions.k8s.io/v1beta1", (), "1.22", "apiextensions.k8s.io/v1"),
    ("admissionregistration.k8s.io/v1beta1", ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"),
     "1.22", "admissionregistration.k8s.io/v1"),
    ("certificates.k8s.io/v1beta1", (), "1.22", "certificates.k8s.io/v1"),
    ("apiregistration.k8s.io/v1beta1", (), "1.22", "apiregistration.k8s.io/v1"),
    ("authentication.k8s.io/v1beta1", ("TokenReview",), "1.22", "authentication.k8s.io/v1"),
    ("authorization.k8s.io/v1beta1", (), "1.22", "authorization.k8s.io/v1"),
    ("scheduling.k8s.io/v1beta1", ("PriorityClass",), "1.22", "scheduling.k8s.io/v1"),
    ("coordination.k8s.io/v1beta1", ("Lease",), "1.22", "coordination.k8s.io/v1"),
    ("storage.k8s.io/v1beta1", ("StorageClass", "VolumeAttachment", "CSIDriver", "CSINode"),
     "1.22", "storage.k8s.io/v1"),
    ("batch/v1beta1", ("CronJob",), "1.25", "batch/v1"),
    ("discovery.k8s.io/v1beta1", ("EndpointSlice",), "1.25", "discovery.k8s.io/v1"),
    ("events.k8s.io/v1beta1", ("Event",), "1.25", "events.k8s.io/v1"),
    ("autoscaling/v2beta1", (), "1.25", "autoscaling/v2"),
    ("autoscaling/v2beta2", (), "1.26", "autoscaling/v2"),
    ("policy/v1beta1", ("PodDisruptionBudget",), "1.25", "policy/v1"),
    ("policy/v1beta1", ("PodSecurityPolicy",), "1.25", "Pod Security labels on the namespace"),
    ("node.k8s.io/v1beta1", ("RuntimeClass",), "1.25", "node.k8s.io/v1"),
    ("storage.k8s.io/v1beta1", ("CSIStorageCapacity",), "1.27", "storage.k8s.io/v1"),
    ("flowcontrol.apiserver.k8s.io/v1beta1", (), "1.26", "flowcontrol.apiserver.k8s.io/v1"),
    ("flowcontrol.apiserver.k8s.io/v1beta2", (), "1.29", "flowcontrol.apiserver.k8s.io/v1"),
    ("flowcontrol.apiserver.k8s.io/v1beta3", (), "1.32", "flowcontrol.apiserver.k8s.io/v1"),
)  # fmt: skip


def removed_versions(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        for version, kinds, release, replacement in _REMOVED:
            if item.api_version == version and (not kinds or item.kind in kinds):
                got = f"{version}, removed in Kubernetes {release}"
                yield Finding("removed-api", item.title, "apiVersion", got, replacement, f"move to {replacement}")
