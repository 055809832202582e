"""What the fake API server stores: objects with owners of their fields, a history to watch, and who may do what."""

from __future__ import annotations

import copy
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tests.cluster.fake_defaults import as_held
from tests.cluster.fake_ownership import merge

Key = tuple[str, str, str | None, str]  # apiVersion, plural, namespace, name
KINDS = {
    ("v1", "namespaces"): ("Namespace", False),
    ("v1", "pods"): ("Pod", True),
    ("v1", "events"): ("Event", True),
    ("v1", "services"): ("Service", True),
    ("v1", "configmaps"): ("ConfigMap", True),
    ("v1", "secrets"): ("Secret", True),
    ("v1", "persistentvolumeclaims"): ("PersistentVolumeClaim", True),
    ("v1", "persistentvolumes"): ("PersistentVolume", False),
    ("storage.k8s.io/v1", "storageclasses"): ("StorageClass", False),
    ("apps/v1", "deployments"): ("Deployment", True),
    ("apps/v1", "replicasets"): ("ReplicaSet", True),
    ("batch/v1", "jobs"): ("Job", True),
    ("policy/v1", "poddisruptionbudgets"): ("PodDisruptionBudget", True),
    ("apiextensions.k8s.io/v1", "customresourcedefinitions"): ("CustomResourceDefinition", False),
}
LWS = ("leaderworkerset.x-k8s.io/v1", "leaderworkersets")


class Refusal(Exception):
    """An answer that is no success, as the Status object of the API."""

    def __init__(self, code: int, reason: str, message: str, causes: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.causes = code, reason, message, causes or []

    def status(self) -> dict[str, Any]:
        details = {"details": {"causes": self.causes}} if self.causes else {}
        about = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code}
        return {**about, "reason": self.reason, "message": self.message, **details}


