"""What stands around the pods: the Namespace, the way in from outside, monitors and alerts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml

from builders.manifests.patches import Patch, namespace_of, replace
from builders.manifests.render import K8S
from builders.manifests.scaling import pods_of
from builders.manifests.sizing import nodes_of
from builders.spec import DeploymentSpec
from builders.spec.kubernetes import GatewaySlice

DASHBOARD = "dashboard.json"
# As the rules in components/monitoring select: pods of the overlays that are written by hand.
_PODS = 'namespace="trireme",pod=~"serving-.*"'
_DEPLOYMENT = 'namespace="trireme",deployment="serving"'


def creates_namespace(spec: DeploymentSpec) -> bool:
    """A namespace that the spec names is somebody's already, unless it says otherwise."""
    chosen = spec.kubernetes.create_namespace
    return spec.kubernetes.namespace is None if chosen is None else chosen


def gateway(spec: DeploymentSpec) -> list[Patch]:
    """Class, host names and certificate of the Gateway and its routes."""
    chosen = spec.kubernetes.gateway
    if chosen is None:
        return []
    reach = [
        replace("/spec/gatewayClassName", chosen.class_name),
        replace("/spec/listeners/0/hostname", chosen.hostname),
        replace("/spec/listeners/0/tls/certificateRefs/0/name", chosen.tls_secret),
    ]
    hosts = [replace("/spec/hostnames", [chosen.hostname])]
    routes = [Patch("route.yaml", {"kind": "GRPCRoute", "name": "serving"}, hosts)]
    if chosen.http_hostname is not None:
        reach.append({"op": "add", "path": "/spec/listeners/-", "value": _listener(chosen)})
        routes.append(Patch("http-route.yaml", None, _http_route(chosen.http_hostname)))
    return [Patch("gateway.yaml", {"kind": "Gateway", "name": "serving"}, reach), *routes]


def _listener(chosen: GatewaySlice) -> dict[str, Any]:
    """Of HTTP. Written out as the component's is, so that a second manager's apply would not differ."""
    certificate = {"group": "", "kind": "Secret", "name": chosen.tls_secret}
    return {
        "name": "http",
        "protocol": "HTTPS",
        "port": 443,
        "hostname": chosen.http_hostname,
        "tls": {"mode": "Terminate", "certificateRefs": [certificate]},
        "allowedRoutes": {"namespaces": {"from": "Same"}},
    }


def _http_route(hostname: str) -> dict[str, Any]:
    """Everything: the pods' gateway has the one route table."""
    parent = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "serving", "sectionName": "http"}
    backend = {"group": "", "kind": "Service", "name": "serving", "port": 8080, "weight": 1}
    rule = {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": [backend]}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "serving"},
        "spec": {"parentRefs": [parent], "hostnames": [hostname], "rules": [rule]},
    }


def monitors(spec: DeploymentSpec) -> list[Patch]:
    """Labels that Prometheus selects monitors by, and alerts on this deployment's pods alone."""
    if not spec.kubernetes.monitoring:
        return []
    rules = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
    deployment = f'namespace="{namespace_of(spec)}",deployment="{spec.name}-serving"'
    absent = _no_leader(spec) if nodes_of(spec) > 1 else None
    changed = [
        replace(
            f"/spec/groups/0/rules/{index}/expr",
            absent if absent and _DEPLOYMENT in rule["expr"] else _of(rule["expr"], pods_of(spec), deployment),
        )
        for index, rule in enumerate(rules)
    ]
    patches = [Patch("rules.yaml", {"kind": "PrometheusRule", "name": "serving"}, changed)]
    for kind in ("PodMonitor", "PrometheusRule") if spec.kubernetes.monitoring_labels else ():
        labels = {"op": "add", "path": "/metadata/labels", "value": dict(spec.kubernetes.monitoring_labels)}
        patches.append(Patch(f"{kind.lower()}-labels.yaml", {"kind": kind, "name": "serving"}, [labels]))
    return patches


def _no_leader(spec: DeploymentSpec) -> str:
    """What says of groups that no pod is ready: there is no metric of a LeaderWorkerSet."""
    ready = f'sum by (namespace) (kube_pod_status_ready{{{pods_of(spec)},condition="true"}}) == 0'
    return f'label_replace({ready}, "deployment", "{spec.name}-serving", "", "")'


def dashboard(spec: DeploymentSpec) -> str:
    """The component's, under an identity of its own: Grafana keeps one dashboard for each uid and title."""
    found = json.loads((K8S / "components" / "monitoring" / DASHBOARD).read_text())
    place = f"{namespace_of(spec)}/{spec.name}"
    found["uid"] = f"trireme-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
    found["title"] = f"Trireme: {place}"
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _of(expression: str, pods: str, deployment: str) -> Any:
    return expression.replace(_PODS, pods).replace(_DEPLOYMENT, deployment)
