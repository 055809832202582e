"""What pods ask of a node: quantities, devices, memory that counts twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from builders.manifests.lint.objects import Finding, ObjectSet, at, mapping, rows
from builders.manifests.lint.quantity import parse_quantity

_UNITS = "a number with one of m, k, M, G, T, Ki, Mi, Gi, Ti"


def quantities(objects: ObjectSet) -> Iterator[Finding]:
    """An API server refuses these; no schema does, because to it a quantity is a string."""
    for title, path, value in written_quantities(objects):
        number = parse_quantity(value)
        if number is None or number < 0:
            yield Finding("quantity", title, path, repr(value), _UNITS, "write for example 500m or 16Gi")
        elif path.endswith((".memory", ".storage", "sizeLimit")) and str(value).endswith("m"):
            fix = "m means a thousandth; write Mi"
            yield Finding("quantity", title, path, f"{value}, which is {number} bytes", "whole bytes", fix)


def written_quantities(objects: ObjectSet) -> Iterator[tuple[str, str, object]]:
    for pod in objects.pods():
        for path, container in [*pod.containers(), (pod.path, pod.spec)]:
            for kind in ("requests", "limits"):
                for resource, value in mapping(container, f"resources.{kind}").items():
                    yield pod.owner.title, f"{path}.resources.{kind}.{resource}", value
        for name, volume in pod.volumes().items():
            if at(volume, "emptyDir.sizeLimit") is not None:
                yield pod.owner.title, f"{pod.path}.volumes[{name}].sizeLimit", at(volume, "emptyDir.sizeLimit")
    for item in objects.of("PersistentVolumeClaim", "PersistentVolume"):
        for path in ("spec.resources.requests", "spec.capacity"):
            for resource, value in mapping(item.data, path).items():
                yield item.title, f"{path}.{resource}", value
    for scaler in objects.of("HorizontalPodAutoscaler"):
        for index, metric in enumerate(rows(scaler.data, "spec.metrics")):
            target = next(
                (mapping(metric, f"{kind}.target") for kind in ("pods", "object", "external") if kind in metric), {}
            )
            for key in ("averageValue", "value"):
                if key in target:
                    yield scaler.title, f"spec.metrics[{index}].target.{key}", target[key]


def devices(objects: ObjectSet) -> Iterator[Finding]:
    """Extended resources, GPUs among them: whole numbers, and a request only together with an equal limit."""
    for pod in objects.pods():
        for path, container in pod.containers():
            requests, limits = mapping(container, "resources.requests"), mapping(container, "resources.limits")
            for name in sorted({*requests, *limits}):
                if "/" not in name or name.startswith("kubernetes.io/"):
                    continue
                asked, limit, where = requests.get(name), limits.get(name), f"{path}.resources.limits.{name}"
                if limit is None or (asked is not None and parse_quantity(asked) != parse_quantity(limit)):
                    got, expected = f"request {asked}, limit {limit}", "both the same: a device is never overcommitted"
                    yield Finding(
                        "gpu-request", pod.owner.title, where, got, expected, "set the limit, and the same request"
                    )
                elif (number := parse_quantity(limit)) is None or number % 1 or number < 0:
                    fix = "share a GPU by MIG or time-slicing, which have resource names of their own"
                    yield Finding("gpu-request", pod.owner.title, where, str(limit), "a whole number of devices", fix)


def requests_within_limits(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        for path, container in [*pod.containers(), (pod.path, pod.spec)]:
            limits = mapping(container, "resources.limits")
            for name, asked in mapping(container, "resources.requests").items():
                low, high = parse_quantity(asked), parse_quantity(limits.get(name, asked))
                if low is not None and high is not None and low > high:
                    got = f"request {asked} over limit {limits[name]}"
                    where = f"{path}.resources.requests.{name}"
                    yield Finding(
                        "request-over-limit", pod.owner.title, where, got, "at most the limit", "raise the limit"
                    )


def memory_is_bounded(objects: ObjectSet) -> Iterator[Finding]:
    """A container without a memory limit takes its neighbours down with it. A limit alone is also the request."""
    for pod in objects.pods():
        if "memory" in mapping(pod.spec, "resources.limits"):
            continue  # of all its containers together
        for path, container in pod.containers():
            if "memory" not in mapping(container, "resources.limits"):
                where, fix = f"{path}.resources.limits.memory", "measure it under load, and add a margin"
                yield Finding("memory-limit", pod.owner.title, where, "nothing", "a limit", fix)


def memory_volumes(objects: ObjectSet) -> Iterator[Finding]:
    """A Memory volume without a size may fill the node; with one, its pages count against the container's limit."""
    for pod in objects.pods():
        memory = {n: v for n, v in pod.volumes().items() if at(v, "emptyDir.medium") == "Memory"}
        for name, volume in memory.items():
            if at(volume, "emptyDir.sizeLimit") is None:
                where = f"{pod.path}.volumes[{name}].emptyDir.sizeLimit"
                fix = "set sizeLimit, and count it in the container's memory limit"
                yield Finding("memory-volume", pod.owner.title, where, "nothing", "a size", fix)
        for path, container in pod.containers():
            mounted = {str(mount.get("name")) for mount in rows(container, "volumeMounts")}
            sizes = [parse_quantity(at(memory[name], "emptyDir.sizeLimit")) for name in mounted & memory.keys()]
            total = sum((size for size in sizes if size is not None), start=Decimal(0))
            limit = parse_quantity(
                {**mapping(pod.spec, "resources.limits"), **mapping(container, "resources.limits")}.get("memory")
            )
            if sizes and (limit is None or limit <= total):
                got = f"limit {limit or 'none'} with Memory volumes of {total} bytes"
                fix = "raise the limit by the size of the volumes: their pages are the container's memory"
                where = f"{path}.resources.limits.memory"
                yield Finding("memory-volume", pod.owner.title, where, got, "more than the volumes", fix)


def volume_sizes(objects: ObjectSet) -> Iterator[Finding]:
    """An emptyDir without a size fills the node's disk, and the kubelet then evicts whom it likes."""
    for pod in objects.pods():
        for name, volume in pod.volumes().items():
            empty = volume.get("emptyDir", False)
            if empty is not False and not mapping(volume, "emptyDir").get("sizeLimit") and not _in_memory(volume):
                where = f"{pod.path}.volumes[{name}].emptyDir.sizeLimit"
                yield Finding("volume-size", pod.owner.title, where, "nothing", "a size", "set sizeLimit")


def _in_memory(volume: Mapping[str, Any]) -> bool:
    return bool(at(volume, "emptyDir.medium") == "Memory")
