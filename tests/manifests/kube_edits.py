"""Mistakes made on purpose in rendered manifests, each with the rule that must name it.

A path is words between spaces, because keys hold dots and slashes. `@pod` and `@triton` stand for the pod of a
Deployment or Job and its first container, `@worker` for the first container of a group's workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import yaml

TP = "tensor-parallel"
HPA, PDB, LWS = "HorizontalPodAutoscaler/serving", "PodDisruptionBudget/serving", "LeaderWorkerSet/serving"
Documents = list[dict[str, Any]]
Make = Callable[[Documents], None]
_SHORT = {
    "@triton": "@pod containers 0",
    "@pod": "spec template spec",
    "@worker": "spec leaderWorkerTemplate workerTemplate spec containers 0",
}


@dataclass(frozen=True)
class Edit:
    """What is wrong, the rule that must say so, and the overlay that it is made in."""

    name: str
    rule: str
    make: Make
    overlay: str = "single-gpu"


def put(title: str, path: str, value: object) -> Make:
    """Sets the value at a path; an index past a list's end appends."""

    def make(documents: Documents) -> None:
        place, last = _walk(documents, title, path)
        if isinstance(place, list) and last == len(place):
            place.append(value)
        else:
            place[last] = value

    return make


def drop(title: str, path: str) -> Make:
    def make(documents: Documents) -> None:
        place, last = _walk(documents, title, path)
        del place[last]

    return make


def remove(title: str) -> Make:
    return lambda documents: documents.remove(_find(documents, title))


def add(**document: Any) -> Make:
    return lambda documents: documents.append(document)


def edited(text: str, edit: Edit) -> str:
    documents, before = (list(yaml.load_all(text, yaml.CSafeLoader)) for _ in range(2))
    edit.make(documents)
    assert documents != before, "the edit changed nothing"
    return cast("str", yaml.dump_all(documents, Dumper=yaml.CSafeDumper, sort_keys=False))


def _find(documents: Documents, title: str) -> dict[str, Any]:
    kind, name = title.split("/")
    return next(item for item in documents if (item["kind"], item["metadata"]["name"]) == (kind, name))


def _walk(documents: Documents, title: str, path: str) -> tuple[Any, Any]:
    for short, long in _SHORT.items():
        path = path.replace(short, long)
    steps: list[Any] = [int(word) if word.isdigit() else word for word in path.split()]
    item: Any = _find(documents, title)
    for step in steps[:-1]:
        item = item[step]
    return item, steps[-1]


