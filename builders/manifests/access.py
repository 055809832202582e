"""Who may ask the pods: keys and certificate of their gateway, and what follows for probes, Services and monitors."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from builders.manifests.parts import KEYS, serving_pod
from builders.manifests.patches import Patch, api_keys_secret, merge, replace
from builders.spec import DeploymentSpec

_TLS = "/etc/trireme/tls"
_ARGS = "/spec/template/spec/containers/0/args"
_MONITORED = "/spec/podMetricsEndpoints/0"


def access(spec: DeploymentSpec) -> list[Patch]:
    """What differs from the base, whose pods ask for keys and speak in the clear."""
    chosen = spec.kubernetes.access
    # kustomize does not know that a PodMonitor names a Secret.
    key = replace(f"{_MONITORED}/authorization/credentials/name", api_keys_secret(spec))
    if chosen.no_auth:
        key = {"op": "remove", "path": f"{_MONITORED}/authorization"}
    patches = [*(_without_keys() if chosen.no_auth else []), *_monitor(spec, "monitor-key.yaml", key)]
    if chosen.tls_secret is not None:
        patches += _over_tls(spec, chosen.tls_secret)
    if chosen.vllm_metrics:
        patches.append(_more_arguments("vllm-metrics.yaml", "--vllm-metrics"))
    if chosen.otlp_endpoint is not None:
        patches += _spans(chosen.otlp_endpoint)
    return patches


def _pod(file: str, *, container: dict[str, Any], volumes: list[dict[str, Any]]) -> Patch:
    pod = {"containers": [{"name": serving_pod().container, **container}], "volumes": volumes}
    return merge(file, "apps/v1", "Deployment", "serving", spec={"template": {"spec": pod}})


def _more_arguments(file: str, *words: str) -> Patch:
    added = [{"op": "add", "path": f"{_ARGS}/-", "value": word} for word in words]
    return Patch(file, {"kind": "Deployment", "name": "serving"}, added)


def _spans(endpoint: str) -> list[Patch]:
    """The argument, and the one connection that serving pods start: to that port, in the collector's namespace where
    its name says which."""
    parts = urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    rule: dict[str, Any] = {"ports": [{"protocol": "TCP", "port": port}]}
    names = (parts.hostname or "").split(".")
    if len(names) > 2 and names[2] == "svc":
        namespace = {"matchLabels": {"kubernetes.io/metadata.name": names[1]}}
        rule["to"] = [{"namespaceSelector": namespace}]
    opened = [
        replace("/spec/policyTypes", ["Ingress", "Egress"]), {"op": "add", "path": "/spec/egress", "value": [rule]},
    ]  # fmt: skip
    return [
        _more_arguments("spans.yaml", f"--otlp-endpoint={endpoint}"),
        Patch("spans-policy.yaml", {"kind": "NetworkPolicy", "name": "serving"}, opened),
    ]


def _without_keys() -> list[Patch]:
    """Deletes the mount and its volume, and says in place of the argument that this is meant."""
    words = serving_pod().arguments
    place = next(at for at, word in enumerate(words) if word.startswith("--api-keys-file="))
    argument = [replace(f"{_ARGS}/{place}", "--no-auth")]
    gone = {"$patch": "delete"}
    volume = {"name": serving_pod().volume(KEYS), **gone}
    return [
        Patch("no-auth.yaml", {"kind": "Deployment", "name": "serving"}, argument),
        _pod("no-keys.yaml", container={"volumeMounts": [{"mountPath": KEYS, **gone}]}, volumes=[volume]),
    ]


def _monitor(spec: DeploymentSpec, file: str, *operations: dict[str, Any]) -> list[Patch]:
    if not spec.kubernetes.monitoring:
        return []
    return [Patch(file, {"kind": "PodMonitor", "name": "serving"}, list(operations))]


def _over_tls(spec: DeploymentSpec, secret: str) -> list[Patch]:
    scheme = {"httpGet": {"scheme": "HTTPS"}}
    container = {
        "startupProbe": scheme,
        "readinessProbe": scheme,
        "volumeMounts": [{"name": "tls", "mountPath": _TLS, "readOnly": True}],
    }
    patches = [
        _pod("tls.yaml", container=container, volumes=[{"name": "tls", "secret": {"secretName": secret}}]),
        _more_arguments("tls-files.yaml", f"--tls-cert={_TLS}/tls.crt", f"--tls-key={_TLS}/tls.key"),
    ]
    ports = [replace("/spec/ports/0/appProtocol", "https"), {"op": "remove", "path": "/spec/ports/1/appProtocol"}]
    services = ("serving", "serving-pods")
    patches += [Patch(f"tls-{name}.yaml", {"kind": "Service", "name": f"^{name}$"}, ports) for name in services]
    # Prometheus finds pods by address, and no certificate names those.
    unnamed = {"insecureSkipVerify": True}
    return patches + _monitor(
        spec,
        "tls-monitor.yaml",
        {"op": "add", "path": f"{_MONITORED}/scheme", "value": "https"},
        {"op": "add", "path": f"{_MONITORED}/tlsConfig", "value": unnamed},
    )
