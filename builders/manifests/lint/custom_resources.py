"""Small, closed schemas of the custom resources that we write, from their projects' API references.

Each covers the fields that a deployment like ours uses. All others are found as unknown fields, a warning: the project
may have them, and its own definition (`--crd`, `--cluster`) tells. Pods, labels and selectors are the built-in ones.

LeaderWorkerSet  lws.sigs.k8s.io/docs/reference/leaderworkerset.v1
ScaledObject     keda.sh/docs/latest/reference/scaledobject-spec
PodMonitor, PrometheusRule  prometheus-operator.dev/docs/api-reference/api
Gateway, HTTPRoute, GRPCRoute  gateway-api.sigs.k8s.io/reference/spec
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
SMALL = "x-small"  # marks levels of which a project may know more fields than stand here; pods are whole

_TEXT: Schema = {"type": "string", "minLength": 1}
_GROUP: Schema = {"type": "string"}  # empty: the core group
_BOOL: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_COUNT_OR_SHARE: Schema = {"anyOf": [_COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_SECONDS: Schema = {"type": "string", "pattern": "^(0|([0-9]+(ms|s|m|h|d|w|y))+)$"}  # Prometheus' durations


def _built_in(name: str) -> Schema:
    return {"$ref": f"/api/_definitions.json#/$defs/io.k8s.{name}"}


_SELECTOR = _built_in("apimachinery.pkg.apis.meta.v1.LabelSelector")


def _enum(*values: str) -> Schema:
    return {"enum": list(values)}


def _list(item: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": least}


def _object(required: str = "", **properties: Schema) -> Schema:
    """A mapping of these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
        SMALL: True,
    }


