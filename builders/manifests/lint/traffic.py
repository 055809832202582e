"""How requests find pods: selectors, ports, policies, routes, probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from builders.manifests.lint.objects import (
    PROBES,
    Finding,
    KubeObject,
    ObjectSet,
    Pod,
    at,
    mapping,
    matches,
    number,
    rows,
)


def workload_selectors(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.of("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
        selector, labels = mapping(item.data, "spec.selector"), mapping(item.data, "spec.template.metadata.labels")
        if not selector or not matches(selector, labels):
            got, fix = f"{selector} against labels {labels}", "give the template the labels of the selector"
            yield Finding("selector", item.title, "spec.selector", got, "a selector that its own pods match", fix)


def services(objects: ObjectSet) -> Iterator[Finding]:
    for service in objects.of("Service"):
        selector, ports = mapping(service.data, "spec.selector"), rows(service.data, "spec.ports")
        yield from _service_ports(service)
        if not selector:
            continue  # its endpoints are written by hand
        pods = objects.selected(selector, service.namespace)
        if not pods:
            yield from _nobody(objects, service, "spec.selector", selector, "it has no endpoints")
            continue
        for index, row in enumerate(ports):
            target = row.get("targetPort", row.get("port"))
            if not any(_listens(pod, target) for pod in pods):
                where = f"spec.ports[{index}].targetPort"
                yield Finding("port", service.title, where, str(target), _ports_of(pods), "name a port of the pod")


def _nobody(objects: ObjectSet, item: KubeObject, path: str, selector: object, why: str) -> Iterator[Finding]:
    """Only where pods of that namespace are here, which it could have meant."""
    if any(pod.owner.namespace == item.namespace for pod in objects.pods()):
        got, expected = f"{selector}, which no pod here carries", f"labels of a pod: without one in the cluster {why}"
        yield Finding("not-here", item.title, path, got, expected, "correct the selector or the pods' labels")


def _service_ports(service: KubeObject) -> Iterator[Finding]:
    ports = rows(service.data, "spec.ports")
    names = Counter(row.get("name") for row in ports)
    if len(ports) > 1 and (None in names or max(names.values()) > 1):
        got = ", ".join(str(row.get("name")) for row in ports)
        yield Finding("port", service.title, "spec.ports", got, "a name of its own for each port", "name every port")


def _listens(pod: Pod, target: object) -> bool:
    if isinstance(target, int):
        return True  # a container's list of ports is for people: what listens is reached
    return target in pod.port_names


def _ports_of(pods: list[Pod]) -> str:
    names = sorted({name for pod in pods for name in pod.port_names})
    return f"one of the pods' ports ({', '.join(names) or 'none'})"


def container_ports(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        names = Counter(
            name for _, box in pod.containers() for name in {row.get("name") for row in rows(box, "ports")} - {None}
        )
        for name, count in names.items():
            if count > 1:
                got, where = f"{name} in {count} containers", f"{pod.path}.containers"
                expected = "a name of its own for each port: a Service takes the first"
                yield Finding("port-name", pod.owner.title, where, got, expected, "rename one of them")
        boxes = Counter(str(box.get("name")) for _, box in pod.containers())
        for name, count in boxes.items():
            if count > 1:
                got = f"{count} containers named {name}"
                yield Finding("name", pod.owner.title, f"{pod.path}.containers", got, "one", "rename one of them")


def probes(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        for path, container in pod.containers():
            for kind in PROBES:
                probe, where = mapping(container, kind), f"{path}.{kind}"
                port = at(probe, "httpGet.port") or at(probe, "tcpSocket.port")
                names = {row.get("name") for row in rows(container, "ports")}
                if isinstance(port, str) and port not in names and not port.isdigit():
                    expected = f"a port of the container ({', '.join(map(str, names)) or 'none'})"
                    yield Finding(
                        "port", pod.owner.title, where, port, expected, "name that port, or correct the probe"
                    )
                timeout, period = number(probe, "timeoutSeconds", 1), number(probe, "periodSeconds", 10)
                if probe and timeout > period:
                    got, fix = f"timeout {timeout} s every {period} s", "shorten the timeout or probe less often"
                    expected = "a timeout within the period: a program that hangs is found later than the period says"
                    yield Finding("probe", pod.owner.title, where, got, expected, fix)


def readiness(objects: ObjectSet) -> Iterator[Finding]:
    """Without it a pod is sent requests from the moment that its process exists."""
    for service in objects.of("Service"):
        if at(service.data, "spec.publishNotReadyAddresses"):
            continue
        for pod in objects.selected(mapping(service.data, "spec.selector") or {"": ""}, service.namespace):
            if not any("readinessProbe" in container for _, container in pod.containers()):
                where, fix = f"{pod.path}.containers", "probe what a client would ask"
                got = f"no readinessProbe behind Service/{service.name}"
                expected = "one: without it requests come from the moment that the process exists"
                yield Finding("probe", pod.owner.title, where, got, expected, fix)


def policies(objects: ObjectSet) -> Iterator[Finding]:
    for policy in objects.of("NetworkPolicy"):
        selector = mapping(policy.data, "spec.podSelector")
        pods = [p for p in objects.pods() if p.owner.namespace == policy.namespace and matches(selector, p.labels)]
        if selector and not pods:
            yield from _nobody(objects, policy, "spec.podSelector", selector, "it guards nothing")
            continue
        for index, rule in enumerate(rows(policy.data, "spec.ingress")):
            for row in rows(rule, "ports"):
                port = row.get("port")
                if isinstance(port, str) and pods and not any(port in pod.port_names for pod in pods):
                    where = f"spec.ingress[{index}].ports"
                    yield Finding("port", policy.title, where, port, _ports_of(pods), "name a port of the pods")


def routes(objects: ObjectSet) -> Iterator[Finding]:
    for route in objects.of("GRPCRoute", "HTTPRoute"):
        for index, rule in enumerate(rows(route.data, "spec.rules")):
            for row in rows(rule, "backendRefs"):
                where, name = f"spec.rules[{index}].backendRefs", str(row.get("name"))
                place = str(row.get("namespace") or route.namespace)
                service = objects.find("Service", name, place) if row.get("kind", "Service") == "Service" else None
                if service is None and any(item.namespace == place for item in objects.of("Service")):
                    expected = "a Service here: without it requests get 500"
                    yield Finding("not-here", route.title, where, name, expected, "correct the name")
                elif service is not None and row.get("port") not in {
                    port.get("port") for port in rows(service.data, "spec.ports")
                }:
                    expected = f"a port of Service/{name}"
                    yield Finding("port", route.title, where, str(row.get("port")), expected, "correct the port")
        for row in rows(route.data, "spec.parentRefs"):
            gateway = objects.find("Gateway", row.get("name"), route.namespace)
            section = row.get("sectionName")
            if gateway is not None and section not in {
                None,
                *(listener.get("name") for listener in rows(gateway.data, "spec.listeners")),
            }:
                expected = f"a listener of Gateway/{gateway.name}"
                yield Finding("missing-reference", route.title, "spec.parentRefs", str(section), expected, "correct it")
            if gateway is None and not row.get("namespace") and any(objects.of("Gateway")):
                got, expected = f"Gateway {row.get('name')}", "a Gateway here, or the namespace where it is"
                yield Finding("not-here", route.title, "spec.parentRefs", got, expected, "no request comes else")


def monitors(objects: ObjectSet) -> Iterator[Finding]:
    for monitor in objects.of("PodMonitor"):
        selector = mapping(monitor.data, "spec.selector")
        pods = [p for p in objects.pods() if p.owner.namespace == monitor.namespace and matches(selector, p.labels)]
        if mapping(monitor.data, "spec.namespaceSelector"):
            continue
        if not pods:
            yield from _nobody(objects, monitor, "spec.selector", selector, "nothing is measured")
        for index, row in enumerate(rows(monitor.data, "spec.podMetricsEndpoints")):
            if pods and row.get("port") and not any(row["port"] in pod.port_names for pod in pods):
                where = f"spec.podMetricsEndpoints[{index}].port"
                yield Finding(
                    "port", monitor.title, where, str(row["port"]), _ports_of(pods), "name a port of the pods"
                )
