"""Values that an API server refuses and no schema does: names, labels, ranges, fixed words, things given twice.

Sources: kubernetes.io/docs/concepts/overview/working-with-objects (names, labels) and the API reference of each field.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from builders.manifests.lint.objects import PROBES, Finding, KubeObject, ObjectSet, at, mapping, pods_of, rows, words

_LABEL = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_LABELLED_KINDS = ("Service", "Namespace")  # their names are DNS labels, for DNS is where they stand

# Words of a fixed list. `[]` stands for every item of a list; paths of `_POD_WORDS` begin at a pod's spec.
_PROTOCOLS, _OPERATORS = ("TCP", "UDP", "SCTP"), ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
_POD_WORDS: dict[str, tuple[str, ...]] = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "preemptionPolicy": ("PreemptLowerPriority", "Never"),
    "containers[].imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "initContainers[].imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "containers[].terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
    "containers[].ports[].protocol": _PROTOCOLS,
    "topologySpreadConstraints[].whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "tolerations[].effect": ("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    "tolerations[].operator": ("", "Exists", "Equal", "Lt", "Gt"),
    "securityContext.seccompProfile.type": ("RuntimeDefault", "Unconfined", "Localhost"),
    "containers[].securityContext.seccompProfile.type": ("RuntimeDefault", "Unconfined", "Localhost"),
    "securityContext.fsGroupChangePolicy": ("OnRootMismatch", "Always"),
    **{f"containers[].{probe}.httpGet.scheme": ("HTTP", "HTTPS") for probe in PROBES},
    "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[]."
    "matchExpressions[].operator": _OPERATORS,
}
_ACCESS = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("Service", "spec.type"): ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    ("Service", "spec.sessionAffinity"): ("ClientIP", "None"),
    ("Service", "spec.ports[].protocol"): _PROTOCOLS,
    ("Service", "spec.externalTrafficPolicy"): ("Cluster", "Local"),
    ("NetworkPolicy", "spec.ingress[].ports[].protocol"): _PROTOCOLS,
    ("NetworkPolicy", "spec.egress[].ports[].protocol"): _PROTOCOLS,
    ("NetworkPolicy", "spec.policyTypes[]"): ("Ingress", "Egress"),
    ("Deployment", "spec.strategy.type"): ("RollingUpdate", "Recreate"),
    ("StatefulSet", "spec.updateStrategy.type"): ("RollingUpdate", "OnDelete"),
    ("StatefulSet", "spec.podManagementPolicy"): ("OrderedReady", "Parallel"),
    ("CronJob", "spec.concurrencyPolicy"): ("Allow", "Forbid", "Replace"),
    ("Job", "spec.completionMode"): ("NonIndexed", "Indexed"),
    ("PersistentVolumeClaim", "spec.accessModes[]"): _ACCESS,
    ("PersistentVolumeClaim", "spec.volumeMode"): ("Filesystem", "Block"),
    ("PersistentVolume", "spec.accessModes[]"): _ACCESS,
    ("PersistentVolume", "spec.persistentVolumeReclaimPolicy"): ("Retain", "Delete", "Recycle"),
    ("PodDisruptionBudget", "spec.unhealthyPodEvictionPolicy"): ("AlwaysAllow", "IfHealthyBudget"),
    ("HorizontalPodAutoscaler", "spec.metrics[].type"): (
        "Resource", "Pods", "Object", "External", "ContainerResource",
    ),
    ("Ingress", "spec.rules[].http.paths[].pathType"): ("Exact", "Prefix", "ImplementationSpecific"),
}  # fmt: skip

# The least that a number may be; ports have a greatest as well.
_POD_LEAST = {"terminationGracePeriodSeconds": 0, "activeDeadlineSeconds": 1, "topologySpreadConstraints[].maxSkew": 1}
_LEAST = {
    ("Deployment", "spec.replicas"): 0, ("Deployment", "spec.minReadySeconds"): 0,
    ("Deployment", "spec.revisionHistoryLimit"): 0, ("Deployment", "spec.progressDeadlineSeconds"): 1,
    ("StatefulSet", "spec.replicas"): 0, ("ReplicaSet", "spec.replicas"): 0,
    ("Job", "spec.backoffLimit"): 0, ("Job", "spec.completions"): 0, ("Job", "spec.parallelism"): 0,
    ("Job", "spec.ttlSecondsAfterFinished"): 0, ("Job", "spec.activeDeadlineSeconds"): 0,
    ("HorizontalPodAutoscaler", "spec.maxReplicas"): 1, ("HorizontalPodAutoscaler", "spec.minReplicas"): 0,
}  # fmt: skip
_PROBE_LEAST = {
    "initialDelaySeconds": 0, "timeoutSeconds": 1, "periodSeconds": 1, "successThreshold": 1, "failureThreshold": 1,
}  # fmt: skip


def labels(objects: ObjectSet) -> Iterator[Finding]:
    """Keys and values of labels, and of what selects by them."""
    for item in objects.objects:
        places = [("metadata.labels", item.labels)]
        places += [(f"{pod.path}.nodeSelector", mapping(pod.spec, "nodeSelector")) for pod in pods_of(item)]
        places += [(f"{pod.path} labels", dict(pod.labels)) for pod in pods_of(item)]
        for path, found in places:
            for key, value in found.items():
                if not _is_key(str(key)):
                    yield _value(
                        item, path, f"the key {key}", "letters, digits, `-`, `_`, `.`, at most 63, after a domain"
                    )
                if not isinstance(value, str) or len(value) > 63 or not _LABEL.fullmatch(value):
                    yield _value(
                        item, f"{path}.{key}", repr(value), "text of at most 63 letters, digits, `-`, `_`, `.`"
                    )


def _is_key(key: str) -> bool:
    domain, slash, name = key.rpartition("/")
    right = not slash or (len(domain) <= 253 and _DNS_NAME.fullmatch(domain) is not None)
    return right and 0 < len(name) <= 63 and _LABEL.fullmatch(name) is not None


def names(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        name = str(at(item.data, "metadata.name") or "")
        if not name and not at(item.data, "metadata.generateName"):
            yield _value(item, "metadata.name", "no name", "a name")
        if name and "rbac.authorization.k8s.io" not in item.api_version and not _is_name(item, name):
            yield _value(item, "metadata.name", name, "lower-case letters, digits and `-`, as DNS takes them")
        for pod in pods_of(item):
            boxes = [(f"{path}.name", str(box.get("name"))) for path, box in pod.containers()]
            for path, found in (*boxes, *((f"{pod.path}.volumes[{name}]", name) for name in pod.volumes())):
                if len(found) > 63 or not _DNS_LABEL.fullmatch(found):
                    yield _value(item, path, found, "lower-case letters, digits and `-`, at most 63")
            yield from _twice(item, f"{pod.path}.volumes", [str(row.get("name")) for row in rows(pod.spec, "volumes")])
        yield from _ports(item)


def _is_name(item: KubeObject, name: str) -> bool:
    if item.kind in _LABELLED_KINDS:
        return len(name) <= 63 and _DNS_LABEL.fullmatch(name) is not None
    return len(name) <= 253 and _DNS_NAME.fullmatch(name) is not None


def _ports(item: KubeObject) -> Iterator[Finding]:
    found = [(f"{path}.ports", rows(box, "ports"), 15) for pod in pods_of(item) for path, box in pod.containers()]
    if item.kind == "Service":
        found.append(("spec.ports", rows(item.data, "spec.ports"), 63))  # these are DNS labels
    for path, ports, longest in found:
        for index, row in enumerate(ports):
            name, rule = row.get("name"), _PORT_NAME if longest == 15 else _DNS_LABEL
            if name is not None and (len(str(name)) > longest or not rule.fullmatch(str(name))):
                got = f"{path}[{index}].name"
                yield _value(
                    item, got, str(name), f"lower-case letters, digits and `-`, at most {longest}, with a letter"
                )
            for key in ("containerPort", "port", "targetPort", "nodePort", "hostPort"):
                number = row.get(key)
                if isinstance(number, int) and not 0 < number < 65536 and (key, number) not in (("nodePort", 0),):
                    yield _value(item, f"{path}[{index}].{key}", str(number), "1 to 65535")


def fixed_words(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        tables: list[tuple[str, Any, str, tuple[str, ...]]] = [
            ("", item.data, path, allowed) for (kind, path), allowed in _WORDS.items() if kind == item.kind
        ]
        for pod in pods_of(item):
            tables += [(f"{pod.path}.", pod.spec, path, allowed) for path, allowed in _POD_WORDS.items()]
        for start, data, path, allowed in tables:
            for where, value in _at_all(data, path):
                if isinstance(value, str) and value not in allowed:
                    yield _value(item, start + where, value, f"one of {', '.join(filter(None, allowed))}")


def ranges(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        tables = [("", item.data, path, least) for (kind, path), least in _LEAST.items() if kind == item.kind]
        for pod in pods_of(item):
            tables += [(f"{pod.path}.", pod.spec, path, least) for path, least in _POD_LEAST.items()]
            for path, box in pod.containers():
                tables += [
                    (f"{path}.", box, f"{probe}.{key}", least)
                    for probe in PROBES
                    for key, least in _PROBE_LEAST.items()
                ]
                for probe in ("startupProbe", "livenessProbe"):
                    if at(box, f"{probe}.successThreshold") not in (None, 1):
                        got = str(at(box, f"{probe}.successThreshold"))
                        yield _value(item, f"{path}.{probe}.successThreshold", got, "1: more is for readiness alone")
        for start, data, path, least in tables:
            for where, value in _at_all(data, path):
                if isinstance(value, int) and value < least:
                    yield _value(item, start + where, str(value), f"{least} or more")


def claims(objects: ObjectSet) -> Iterator[Finding]:
    for claim in objects.of("PersistentVolumeClaim"):
        if "storage" not in mapping(claim.data, "spec.resources.requests"):
            yield _value(claim, "spec.resources.requests.storage", "nothing", "a size")
        if not words(claim.data, "spec.accessModes"):
            yield _value(claim, "spec.accessModes", "nothing", "at least one access mode")


def _at_all(data: Any, path: str, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value at a path, `[]` standing for each item of a list; and where it is."""
    head, _, rest = path.partition(".")
    each = head.endswith("[]")
    key = head.removesuffix("[]")
    if not isinstance(data, Mapping) or key not in data:
        return
    here = f"{where}.{key}" if where else key
    found = data[key]
    many = found if each and isinstance(found, list) else [] if each else [found]
    for index, value in enumerate(many):
        place = f"{here}[{index}]" if each else here
        if rest:
            yield from _at_all(value, rest, place)
        else:
            yield place, value


def _twice(item: KubeObject, path: str, found: list[str]) -> Iterator[Finding]:
    for name, count in Counter(found).items():
        if count > 1:
            yield _value(item, path, f"{count} named {name}", "each name once")


def _value(item: KubeObject, path: str, got: str, expected: str) -> Finding:
    return Finding("value", item.title, path, got, expected, "correct it: the API server refuses this")
