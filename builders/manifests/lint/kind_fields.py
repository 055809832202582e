"""Fields of workloads, Services and volumes that go together or exclude each other, as the API server checks them.

Source: kubernetes.io/docs/reference/kubernetes-api, each kind's own page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from builders.manifests.lint import formats
from builders.manifests.lint.objects import Finding, KubeObject, ObjectSet, at, mapping, number, refused, rows, words
from builders.manifests.lint.quantity import parse_quantity

_NO_VOLUMES = {
    "capacity", "accessModes", "persistentVolumeReclaimPolicy", "storageClassName", "mountOptions", "volumeMode",
    "nodeAffinity", "claimRef", "volumeAttributesClassName",
}  # fmt: skip
_METRICS = {
    "Resource": "resource", "Pods": "pods", "Object": "object", "External": "external",
    "ContainerResource": "containerResource",
}  # fmt: skip


def kinds(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        if (rule := _OF.get(item.kind)) is not None:
            yield from rule(item)


def _deployment(item: KubeObject) -> Iterator[Finding]:
    least, deadline = (
        number(item.data, "spec.minReadySeconds", 0),
        number(item.data, "spec.progressDeadlineSeconds", 600),
    )
    if least >= deadline:
        expected = f"less than progressDeadlineSeconds, which is {deadline}"
        yield refused(item, "spec.minReadySeconds", str(least), expected)
    update = "spec.strategy.rollingUpdate"
    yield from _at_most_all(item, f"{update}.maxUnavailable")
    yield from _selector(item)


def _at_most_all(item: KubeObject, path: str) -> Iterator[Finding]:
    share = str(at(item.data, path))
    if share.endswith("%") and share[:-1].isdigit() and int(share[:-1]) > 100:
        yield refused(item, path, share, "100% at most")


def _selector(item: KubeObject) -> Iterator[Finding]:
    selector = mapping(item.data, "spec.selector")
    if not mapping(selector, "matchLabels") and not rows(selector, "matchExpressions"):
        yield refused(item, "spec.selector", "one that selects everything", "labels of the pods")


def _stateful_set(item: KubeObject) -> Iterator[Finding]:
    update = mapping(item.data, "spec.updateStrategy")
    if update.get("type") == "OnDelete" and update.get("rollingUpdate") is not None:
        yield refused(item, "spec.updateStrategy", "OnDelete with rollingUpdate", "one of them")
    for index, row in enumerate(rows(item.data, "spec.volumeClaimTemplates")):
        yield from _claim_at(item, row, f"spec.volumeClaimTemplates[{index}].spec")
    yield from _selector(item)


def _claim(item: KubeObject) -> Iterator[Finding]:
    yield from _claim_at(item, item.data, "spec")


def _claim_at(item: KubeObject, data: Mapping[str, Any], where: str) -> Iterator[Finding]:
    modes, size = words(data, "spec.accessModes"), mapping(data, "spec.resources.requests").get("storage")
    yield from _modes(item, f"{where}.accessModes", modes)
    if size is None or parse_quantity(size) == 0:
        yield refused(item, f"{where}.resources.requests.storage", str(size or "nothing"), "a size")


def _modes(item: KubeObject, where: str, modes: list[str]) -> Iterator[Finding]:
    if not modes:
        yield refused(item, where, "nothing", "at least one access mode")
    if "ReadWriteOncePod" in modes and len(modes) > 1:
        yield refused(item, where, ", ".join(modes), "ReadWriteOncePod alone")


def _cron_job(item: KubeObject) -> Iterator[Finding]:
    policy = at(item.data, "spec.jobTemplate.spec.template.spec.restartPolicy")
    if policy not in ("Never", "OnFailure"):
        where = "spec.jobTemplate.spec.template.spec.restartPolicy"
        yield refused(item, where, str(policy), "Never or OnFailure: a Job must say")
    yield from _job_at(item, mapping(item.data, "spec.jobTemplate"), "spec.jobTemplate.spec")


def _job(item: KubeObject) -> Iterator[Finding]:
    yield from _job_at(item, item.data, "spec")


def _job_at(item: KubeObject, data: Mapping[str, Any], where: str) -> Iterator[Finding]:
    spec = mapping(data, "spec")
    indexed = spec.get("completionMode") == "Indexed"
    if indexed and spec.get("completions") is None:
        yield refused(item, f"{where}.completions", "nothing", "a number with completionMode Indexed")
    if spec.get("backoffLimitPerIndex") is not None and not indexed:
        yield refused(item, f"{where}.backoffLimitPerIndex", "a number", "none, or completionMode Indexed")
    if spec.get("maxFailedIndexes") is not None and spec.get("backoffLimitPerIndex") is None:
        yield refused(item, f"{where}.maxFailedIndexes", "a number", "none, or backoffLimitPerIndex too")
    if spec.get("selector") and not spec.get("manualSelector"):
        yield refused(item, f"{where}.selector", "one", "none: the server makes it")
    if "successPolicy" in spec and not rows(spec, "successPolicy.rules"):
        yield refused(item, f"{where}.successPolicy.rules", "none", "at least one rule")
    if spec.get("podFailurePolicy") and at(spec, "template.spec.restartPolicy") != "Never":
        got = str(at(spec, "template.spec.restartPolicy"))
        yield refused(item, f"{where}.template.spec.restartPolicy", got, "Never with podFailurePolicy")
    for index, row in enumerate(rows(spec, "podFailurePolicy.rules")):
        path, exits = f"{where}.podFailurePolicy.rules[{index}]", mapping(row, "onExitCodes")
        if bool(exits) == bool(row.get("onPodConditions")):
            yield refused(item, path, "both or neither", "one of onExitCodes and onPodConditions")
        boxes = [
            box.get("name") for key in ("containers", "initContainers") for box in rows(spec, f"template.spec.{key}")
        ]
        if exits.get("containerName") and exits["containerName"] not in boxes:
            got = str(exits["containerName"])
            yield refused(item, f"{path}.onExitCodes.containerName", got, "a container of the template")
        if exits.get("operator") == "In" and 0 in (exits.get("values") or []):
            yield refused(item, f"{path}.onExitCodes.values", "0", "codes of failures")


def _service(item: KubeObject) -> Iterator[Finding]:
    spec = mapping(item.data, "spec")
    kind, ports = spec.get("type") or "ClusterIP", rows(spec, "ports")
    if kind == "ExternalName" and not formats.is_dns_name(str(spec.get("externalName") or "").rstrip(".")):
        yield refused(item, "spec.externalName", str(spec.get("externalName")), "a DNS name with type ExternalName")
    if kind != "ExternalName" and not ports and spec.get("clusterIP") != "None":
        yield refused(item, "spec.ports", "none", "at least one port")
    if kind == "ClusterIP":
        for index, row in enumerate(ports):
            if row.get("nodePort"):
                yield refused(item, f"spec.ports[{index}].nodePort", str(row["nodePort"]), "none with type ClusterIP")
        if spec.get("externalTrafficPolicy") and not spec.get("externalIPs"):
            yield refused(item, "spec.externalTrafficPolicy", "one", "none: nothing comes from outside to ClusterIP")
    if kind != "LoadBalancer" and spec.get("loadBalancerSourceRanges"):
        yield refused(item, "spec.loadBalancerSourceRanges", f"type {kind}", "type LoadBalancer")
    if spec.get("healthCheckNodePort") and (kind, spec.get("externalTrafficPolicy")) != ("LoadBalancer", "Local"):
        expected = "none, or type LoadBalancer with externalTrafficPolicy Local"
        yield refused(item, "spec.healthCheckNodePort", str(spec["healthCheckNodePort"]), expected)
    if spec.get("clusterIP") == "None" and kind in ("NodePort", "LoadBalancer"):
        yield refused(item, "spec.clusterIP", f"None with type {kind}", "type ClusterIP")
    if spec.get("sessionAffinityConfig") and spec.get("sessionAffinity") != "ClientIP":
        yield refused(item, "spec.sessionAffinityConfig", "no affinity", "sessionAffinity: ClientIP")
    for path, found in (
        ("spec.ipFamilies", words(spec, "ipFamilies")),
        ("spec.ports", [f"{row.get('port')}/{row.get('protocol') or 'TCP'}" for row in ports]),
        ("spec.ports", [str(row["nodePort"]) for row in ports if row.get("nodePort")]),
    ):
        if len(set(found)) < len(found):
            yield refused(item, path, ", ".join(found), "each once")


def _ingress(item: KubeObject) -> Iterator[Finding]:
    if not rows(item.data, "spec.rules") and not mapping(item.data, "spec.defaultBackend"):
        yield refused(item, "spec", "neither rules nor defaultBackend", "one of them")
    backends = [("spec.defaultBackend", mapping(item.data, "spec.defaultBackend"))]
    for index, rule in enumerate(rows(item.data, "spec.rules")):
        where = f"spec.rules[{index}]"
        if "http" in rule and not rows(rule, "http.paths"):
            yield refused(item, f"{where}.http.paths", "none", "at least one path")
        for place, row in enumerate(rows(rule, "http.paths")):
            path = str(row.get("path") or "")
            if row.get("pathType") in ("Exact", "Prefix") and (not path.startswith("/") or "//" in path):
                expected = "a path that begins with / and has no empty part"
                yield refused(item, f"{where}.http.paths[{place}].path", path or "nothing", expected)
            backends.append((f"{where}.http.paths[{place}].backend", mapping(row, "backend")))
    for where, backend in backends:
        port = mapping(backend, "service.port")
        if "service" in backend and bool(port.get("name")) == bool(port.get("number")):
            yield refused(item, f"{where}.service.port", "both or neither", "name or number")
        if (backend or "paths" in where) and ("service" in backend) == ("resource" in backend):
            yield refused(item, where, "both or neither", "service or resource")


def _volume(item: KubeObject) -> Iterator[Finding]:
    sources = sorted(set(mapping(item.data, "spec")) - _NO_VOLUMES)
    if len(sources) != 1:
        yield refused(item, "spec", ", ".join(sources) or "no kind of volume", "one kind of volume")
    modes, size = words(item.data, "spec.accessModes"), mapping(item.data, "spec.capacity").get("storage")
    if size is None or parse_quantity(size) == 0:
        yield refused(item, "spec.capacity.storage", str(size or "nothing"), "a size")
    yield from _modes(item, "spec.accessModes", modes)


def _autoscaler(item: KubeObject) -> Iterator[Finding]:
    metrics = rows(item.data, "spec.metrics")
    for index, row in enumerate(metrics):
        given = sorted(set(row) & set(_METRICS.values()))
        wanted = _METRICS.get(str(row.get("type")), "")
        if given != [wanted] and wanted:
            got = f"{', '.join(given) or 'nothing'} with type {row['type']}"
            yield refused(item, f"spec.metrics[{index}]", got, f"{wanted} alone")
        target = mapping(row, f"{wanted}.target")
        if wanted and target and not set(target) & {"averageUtilization", "averageValue", "value"}:
            yield refused(item, f"spec.metrics[{index}].{wanted}.target", "no number", "a value of its type")
    for way in ("scaleUp", "scaleDown"):
        rules = mapping(item.data, f"spec.behavior.{way}")
        if "policies" in rules and not rows(rules, "policies"):
            yield refused(item, f"spec.behavior.{way}.policies", "none", "at least one policy")
    if at(item.data, "spec.minReplicas") == 0 and not {row.get("type") for row in metrics} & {"Object", "External"}:
        yield refused(item, "spec.minReplicas", "0", "an Object or External metric, which no pod must report")


def _budget(item: KubeObject) -> Iterator[Finding]:
    for key in ("minAvailable", "maxUnavailable"):
        yield from _at_most_all(item, f"spec.{key}")
    if at(item.data, "spec.minAvailable") is not None and at(item.data, "spec.maxUnavailable") is not None:
        yield refused(item, "spec", "both", "one of minAvailable and maxUnavailable")


def _policy(item: KubeObject) -> Iterator[Finding]:
    if len(types := words(item.data, "spec.policyTypes")) > 2:
        yield refused(item, "spec.policyTypes", ", ".join(types), "Ingress, Egress or both")
    for way, peers in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(rows(item.data, f"spec.{way}")):
            for place, row in enumerate(rows(rule, peers)):
                yield from _peer(item, f"spec.{way}[{index}].{peers}[{place}]", row)
            for place, row in enumerate(rows(rule, "ports")):
                last, where = row.get("endPort"), f"spec.{way}[{index}].ports[{place}].endPort"
                if last is not None and not isinstance(row.get("port"), int):
                    yield refused(item, where, str(last), "a number as port beside it")
                elif last is not None and last < row["port"]:
                    yield refused(item, where, str(last), f"{row['port']} or more")


def _peer(item: KubeObject, where: str, row: Mapping[str, Any]) -> Iterator[Finding]:
    block = mapping(row, "ipBlock")
    if not row or ("ipBlock" in row and len(row) > 1):
        yield refused(item, where, ", ".join(sorted(row)) or "nothing", "ipBlock alone, or selectors")
    if not block:
        return
    whole = formats.network(str(block.get("cidr")))
    if whole is None:
        yield refused(item, f"{where}.ipBlock.cidr", str(block.get("cidr")), "a CIDR, as 10.0.0.0/8")
    for text in words(block, "except"):
        part = formats.network(text)
        if part is None or (whole is not None and not _within(part, whole)):
            yield refused(item, f"{where}.ipBlock.except", text, f"a part of {block.get('cidr')}")


def _within(part: Any, whole: Any) -> bool:
    return part.version == whole.version and part != whole and bool(part.subnet_of(whole))


_OF: dict[str, Callable[[KubeObject], Iterator[Finding]]] = {
    "Deployment": _deployment, "StatefulSet": _stateful_set, "DaemonSet": _selector, "ReplicaSet": _selector,
    "PersistentVolumeClaim": _claim, "PersistentVolume": _volume, "CronJob": _cron_job, "Job": _job,
    "Service": _service, "Ingress": _ingress, "HorizontalPodAutoscaler": _autoscaler,
    "PodDisruptionBudget": _budget, "NetworkPolicy": _policy,
}  # fmt: skip