EDITS = [
    # references
    Edit("a Service that selects nothing", "not-here", put("Service/serving", "spec selector app", "x")),
    Edit(
        "a selector that is not the template's",
        "selector",
        put("Deployment/serving", "spec selector matchLabels a", "b"),
    ),
    Edit("a budget for nobody", "not-here", put(PDB, "spec selector matchLabels a", "b")),
    Edit("a policy for nobody", "not-here", put("NetworkPolicy/serving", "spec podSelector matchLabels a", "b")),
    Edit("a monitor of nobody", "not-here", put("PodMonitor/serving", "spec selector matchLabels a", "b")),
    Edit("a target port that is not there", "port", put("Service/serving", "spec ports 0 targetPort", "web")),
    Edit(
        "two ports of one name",
        "port",
        put("Service/serving", "spec ports 2", {"name": "grpc", "port": 8009, "targetPort": "health"}),
    ),
    Edit(
        "a probe of an undefined port", "port", put("Deployment/serving", "@triton readinessProbe httpGet port", "web")
    ),
    Edit("a policy of an undefined port", "port", put("NetworkPolicy/serving", "spec ingress 0 ports 0 port", "web")),
    Edit("a monitor of an undefined port", "port", put("PodMonitor/serving", "spec podMetricsEndpoints 0 port", "web")),
    Edit("container ports of one name", "port", put("Deployment/serving", "@triton ports 0 name", "grpc")),
    Edit(
        "a ConfigMap that is not there",
        "not-here",
        put("Deployment/serving", "@triton envFrom 0 configMapRef name", "gone"),
    ),
    Edit(
        "a claim that is not there",
        "not-here",
        put("Deployment/serving", "@pod volumes 0 persistentVolumeClaim claimName", "gone"),
    ),
    Edit("an account that is not there", "not-here", remove("ServiceAccount/serving")),
    Edit("a volume that is not there", "mount", put("Deployment/serving", "@triton volumeMounts 0 name", "gone")),
    Edit("two mounts at one path", "mount", put("Deployment/serving", "@triton volumeMounts 1 mountPath", "/models")),
    Edit(
        "a volume that nothing mounts",
        "mount",
        put("Deployment/serving", "@pod volumes 5", {"name": "x", "emptyDir": {"sizeLimit": "1Gi"}}),
    ),
    Edit("a variable that nobody sets", "variable", put("Deployment/serving", "@triton args 0", "$(NOBODY)")),
    Edit("two containers of one name", "name", put("Deployment/serving", "@pod initContainers 0 name", "triton")),
    Edit(
        "the same object twice",
        "duplicate-object",
        add(apiVersion="v1", kind="ServiceAccount", metadata={"name": "serving", "namespace": "trireme"}),
    ),
    # resources
    Edit(
        "a quantity with a unit of its own",
        "quantity",
        put("Deployment/serving", "@triton resources limits memory", "16GiB"),
    ),
    Edit("thousandths of a byte", "quantity", put("Deployment/serving", "@triton resources limits memory", "16384m")),
    Edit(
        "a size that is no quantity",
        "quantity",
        put("Deployment/serving", "@pod volumes 3 emptyDir sizeLimit", "256 Mi"),
    ),
    Edit(
        "a claim of no quantity",
        "quantity",
        put("PersistentVolumeClaim/model-store", "spec resources requests storage", "50GB"),
    ),
    Edit("a threshold that is no quantity", "quantity", put(HPA, "spec metrics 0 pods target averageValue", "many")),
    Edit(
        "a GPU request over its limit",
        "gpu-request",
        put("Deployment/serving", "@triton resources requests nvidia.com/gpu", 2),
    ),
    Edit(
        "a GPU request without a limit",
        "gpu-request",
        drop("Deployment/serving", "@triton resources limits nvidia.com/gpu"),
    ),
    Edit(
        "half a GPU",
        "gpu-request",
        put(
            "Deployment/serving",
            "@pod containers 0 resources",
            {"limits": {"nvidia.com/gpu": "500m", "memory": "16Gi"}},
        ),
    ),
    Edit(
        "a request over its limit",
        "request-over-limit",
        put("Deployment/serving", "@triton resources requests memory", "17Gi"),
    ),
    Edit("no memory limit", "memory-limit", drop("Deployment/serving", "@triton resources limits memory")),
    Edit(
        "a Memory volume without a size",
        "memory-volume",
        drop("Deployment/serving", "@pod volumes 3 emptyDir sizeLimit"),
    ),
    Edit(
        "a Memory volume as large as the limit",
        "memory-volume",
        put("Deployment/serving", "@pod volumes 3 emptyDir sizeLimit", "16Gi"),
    ),
    Edit("a volume on disk without a size", "volume-size", put("Deployment/serving", "@pod volumes 2 emptyDir", {})),
    Edit(
        "one node's volume for many replicas",
        "claim",
        put("PersistentVolumeClaim/model-store", "spec accessModes", ["ReadWriteOnce"]),
    ),
    # coming and going
    Edit(
        "grace shorter than preStop and drain",
        "grace",
        put("Deployment/serving", "@pod terminationGracePeriodSeconds", 45),
    ),
    Edit(
        "a drain that outgrows the grace", "grace", put("Deployment/serving", "@triton args 6", "--exit-timeout-s=60")
    ),
    Edit("the default grace", "grace", drop("Deployment/serving", "@pod terminationGracePeriodSeconds")),
    Edit(
        "a preStop by shell that outgrows it",
        "grace",
        put("Deployment/serving", "@triton lifecycle preStop", {"exec": {"command": ["sh", "-c", "sleep 60"]}}),
    ),
    Edit("no preStop", "grace", drop("Deployment/serving", "@triton lifecycle")),
    Edit(
        "surge and unavailable both 0",
        "rollout",
        put("Deployment/serving", "spec strategy rollingUpdate", {"maxSurge": 0, "maxUnavailable": 0}),
    ),
    Edit("a Job that restarts for ever", "rollout", drop("Job/engine-build", "@pod restartPolicy")),
    Edit(
        "a deadline before the model is loaded", "probe", put("Deployment/serving", "spec progressDeadlineSeconds", 300)
    ),
    Edit(
        "a probe slower than its period", "probe", put("Deployment/serving", "@triton readinessProbe timeoutSeconds", 6)
    ),
    Edit("no readiness behind a Service", "probe", drop("Deployment/serving", "@triton readinessProbe")),
    Edit("a budget of no pod", "budget", put(PDB, "spec maxUnavailable", 0)),
    Edit("a budget of no number", "value", put(PDB, "spec maxUnavailable", "half")),
    Edit("a budget with both bounds", "value", put(PDB, "spec minAvailable", 1)),
    Edit("a budget that broken pods block", "budget", drop(PDB, "spec unhealthyPodEvictionPolicy")),
    Edit("an autoscaler upside down", "autoscaler", put(HPA, "spec minReplicas", 9)),
    Edit("replicas beside an autoscaler", "autoscaled-replicas", put("Deployment/serving", "spec replicas", 3)),
    Edit("an autoscaler of nothing", "not-here", put(HPA, "spec scaleTargetRef name", "gone")),
    Edit(
        "a share of a request that is not there",
        "autoscaler",
        put(
            HPA,
            "spec metrics 2",
            {
                "type": "Resource",
                "resource": {"name": "ephemeral-storage", "target": {"type": "Utilization", "averageUtilization": 60}},
            },
        ),
    ),
    Edit(
        "HPA and KEDA on one workload",
        "autoscaler",
        add(
            apiVersion="autoscaling/v2",
            kind="HorizontalPodAutoscaler",
            metadata={"name": "more", "namespace": "trireme"},
            spec={
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "serving"},
                "minReplicas": 2,
                "maxReplicas": 3,
            },
        ),
        TP,
    ),
    Edit("KEDA of nothing", "not-here", put("ScaledObject/serving", "spec scaleTargetRef name", "gone"), TP),
    Edit("KEDA upside down", "autoscaler", put("ScaledObject/serving", "spec minReplicaCount", 20), TP),
    # security
    Edit("privileged", "pod-security", put("Deployment/serving", "@triton securityContext privileged", True)),
    Edit("root", "pod-security", put("Deployment/serving", "@pod securityContext runAsUser", 0)),
    Edit("perhaps root", "pod-security", drop("Deployment/serving", "@pod securityContext runAsNonRoot")),
    Edit("escalation", "pod-security", drop("Deployment/serving", "@triton securityContext allowPrivilegeEscalation")),
    Edit("capabilities kept", "pod-security", drop("Deployment/serving", "@triton securityContext capabilities")),
    Edit(
        "a capability added",
        "pod-security",
        put("Deployment/serving", "@triton securityContext capabilities add", ["SYS_ADMIN"]),
    ),
    Edit("no seccomp profile", "pod-security", drop("Deployment/serving", "@pod securityContext seccompProfile")),
    Edit("the host's network", "pod-security", put("Deployment/serving", "@pod hostNetwork", True)),
    Edit(
        "a host path",
        "pod-security",
        put("Deployment/serving", "@pod volumes 2", {"name": "tmp", "hostPath": {"path": "/tmp"}}),
    ),
    Edit("a host port", "pod-security", put("Deployment/serving", "@triton ports 0 hostPort", 8001)),
    Edit(
        "an unsafe sysctl",
        "pod-security",
        put("Deployment/serving", "@pod securityContext sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
    ),
    Edit(
        "a writable root",
        "read-only-root",
        drop("Deployment/serving", "@triton securityContext readOnlyRootFilesystem"),
    ),
    Edit("a token for nothing", "token", put("Deployment/serving", "@pod automountServiceAccountToken", True)),
    Edit("the latest image", "image-tag", put("Deployment/serving", "@triton image", "trireme/serving:latest")),
    Edit(
        "no tag, but a port in the registry",
        "image-tag",
        put("Deployment/serving", "@triton image", "registry.example.com:5000/serving"),
    ),
    Edit(
        "every right",
        "rbac-wildcard",
        add(
            apiVersion="rbac.authorization.k8s.io/v1",
            kind="Role",
            metadata={"name": "all"},
            rules=[{"apiGroups": [""], "resources": ["*"], "verbs": ["get"]}],
        ),
    ),
    Edit(
        "cluster-admin",
        "rbac-wildcard",
        add(
            apiVersion="rbac.authorization.k8s.io/v1",
            kind="ClusterRoleBinding",
            metadata={"name": "all"},
            roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            subjects=[],
        ),
    ),
    # what an API server or a controller would refuse
    Edit("an API that is gone", "removed-api", put(HPA, "apiVersion", "autoscaling/v2beta2")),
    Edit("a version that never was", "unknown-kind", put("Deployment/serving", "apiVersion", "apps/v3")),
    Edit("a group with a known beginning", "no-schema", put(PDB, "apiVersion", "policy.example.com/v1")),
    Edit("an unknown kind", "no-schema", add(apiVersion="example.com/v1", kind="Thing", metadata={"name": "x"})),
    Edit("a misspelt field", "schema", put("Deployment/serving", "spec replica", 3)),
    Edit("text for a number", "schema", put("Service/serving", "spec ports 0 port", "8001")),
    Edit(
        "a misspelt field of a rule", "unknown-field", put("PrometheusRule/serving", "spec groups 0 rules 1 form", "5m")
    ),
    Edit("a rule that is both", "schema", put("PrometheusRule/serving", "spec groups 0 rules 0 alert", "X")),
    Edit(
        "a misspelt field of a monitor",
        "unknown-field",
        put("PodMonitor/serving", "spec podMetricsEndpoints 0 period", "5s"),
    ),
    Edit(
        "a number where KEDA wants text",
        "schema",
        put("ScaledObject/serving", "spec triggers 0 metadata threshold", 64),
        TP,
    ),
    Edit("a misspelt field of KEDA", "unknown-field", put("ScaledObject/serving", "spec maxReplicas", 64), TP),
    Edit(
        "a route to no Service",
        "not-here",
        put("GRPCRoute/serving", "spec rules 0 backendRefs 0 name", "gone"),
        TP,
    ),
    Edit("a route to no port", "port", put("GRPCRoute/serving", "spec rules 0 backendRefs 0 port", 9), TP),
    Edit("a route of no Gateway", "not-here", put("GRPCRoute/serving", "spec parentRefs 0 name", "gone"), TP),
    Edit(
        "a route of no listener",
        "missing-reference",
        put("GRPCRoute/serving", "spec parentRefs 0 sectionName", "gone"),
        TP,
    ),
    Edit("a listener of no protocol", "schema", put("Gateway/serving", "spec listeners 0 protocol", "GRPC"), TP),
    Edit("a misspelt field of a group", "unknown-field", put(LWS, "spec leaderWorkerTemplate sizes", 2), "multi-node"),
    Edit(
        "a misspelt field of a worker",
        "schema",
        put(LWS, "spec leaderWorkerTemplate workerTemplate spec container", []),
        "multi-node",
    ),
    Edit(
        "a ConfigMap that a worker misses",
        "not-here",
        put(LWS, "@worker envFrom 0 configMapRef name", "settings"),
        "multi-node",
    ),
    Edit("half a worker's GPUs", "gpu-request", put(LWS, "@worker resources requests nvidia.com/gpu", 4), "multi-node"),
]
