"""Values that the API server refuses and no schema does, each made in a clean overlay, as in `kube_edits`."""

from __future__ import annotations

from tests.manifests.kube_edits import HPA, Edit, add, drop, put

VALUE_EDITS = [
    Edit("a label that is no label", "value", put("Deployment/serving", "metadata labels team", "search & ads")),
    Edit("a label's key that is none", "value", put("Service/serving", "metadata labels a/b/c", "x")),
    Edit("a claim of no size", "value", drop("PersistentVolumeClaim/model-store", "spec resources requests storage")),
    Edit("a claim of no access", "value", put("PersistentVolumeClaim/model-store", "spec accessModes", [])),
    Edit("an access mode that is none", "value", put("PersistentVolumeClaim/model-store", "spec accessModes 0", "RWX")),
    Edit("a protocol of another spelling", "value", put("Service/serving", "spec ports 0 protocol", "tcp")),
    Edit("a container port's protocol", "value", put("Deployment/serving", "@triton ports 0 protocol", "HTTP")),
    Edit("liveness after two", "value", put("Deployment/serving", "@triton livenessProbe successThreshold", 2)),
    Edit("a probe without a period", "value", put("Deployment/serving", "@triton readinessProbe periodSeconds", 0)),
    Edit(
        "a spread that is none",
        "value",
        put("Deployment/serving", "@pod topologySpreadConstraints 0 whenUnsatisfiable", "Never"),
    ),
    Edit("no skew at all", "value", put("Deployment/serving", "@pod topologySpreadConstraints 0 maxSkew", 0)),
    Edit("a toleration of no effect", "value", put("Deployment/serving", "@pod tolerations 0 effect", "noSchedule")),
    Edit("a strategy of another spelling", "value", put("Deployment/serving", "spec strategy type", "Rolling")),
    Edit("a Service of no type", "value", put("Service/serving", "spec type", "clusterIP")),
    Edit("a port beyond the last", "value", put("Service/serving", "spec ports 0 port", 80010)),
    Edit(
        "a port's name that is too long",
        "value",
        put("Deployment/serving", "@triton ports 1 name", "metrics-of-triton"),
    ),
    Edit("a container's name in capitals", "value", put("Deployment/serving", "@pod initContainers 0 name", "Fetch")),
    Edit(
        "an object's name in capitals",
        "value",
        add(apiVersion="v1", kind="ConfigMap", metadata={"name": "My_Settings", "namespace": "trireme"}),
    ),
    Edit("replicas below none", "value", put("Deployment/serving", "spec replicas", -1)),
    Edit("no pods at most", "value", put(HPA, "spec maxReplicas", 0)),
    Edit("a Job that gives up before", "value", put("Job/engine-build", "spec backoffLimit", -1)),
    Edit("a policy of no direction", "value", put("NetworkPolicy/serving", "spec policyTypes 0", "ingress")),
    Edit("two volumes of one name", "value", put("Deployment/serving", "@pod volumes 1 name", "models")),
]