class FakeCluster:
    """`denied` holds (verb, resource), `granted` (verb, resource, name) in spite of it; `quota` maps a kind to the
    message that its creation is refused with, `warnings` a kind to the warning that comes with an answer about it.

    `images` says what pods of an image do, see `fake_controllers`. `logs` are by (pod's container, previous).
    """

    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.owners: dict[Key, dict[Any, set[str]]] = {}
        self.kinds = dict(KINDS)
        self.requests: list[tuple[str, str, str | None]] = []
        self.denied: set[tuple[str, str]] = set()
        self.granted: set[tuple[str, str, str]] = set()
        self.quota: dict[str, str] = {}
        self.warnings: dict[str, str] = {}
        self.images: dict[str, str] = {}
        self.logs: dict[tuple[str, bool], str] = {}
        self.addresses: dict[tuple[str, int], tuple[str, int]] = {}
        self.gone_as_event = False
        self.changed = threading.Condition(threading.RLock())
        self._version, self._oldest, self._closed = 100, 0, False
        self._history: list[tuple[int, str, Key, dict[str, Any]]] = []
        for name in ("default", "prod"):
            self.store(("v1", "namespaces", None, name), {"metadata": {"name": name}})
        self.store(("storage.k8s.io/v1", "storageclasses", None, "shared"), {"metadata": {"name": "shared"}})

    def close(self) -> None:
        """Ends every watch."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def compact(self) -> None:
        """Forgets all history, as etcd does every few minutes: older versions are 410 from now on."""
        with self.changed:
            self._oldest = self._version
            self._history = []

    def store(self, key: Key, item: dict[str, Any]) -> dict[str, Any]:
        """Writes an object and its event; sets what the server sets."""
        with self.changed:
            old = self.objects.get(key)
            self._version += 1
            kind = self.kinds[key[0], key[1]][0]
            about = item.setdefault("metadata", {})
            about["resourceVersion"] = str(self._version)
            about["uid"] = old["metadata"]["uid"] if old else str(uuid.uuid4())
            about["creationTimestamp"] = "2026-01-01T00:00:00Z"
            about.setdefault("name", key[3])
            if key[2]:
                about["namespace"] = key[2]
            grown = old is not None and old.get("spec") != item.get("spec")
            about["generation"] = (old or {}).get("metadata", {}).get("generation", 0 if grown else 1) + bool(grown)
            item = {"apiVersion": key[0], "kind": kind, **item}
            self.objects[key] = copy.deepcopy(item)
            event = "ADDED" if old is None else "MODIFIED"
            self._history.append((self._version, event, key, copy.deepcopy(item)))
            self.changed.notify_all()
            return item

    def remove(self, key: Key) -> None:
        """Deletes an object and all that it owns."""
        with self.changed:
            item = self.objects.pop(key)
            self.owners.pop(key, None)
            self._version += 1
            self._history.append((self._version, "DELETED", key, item))
            for other, owned in list(self.objects.items()):
                references = owned["metadata"].get("ownerReferences", ())
                if other in self.objects and any(ref["uid"] == item["metadata"]["uid"] for ref in references):
                    self.remove(other)
            self.changed.notify_all()

    def find(self, version: str, plural: str) -> list[tuple[Key, dict[str, Any]]]:
        with self.changed:
            return [(key, item) for key, item in self.objects.items() if key[:2] == (version, plural)]

    def discover(self, version: str) -> dict[str, Any]:
        found = [
            {"name": plural, "kind": kind, "namespaced": namespaced}
            for (known, plural), (kind, namespaced) in self.kinds.items()
            if known == version
        ]
        if not found:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        found.append({"name": f"{found[0]['name']}/status", "kind": found[0]["kind"], "namespaced": True})
        return {"kind": "APIResourceList", "groupVersion": version, "resources": found}

    def check_right(self, verb: str, resource: str, namespace: str | None, name: str | None = None) -> None:
        if (verb, resource) in self.denied and (verb, resource, name) not in self.granted:
            where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
            who = f'User "tester" cannot {verb} resource "{resource}" in API group ""{where}'
            raise Refusal(403, "Forbidden", f"{resource} is forbidden: {who}")

    def review(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, [asked["resource"], asked.get("subresource")]))
        named = (asked["verb"], resource, asked.get("name")) in self.granted
        return {**body, "status": {"allowed": named or (asked["verb"], resource) not in self.denied}}

    def handle(
        self, verb: str, version: str, plural: str, namespace: str | None, name: str | None, query: Any, body: Any
    ) -> tuple[int, dict[str, Any]]:
        if (version, plural) not in self.kinds:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        with self.changed:
            if verb == "list":
                return 200, self._list(version, plural, namespace, query)
            if verb in ("create", "patch") and namespace and ("v1", "namespaces", None, namespace) not in self.objects:
                raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found')
            own = name or body["metadata"].get("name") or f"{body['metadata']['generateName']}x7k2p"
            key = (version, plural, namespace, own)
            done: tuple[int, dict[str, Any]] = getattr(self, f"_{verb}")(key, query, body)
            return done

    def _need(self, key: Key) -> dict[str, Any]:
        if key not in self.objects:
            raise Refusal(404, "NotFound", f'{key[1]} "{key[3]}" not found')
        return self.objects[key]

    def _get(self, key: Key, query: Any, body: Any) -> tuple[int, dict[str, Any]]:
        return 200, copy.deepcopy(self._need(key))

    def _create(self, key: Key, query: Any, body: Any) -> tuple[int, dict[str, Any]]:
        if key in self.objects:
            raise Refusal(409, "AlreadyExists", f'{key[1]} "{key[3]}" already exists')
        if self.kinds[key[:2]][0] in self.quota:
            raise Refusal(403, "Forbidden", f'{key[1]} "{key[3]}" is forbidden: {self.quota[self.kinds[key[:2]][0]]}')
        if query.get("dryRun") == "All":
            return 201, body
        return 201, self.store(key, body)

    def _update(self, key: Key, query: Any, body: Any) -> tuple[int, dict[str, Any]]:
        wanted = body["metadata"].get("resourceVersion")
        if wanted and wanted != self._need(key)["metadata"]["resourceVersion"]:
            raise Refusal(
                409, "Conflict", f'{key[1]} "{key[3]}": the object has been modified; please apply your changes'
            )
        return 200, self.store(key, body)

    def _delete(self, key: Key, query: Any, body: Any) -> tuple[int, dict[str, Any]]:
        self._need(key)
        self.remove(key)
        return 200, {"kind": "Status", "status": "Success"}

    def _patch(self, key: Key, query: Any, body: Any) -> tuple[int, dict[str, Any]]:
        """Server-side apply; no other patch is known."""
        old, manager = self.objects.get(key), query["fieldManager"]
        if old is None and body["kind"] in self.quota:
            raise Refusal(403, "Forbidden", f'{key[1]} "{key[3]}" is forbidden: {self.quota[body["kind"]]}')
        item, owners, conflicts = merge(old or {}, self.owners.get(key, {}), body, manager)
        as_held(item)
        if key[2]:
            item["metadata"]["namespace"] = key[2]
        if conflicts and query.get("force") != "true":
            causes = [
                {"reason": "FieldManagerConflict", "message": f'conflict with "{owner}" using {key[0]}', "field": field}
                for field, owner in conflicts
            ]
            raise Refusal(409, "Conflict", f"Apply failed with {len(causes)} conflicts", causes)
        _validate(old, item)
        managers = sorted({name for names in owners.values() for name in names})
        item["metadata"]["managedFields"] = [{"manager": name, "operation": "Apply"} for name in managers]
        if query.get("dryRun") == "All":
            return 200, item
        self.owners[key] = owners
        if old is not None and _bare(old) == _bare(item):
            return 200, old  # no change, no new version
        return 200 if old else 201, self.store(key, item)

    def _list(self, version: str, plural: str, namespace: str | None, query: Any) -> dict[str, Any]:
        accepted = _selection(version, plural, namespace, query)
        items = [copy.deepcopy(item) for key, item in self.objects.items() if accepted(key, item)]
        return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def watch(self, version: str, plural: str, namespace: str | None, query: Any) -> Iterator[dict[str, Any]]:
        """Events after the given version, until the asked time is over. Raises 410 at once, or says so in an event."""
        with self.changed:
            gone = int(query["resourceVersion"]) < self._oldest
        refusal = Refusal(410, "Expired", f"too old resource version: {query['resourceVersion']}")
        if gone and not self.gone_as_event:
            raise refusal
        if gone:
            return iter([{"type": "ERROR", "object": refusal.status()}])
        return self._events(_selection(version, plural, namespace, query), query)

    def _events(self, accepted: Callable[..., bool], query: Any) -> Iterator[dict[str, Any]]:
        seen, end = int(query["resourceVersion"]), time.monotonic() + int(query.get("timeoutSeconds", 60))
        while True:
            with self.changed:
                new = [entry for entry in self._history if entry[0] > seen]
                if not new and not self._closed:
                    self.changed.wait(max(0.0, end - time.monotonic()))
                if self._closed or (not new and time.monotonic() >= end):
                    return
            for number, kind, key, item in new:
                seen = number
                if accepted(key, item):
                    yield {"type": kind, "object": item}

    def log(self, namespace: str, pod: str, query: Any) -> str:
        self._need(("v1", "pods", namespace, pod))
        found = self.logs.get((query["container"], query.get("previous") == "true"))
        if found is None:
            raise Refusal(400, "BadRequest", f'previous terminated container "{query["container"]}" not found')
        return "\n".join(found.splitlines()[-int(query["tailLines"]) :]) + "\n"

    def pod_address(self, namespace: str, pod: str, port: int) -> tuple[str, int] | None:
        """Where the pod's port really listens on this machine."""
        self._need(("v1", "pods", namespace, pod))
        return self.addresses.get((pod, port))