def _resource(api_version: str, kind: str, spec: Schema) -> dict[tuple[str, str], Schema]:
    whole = _object(
        "apiVersion kind metadata spec",
        apiVersion=_enum(api_version),
        kind=_enum(kind),
        metadata=_built_in("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=spec,
    )
    return {(api_version, kind): {"$id": f"https://kubernetes.io/api/custom/{kind}", **whole}}


_LEADER_WORKER_SET = _object(
    "leaderWorkerTemplate",
    replicas=_COUNT,
    startupPolicy=_enum("LeaderCreated", "LeaderReady"),
    rolloutStrategy=_object(
        "",
        type=_enum("RollingUpdate"),
        rollingUpdateConfiguration=_object(maxSurge=_COUNT_OR_SHARE, maxUnavailable=_COUNT_OR_SHARE, partition=_COUNT),
    ),
    networkConfig=_object("", subdomainPolicy=_enum("Shared", "UniquePerReplica")),
    leaderWorkerTemplate=_object(
        "workerTemplate",
        size={"type": "integer", "minimum": 1},
        restartPolicy=_enum("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None", "Default"),
        leaderTemplate=_built_in("api.core.v1.PodTemplateSpec"),
        workerTemplate=_built_in("api.core.v1.PodTemplateSpec"),
        subGroupPolicy=_object("", subGroupPolicyType=_enum("LeaderWorker", "LeaderExcluded"), subGroupSize=_COUNT),
        volumeClaimTemplates=_list(_built_in("api.core.v1.PersistentVolumeClaim")),
        persistentVolumeClaimRetentionPolicy=_built_in("api.apps.v1.StatefulSetPersistentVolumeClaimRetentionPolicy"),
    ),
)

_SCALED_OBJECT = _object(
    "scaleTargetRef triggers",
    scaleTargetRef=_object("name", apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT,
    idleReplicaCount=_COUNT,
    pollingInterval=_COUNT,
    cooldownPeriod=_COUNT,
    initialCooldownPeriod=_COUNT,
    fallback=_object(
        "failureThreshold replicas",
        failureThreshold=_COUNT,
        replicas=_COUNT,
        behavior=_enum("static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"),
    ),
    advanced=_object(
        restoreToOriginalReplicaCount=_BOOL,
        horizontalPodAutoscalerConfig=_object(
            name=_TEXT, behavior=_built_in("api.autoscaling.v2.HorizontalPodAutoscalerBehavior")
        ),
    ),
    triggers=_list(
        _object(
            "type metadata",
            type=_TEXT,
            name=_TEXT,
            metricType=_enum("AverageValue", "Value", "Utilization"),
            metadata=_TEXTS,  # text only: KEDA refuses a bare number
            useCachedMetrics=_BOOL,
            authenticationRef=_object(
                "name", name=_TEXT, kind=_enum("TriggerAuthentication", "ClusterTriggerAuthentication")
            ),
        ),
        least=1,
    ),
)

_POD_MONITOR = _object(
    "selector",
    jobLabel=_TEXT,
    podTargetLabels=_list(_TEXT),
    selector=_SELECTOR,
    namespaceSelector=_object(any=_BOOL, matchNames=_list(_TEXT)),
    podMetricsEndpoints=_list(
        _object(
            "",
            port=_TEXT,
            portNumber=_PORT,
            path=_TEXT,
            scheme=_enum("http", "https", "HTTP", "HTTPS"),
            interval=_SECONDS,
            scrapeTimeout=_SECONDS,
            honorLabels=_BOOL,
            authorization=_object("credentials", type=_TEXT, credentials=_object("name key", name=_TEXT, key=_TEXT)),
            tlsConfig=_object("", insecureSkipVerify=_BOOL, serverName=_TEXT),
        ),
    ),
)

_PROMETHEUS_RULE = _object(
    "",
    groups=_list(
        _object(
            "name",
            name=_TEXT,
            interval=_SECONDS,
            labels=_TEXTS,
            rules=_list(
                {
                    **_object(
                        "expr",
                        alert=_TEXT,
                        record=_TEXT,
                        expr={"anyOf": [_TEXT, {"type": "number"}]},
                        **{"for": _SECONDS},
                        keep_firing_for=_SECONDS,
                        labels=_TEXTS,
                        annotations=_TEXTS,
                    ),
                    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                },
            ),
        ),
    ),
)

_PARENTS = _list(_object("name", group=_GROUP, kind=_TEXT, name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_PORT))
_BACKENDS = _list(_object("name", group=_GROUP, kind=_TEXT, name=_TEXT, namespace=_TEXT, port=_PORT, weight=_COUNT))
_HEADERS = _list(_object("name value", name=_TEXT, value=_TEXT, type=_enum("Exact", "RegularExpression")))

_GATEWAY = _object(
    "gatewayClassName listeners",
    gatewayClassName=_TEXT,
    listeners=_list(
        _object(
            "name port protocol",
            name=_TEXT,
            hostname=_TEXT,
            port=_PORT,
            protocol={"anyOf": [_enum("HTTP", "HTTPS", "TLS", "TCP", "UDP"), {"type": "string", "pattern": "^.+/.+$"}]},
            tls=_object(
                mode=_enum("Terminate", "Passthrough"),
                certificateRefs=_list(_object("name", group=_GROUP, kind=_TEXT, name=_TEXT, namespace=_TEXT)),
                options=_TEXTS,
            ),
            allowedRoutes=_object(
                namespaces=_object("", **{"from": _enum("All", "Selector", "Same", "None")}, selector=_SELECTOR),
                kinds=_list(_object("kind", group=_GROUP, kind=_TEXT)),
            ),
        ),
        least=1,
    ),
    infrastructure=_object(labels=_TEXTS, annotations=_TEXTS),
)

_GRPC_ROUTE = _object(
    "",
    parentRefs=_PARENTS,
    hostnames=_list(_TEXT),
    rules=_list(
        _object(
            "",
            name=_TEXT,
            matches=_list(
                _object(
                    method=_object(type=_enum("Exact", "RegularExpression"), service=_TEXT, method=_TEXT),
                    headers=_HEADERS,
                )
            ),
            backendRefs=_BACKENDS,
        ),
        least=1,
    ),
)

_HTTP_ROUTE = _object(
    "",
    parentRefs=_PARENTS,
    hostnames=_list(_TEXT),
    rules=_list(
        _object(
            "",
            name=_TEXT,
            matches=_list(
                _object(
                    path=_object("", type=_enum("Exact", "PathPrefix", "RegularExpression"), value=_TEXT),
                    method=_enum("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"),
                    headers=_HEADERS,
                )
            ),
            backendRefs=_BACKENDS,
            timeouts=_object(request=_TEXT, backendRequest=_TEXT),
        ),
        least=1,
    ),
)

CUSTOM_RESOURCES: dict[tuple[str, str], Schema] = {
    **_resource("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", _LEADER_WORKER_SET),
    **_resource("keda.sh/v1alpha1", "ScaledObject", _SCALED_OBJECT),
    **_resource("monitoring.coreos.com/v1", "PodMonitor", _POD_MONITOR),
    **_resource("monitoring.coreos.com/v1", "PrometheusRule", _PROMETHEUS_RULE),
    **_resource("gateway.networking.k8s.io/v1", "Gateway", _GATEWAY),
    **_resource("gateway.networking.k8s.io/v1", "GRPCRoute", _GRPC_ROUTE),
    **_resource("gateway.networking.k8s.io/v1", "HTTPRoute", _HTTP_ROUTE),
}
