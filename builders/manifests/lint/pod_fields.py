"""Fields of a pod that go together or exclude each other, as the API server checks them and no schema does.

Source: kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from builders.manifests.lint import formats
from builders.manifests.lint.objects import (
    PROBES,
    Finding,
    KubeObject,
    ObjectSet,
    Pod,
    at,
    mapping,
    number,
    refused,
    rows,
)

_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc")
_HOOKS = ("exec", "httpGet", "tcpSocket", "sleep")
_KEEPS_RUNNING = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "LeaderWorkerSet")
_PLAIN = ("cpu", "memory", "ephemeral-storage")
_GRACE_S = 30  # where nothing is said
_SPREAD = "topologySpreadConstraints"
_SELECTORS = ("podSelector", "namespaceSelector", "objectSelector", "labelSelector", "selector")


def pods(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        yield from _lifetime(pod)
        if not rows(pod.spec, "containers"):
            yield refused(pod.owner, f"{pod.path}.containers", "none", "at least one container")
        if pod.spec.get("dnsPolicy") == "None" and not at(pod.spec, "dnsConfig.nameservers"):
            where = f"{pod.path}.dnsConfig.nameservers"
            yield refused(pod.owner, where, "none with dnsPolicy None", "at least one")
        for name, volume in pod.volumes().items():
            kinds = sorted(set(volume) - {"name"})
            if len(kinds) > 1:
                yield refused(pod.owner, f"{pod.path}.volumes[{name}]", ", ".join(kinds), "one kind of volume")
            for index, row in enumerate(rows(volume, "projected.sources")):
                if len(row) != 1:
                    got, where = ", ".join(sorted(row)) or "nothing", f"{pod.path}.volumes[{name}].sources[{index}]"
                    yield refused(pod.owner, where, got, "one source")
            claim = mapping(volume, "ephemeral.volumeClaimTemplate.spec")
            if "ephemeral" in volume and not claim.get("accessModes"):
                yield refused(pod.owner, f"{pod.path}.volumes[{name}].ephemeral", "no accessModes", "at least one")
        yield from _host(pod)
        yield from _places(pod)
        for index, row in enumerate(rows(pod.spec, "tolerations")):
            yield from _toleration(pod, f"{pod.path}.tolerations[{index}]", row)
        yield from _seccomp(pod, f"{pod.path}.securityContext", pod.spec)


def _lifetime(pod: Pod) -> Iterator[Finding]:
    policy = pod.spec.get("restartPolicy")
    if pod.owner.kind in _KEEPS_RUNNING and policy not in (None, "Always"):
        yield refused(pod.owner, f"{pod.path}.restartPolicy", str(policy), "Always: the controller keeps pods running")
    if pod.owner.kind in _KEEPS_RUNNING[:4] and pod.spec.get("activeDeadlineSeconds") is not None:
        yield refused(pod.owner, f"{pod.path}.activeDeadlineSeconds", "a deadline", "none: this is for Jobs")


def _host(pod: Pod) -> Iterator[Finding]:
    if pod.spec.get("hostPID") and pod.spec.get("shareProcessNamespace"):
        yield refused(pod.owner, f"{pod.path}.shareProcessNamespace", "true with hostPID", "one of them")
    for path, box in pod.containers() if pod.spec.get("hostNetwork") else ():
        for index, row in enumerate(rows(box, "ports")):
            if row.get("hostPort") not in (None, 0, row.get("containerPort")):
                got, expected = str(row["hostPort"]), f"{row.get('containerPort')}: hostNetwork maps no ports"
                yield refused(pod.owner, f"{path}.ports[{index}].hostPort", got, expected)
    for key, most in (("nameservers", 3), ("searches", 32)):
        if len(found := at(pod.spec, f"dnsConfig.{key}") or []) > most:
            yield refused(pod.owner, f"{pod.path}.dnsConfig.{key}", str(len(found)), f"{most} at most")


def _places(pod: Pod) -> Iterator[Finding]:
    required = at(pod.spec, "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution")
    if required is not None and not rows(required, "nodeSelectorTerms"):
        where = f"{pod.path}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
        yield refused(pod.owner, where, "none", "at least one term")
    spread = [(row.get("topologyKey"), row.get("whenUnsatisfiable")) for row in rows(pod.spec, _SPREAD)]
    gates = [row.get("name") for row in rows(pod.spec, "schedulingGates")]
    for path, found in ((_SPREAD, spread), ("schedulingGates", gates)):
        if len(set(found)) < len(found):
            yield refused(pod.owner, f"{pod.path}.{path}", "the same twice", "each once")


def _toleration(pod: Pod, where: str, row: Mapping[str, Any]) -> Iterator[Finding]:
    operator = row.get("operator") or "Equal"
    if not row.get("key") and operator != "Exists":
        yield refused(pod.owner, f"{where}.operator", operator, "Exists, where there is no key")
    if operator == "Exists" and row.get("value"):
        yield refused(pod.owner, f"{where}.value", str(row["value"]), "none with Exists")
    if row.get("tolerationSeconds") is not None and row.get("effect") != "NoExecute":
        yield refused(pod.owner, f"{where}.effect", str(row.get("effect")), "NoExecute with tolerationSeconds")


def _seccomp(pod: Pod, where: str, data: Mapping[str, Any]) -> Iterator[Finding]:
    profile = mapping(data, "securityContext.seccompProfile")
    local = bool(profile.get("localhostProfile"))
    if profile and local != (profile.get("type") == "Localhost"):
        got = f"type {profile.get('type')}, localhostProfile {profile.get('localhostProfile')}"
        yield refused(pod.owner, f"{where}.seccompProfile", got, "localhostProfile with Localhost, and only there")


def containers(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        for path, box in pod.containers():
            if not box.get("image") and "image" not in box:
                yield refused(pod.owner, f"{path}.image", "none", "an image")
            yield from _environment(pod, path, box)
            yield from _probes(pod, path, box)
            yield from _hooks(pod, path, box)
            yield from _rights(pod, path, box)
            yield from _seccomp(pod, f"{path}.securityContext", box)
            for index, row in enumerate(rows(box, "volumeDevices")):
                kinds = set(pod.volumes().get(str(row.get("name")), {})) - {"name"}
                if kinds - {"persistentVolumeClaim", "ephemeral"}:
                    where, got = f"{path}.volumeDevices[{index}]", ", ".join(sorted(kinds))
                    yield refused(pod.owner, where, got, "a claim: other volumes are no devices")
            if rows(box, "restartPolicyRules") and not box.get("restartPolicy"):
                yield refused(pod.owner, f"{path}.restartPolicy", "none", "one, with restartPolicyRules")
            for kind in ("requests", "limits"):
                for name in mapping(box, f"resources.{kind}"):
                    if "/" not in str(name) and name not in _PLAIN and not str(name).startswith("hugepages-"):
                        expected = f"{', '.join(_PLAIN)}, hugepages-<size>, or a device's name with its domain"
                        yield refused(pod.owner, f"{path}.resources.{kind}.{name}", str(name), expected)


def _environment(pod: Pod, path: str, box: Mapping[str, Any]) -> Iterator[Finding]:
    for index, row in enumerate(rows(box, "env")):
        sources, where = sorted(mapping(row, "valueFrom")), f"{path}.env[{index}]"
        if row.get("value") and sources:
            yield refused(pod.owner, where, "value and valueFrom", "one of them")
        if "valueFrom" in row and len(sources) != 1:
            yield refused(pod.owner, f"{where}.valueFrom", ", ".join(sources) or "nothing", "one source")
    for index, row in enumerate(rows(box, "envFrom")):
        if len(sources := sorted(set(row) - {"prefix"})) != 1:
            got = ", ".join(sources) or "nothing"
            yield refused(pod.owner, f"{path}.envFrom[{index}]", got, "one of configMapRef and secretRef")


def _probes(pod: Pod, path: str, box: Mapping[str, Any]) -> Iterator[Finding]:
    for probe in PROBES:
        found, where = mapping(box, probe), f"{path}.{probe}"
        handlers = [handler for handler in _HANDLERS if found.get(handler) is not None]
        if "exec" in found and not at(found, "exec.command"):
            yield refused(pod.owner, f"{where}.exec.command", "nothing", "a command")
        if probe in box and box[probe] is not None and len(handlers) != 1:
            yield refused(pod.owner, where, ", ".join(handlers) or "no way to ask", f"one of {', '.join(_HANDLERS)}")
        if probe != "readinessProbe" and found.get("successThreshold") not in (None, 1):
            got = str(found["successThreshold"])
            yield refused(pod.owner, f"{where}.successThreshold", got, "1: more is for readiness alone")
        if probe == "readinessProbe" and found.get("terminationGracePeriodSeconds") is not None:
            yield refused(pod.owner, f"{where}.terminationGracePeriodSeconds", "a number", "none: nothing is ended")


def _hooks(pod: Pod, path: str, box: Mapping[str, Any]) -> Iterator[Finding]:
    for hook in ("postStart", "preStop"):
        found, where = mapping(box, f"lifecycle.{hook}"), f"{path}.lifecycle.{hook}"
        kinds = [kind for kind in _HOOKS if found.get(kind) is not None]
        if at(box, f"lifecycle.{hook}") is not None and len(kinds) != 1:
            yield refused(pod.owner, where, ", ".join(kinds) or "nothing", f"one of {', '.join(_HOOKS)}")
        grace = number(pod.spec, "terminationGracePeriodSeconds", _GRACE_S)
        if not 0 <= (seconds := number(found, "sleep.seconds", 0)) <= grace:
            expected = f"at most the grace period of {grace} s"
            yield refused(pod.owner, f"{where}.sleep.seconds", str(seconds), expected)


def _rights(pod: Pod, path: str, box: Mapping[str, Any]) -> Iterator[Finding]:
    own = mapping(box, "securityContext")
    if own.get("privileged") and own.get("allowPrivilegeEscalation") is False:
        where = f"{path}.securityContext.allowPrivilegeEscalation"
        yield refused(pod.owner, where, "false for a privileged container", "true or nothing")
    for index, row in enumerate(rows(box, "volumeMounts")):
        if row.get("mountPropagation") == "Bidirectional" and not own.get("privileged"):
            where = f"{path}.volumeMounts[{index}].mountPropagation"
            yield refused(pod.owner, where, "Bidirectional", "this for privileged containers alone")
        if row.get("subPath") and row.get("subPathExpr"):
            yield refused(pod.owner, f"{path}.volumeMounts[{index}]", "subPath and subPathExpr", "one of them")


def expressions(objects: ObjectSet) -> Iterator[Finding]:
    """matchExpressions, wherever they stand: an operator, and values where it takes them."""
    for item in objects.objects:
        if not _is_of_kubernetes(item):
            continue
        starts = [(key, item.data.get(key)) for key in ("spec", "webhooks")]
        for where, row, of_nodes in (found for key, data in starts for found in _expressions(data, key, False)):
            operator, values = str(row.get("operator")), row.get("values") or []
            allowed = ("In", "NotIn", "Exists", "DoesNotExist", *(("Gt", "Lt") if of_nodes else ()))
            if operator not in allowed:
                yield refused(item, f"{where}.operator", operator, f"one of {', '.join(allowed)}")
            elif operator in ("In", "NotIn") and not values:
                yield refused(item, f"{where}.values", "none", f"at least one with {operator}")
            elif operator in ("Exists", "DoesNotExist") and values:
                yield refused(item, f"{where}.values", str(values), f"none with {operator}")
            elif operator in ("Gt", "Lt") and [str(value).lstrip("-").isdigit() for value in values] != [True]:
                yield refused(item, f"{where}.values", str(values), f"one whole number with {operator}")
            if not formats.is_key(str(row.get("key") or row.get("scopeName") or "")):
                yield refused(item, f"{where}.key", str(row.get("key")), "a label's key")


def _is_of_kubernetes(item: KubeObject) -> bool:
    """Other projects' resources may have operators of their own."""
    group = item.api_version.rpartition("/")[0]
    known = "." not in group or group.endswith(".k8s.io") or item.kind == "LeaderWorkerSet"
    return known and item.kind != "CustomResourceDefinition"


def _expressions(data: Any, where: str, of_nodes: bool) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    if isinstance(data, Mapping):
        for key, part in data.items():
            here = f"{where}.{key}"
            if key == "matchExpressions" and isinstance(part, Sequence):
                for index, row in enumerate(row for row in part if isinstance(row, Mapping)):
                    yield f"{here}[{index}]", row, of_nodes
            else:
                inside = key in ("nodeSelectorTerms", "preference", "nodeSelector")
                yield from _expressions(part, here, inside or (of_nodes and key not in _SELECTORS))
    elif isinstance(data, list):
        for index, part in enumerate(data):
            yield from _expressions(part, f"{where}[{index}]", of_nodes)