def _bare(item: dict[str, Any]) -> dict[str, Any]:
    about = {key: text for key, text in item["metadata"].items() if key in ("name", "labels", "annotations")}
    return {**{key: text for key, text in item.items() if key != "status"}, "metadata": about}


_DEPLOYMENT_FIELDS = {
    "minReadySeconds", "paused", "progressDeadlineSeconds", "replicas", "revisionHistoryLimit", "selector", "strategy",
    "template",
}  # fmt: skip


def _validate(old: dict[str, Any] | None, item: dict[str, Any]) -> None:
    """The few rules that tests break."""
    if item["kind"] == "Job" and old is not None and old["spec"]["template"] != item["spec"]["template"]:
        causes = [{"reason": "FieldValueInvalid", "message": "field is immutable", "field": "spec.template"}]
        raise Refusal(422, "Invalid", f'Job.batch "{item["metadata"]["name"]}" is invalid', causes)
    if item["kind"] != "Deployment":
        return
    selector, labels = item["spec"]["selector"]["matchLabels"], item["spec"]["template"]["metadata"]["labels"]
    if unknown := set(item["spec"]) - _DEPLOYMENT_FIELDS:
        raise Refusal(400, "BadRequest", f'strict decoding error: unknown field "spec.{unknown.pop()}"')
    causes = []
    if any(labels.get(key) != text for key, text in selector.items()):
        message = "Invalid value: `selector` does not match template `labels`"
        causes.append({"reason": "FieldValueInvalid", "message": message, "field": "spec.template.metadata.labels"})
    if old is not None and old["spec"]["selector"] != item["spec"]["selector"]:
        causes.append({"reason": "FieldValueInvalid", "message": "field is immutable", "field": "spec.selector"})
    if causes:
        raise Refusal(422, "Invalid", f'Deployment.apps "{item["metadata"]["name"]}" is invalid', causes)


def _selection(version: str, plural: str, namespace: str | None, query: Any) -> Callable[[Key, dict[str, Any]], bool]:
    labels = re.split(r",(?![^(]*\))", query.get("labelSelector", "")) if query.get("labelSelector") else []
    fields = query.get("fieldSelector", "").split(",") if query.get("fieldSelector") else []

    def accepted(key: Key, item: dict[str, Any]) -> bool:
        right_place = key[:2] == (version, plural) and (namespace is None or key[2] == namespace)
        return right_place and all(_has(item, term) for term in labels) and all(_is(item, term) for term in fields)

    return accepted


def _has(item: dict[str, Any], term: str) -> bool:
    labels = item["metadata"].get("labels", {})
    if found := re.fullmatch(r"(\S+) (in|notin) \((.*)\)", term):
        return (labels.get(found[1]) in found[3].split(",")) == (found[2] == "in")
    key, equals, text = term.partition("=")
    return labels.get(key) == text if equals else (key in labels) != key.startswith("!")


def _is(item: dict[str, Any], term: str) -> bool:
    path, _, text = term.partition("=")
    found: Any = item
    for part in path.split("."):
        found = (found or {}).get(part)
    return bool(found == text)
