"""Values that an API server refuses and no schema does: names, labels, ranges, fixed words, things given twice.

The tables are in `tables`; what several fields decide together is in `pod_fields` and `kind_fields`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from builders.manifests.lint import formats, tables
from builders.manifests.lint.objects import PROBES, Finding, KubeObject, ObjectSet, at, mapping, pods_of, refused, rows

_LABELLED_KINDS = ("Service", "Namespace")  # their names are DNS labels, for DNS is where they stand
_LONGEST = {"CronJob": 52}  # its Jobs' names are longer by 11, and theirs become labels
_MOST_ANNOTATIONS = 256 * 1024
_KEY = "letters, digits, `-`, `_`, `.`, at most 63, after a domain"
_NAME = "lower-case letters, digits and `-`, at most 63"


def labels(objects: ObjectSet) -> Iterator[Finding]:
    """Keys and values of labels, and of what selects by them; keys of annotations, whose values may be anything."""
    for item in objects.objects:
        places = [("metadata.labels", item.labels), ("spec.selector.matchLabels", _selected(item))]
        if item.kind in ("Service", "ReplicationController"):
            places.append(("spec.selector", mapping(item.data, "spec.selector")))
        for pod in pods_of(item):
            places.append((f"{pod.path}.nodeSelector", mapping(pod.spec, "nodeSelector")))
            if pod.owner.kind != "Pod":
                places.append((f"{pod.path} labels", dict(pod.labels)))
        for path, found in places:
            for key, value in found.items():
                if not formats.is_key(str(key)):
                    yield refused(item, path, f"the key {key}", _KEY)
                if not formats.is_label_value(value):
                    expected = "text of at most 63 letters, digits, `-`, `_`, `.`"
                    yield refused(item, f"{path}.{key}", repr(value), expected)
        annotations = mapping(item.data, "metadata.annotations")
        if (size := sum(len(f"{key}{text}".encode()) for key, text in annotations.items())) > _MOST_ANNOTATIONS:
            yield refused(item, "metadata.annotations", f"{size} bytes", f"{_MOST_ANNOTATIONS} bytes at most")
        for key in annotations:
            if not formats.is_key(str(key).lower()):
                yield refused(item, "metadata.annotations", f"the key {key}", _KEY)


def _selected(item: KubeObject) -> dict[str, Any]:
    return mapping(item.data, "spec.selector.matchLabels")


def names(objects: ObjectSet) -> Iterator[Finding]:
    for item in objects.objects:
        name = str(at(item.data, "metadata.name") or "")
        if not name and not at(item.data, "metadata.generateName"):
            yield refused(item, "metadata.name", "no name", "a name")
        if name and "rbac.authorization.k8s.io" not in item.api_version and not _is_name(item, name):
            yield refused(item, "metadata.name", name, "lower-case letters, digits and `-`, as DNS takes them")
        if item.namespace and not formats.is_dns_label(item.namespace):
            yield refused(item, "metadata.namespace", item.namespace, _NAME)
        if len(name) > _LONGEST.get(item.kind, len(name)):
            yield refused(item, "metadata.name", f"{len(name)} letters", f"at most {_LONGEST[item.kind]}")
        for pod in pods_of(item):
            boxes = [(f"{path}.name", str(box.get("name"))) for path, box in pod.containers()]
            for path, found in (*boxes, *((f"{pod.path}.volumes[{name}]", name) for name in pod.volumes())):
                if not formats.is_dns_label(found):
                    yield refused(item, path, found, _NAME)
            yield from _twice(item, f"{pod.path}.volumes", [str(row.get("name")) for row in rows(pod.spec, "volumes")])
        yield from _ports(item)


def _is_name(item: KubeObject, name: str) -> bool:
    return formats.is_dns_label(name) if item.kind in _LABELLED_KINDS else formats.is_dns_name(name)


def _ports(item: KubeObject) -> Iterator[Finding]:
    """Names of ports, also where they are asked for by name."""
    for pod in pods_of(item):
        for path, box in pod.containers():
            found = [(f"{path}.ports[{i}].name", row.get("name")) for i, row in enumerate(rows(box, "ports"))]
            asked = [f"{probe}.{handler}.port" for probe in PROBES for handler in ("httpGet", "tcpSocket")]
            found += [(f"{path}.{place}", at(box, place)) for place in asked]
            for where, name in found:
                if isinstance(name, str) and not formats.is_port_name(name):
                    yield refused(item, where, name, "lower-case letters, digits and `-`, at most 15, with a letter")
            yield from _twice(item, f"{path}.ports", [str(row["name"]) for row in rows(box, "ports") if "name" in row])
    if item.kind == "Service":
        for index, row in enumerate(rows(item.data, "spec.ports")):
            name, target = row.get("name"), row.get("targetPort")
            if name is not None and not formats.is_dns_label(str(name)):
                yield refused(item, f"spec.ports[{index}].name", str(name), _NAME)
            if isinstance(target, str) and not formats.is_port_name(target):
                yield refused(item, f"spec.ports[{index}].targetPort", target, "a port's name, at most 15 letters")
            for key, least in (("port", 1), ("targetPort", 1), ("nodePort", 0)):
                number = row.get(key)
                if isinstance(number, int) and not least <= number < 65536:
                    yield refused(item, f"spec.ports[{index}].{key}", str(number), "1 to 65535")


def fixed_words(objects: ObjectSet) -> Iterator[Finding]:
    for item, where, value, allowed in _rows_of(objects, tables.WORDS, tables.POD_WORDS, tables.CONTAINER_WORDS):
        if isinstance(value, str) and value not in allowed:
            yield refused(item, where, value, f"one of {', '.join(filter(None, allowed))}")


def ranges(objects: ObjectSet) -> Iterator[Finding]:
    for item, where, value, (least, most) in _rows_of(
        objects, tables.RANGES, tables.POD_RANGES, tables.CONTAINER_RANGES
    ):
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and (value < least or (most is not None and value > most))
        ):
            yield refused(item, where, str(value), f"{least} or more" if most is None else f"{least} to {most}")


def texts(objects: ObjectSet) -> Iterator[Finding]:
    """Fields of a format: names, addresses, paths, schedules."""
    for item, where, value, (is_right, expected) in _rows_of(
        objects, tables.FORMATS, tables.POD_FORMATS, tables.CONTAINER_FORMATS
    ):
        if isinstance(value, str | int) and not is_right(value if isinstance(value, str) else str(value)):
            yield refused(item, where, str(value) or "nothing", expected)


def _rows_of(
    objects: ObjectSet, kinds: Mapping[tuple[str, str], Any], of_pods: Mapping[str, Any], of_boxes: Mapping[str, Any]
) -> Iterator[tuple[KubeObject, str, Any, Any]]:
    """Each value that a table speaks of: its object, where it stands, the value, and the table's entry."""
    for item in objects.objects:
        places = [("", item.data, path, entry) for (kind, path), entry in kinds.items() if kind == item.kind]
        for pod in pods_of(item):
            places += [(f"{pod.path}.", pod.spec, path, entry) for path, entry in of_pods.items()]
            for start, box in pod.containers():
                places += [(f"{start}.", box, path, entry) for path, entry in of_boxes.items()]
        for start, data, path, entry in places:
            for where, value in _at_all(data, path):
                yield item, start + where, value, entry


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
            yield refused(item, path, f"{count} named {name}", "each name once")
