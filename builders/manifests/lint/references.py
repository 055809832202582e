"""What a pod names must exist among what is applied together: ConfigMaps, claims, accounts, volumes, variables.

Secrets are not looked up: they do not belong in the files that hold the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from builders.manifests.lint.objects import Finding, ObjectSet, Pod, at, mapping, rows, words

_SHELL = re.compile(r"(^|/)(ba|da|k|z|a)?sh$")
_COMMAND = re.compile(r"-[a-zA-Z]*c[a-zA-Z]*")  # as in `sh -ec`
_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z_.][A-Za-z0-9_.-]*)\)")
# Set by the LeaderWorkerSet controller in every container of a group.
_GROUP_VARIABLES = {"LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"}


def config_maps(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        for path, name, key in _config_map_uses(pod):
            found = objects.find("ConfigMap", name, pod.owner.namespace)
            if found is None:
                yield _missing(pod, path, "ConfigMap", name)
            elif key is not None and key not in {**mapping(found.data, "data"), **mapping(found.data, "binaryData")}:
                expected = f"a key of ConfigMap/{name}"
                yield Finding("missing-reference", pod.owner.title, path, f"the key {key}", expected, "correct the key")


def _config_map_uses(pod: Pod) -> Iterator[tuple[str, str, str | None]]:
    for name, volume in pod.volumes().items():
        parts = [
            mapping(volume, "configMap"),
            *(mapping(row, "configMap") for row in rows(volume, "projected.sources")),
        ]
        for part in parts:
            if part.get("name") and not part.get("optional"):
                keys: list[str | None] = [str(item.get("key")) for item in rows(part, "items")]
                for key in keys or [None]:
                    yield f"{pod.path}.volumes[{name}]", str(part["name"]), key
    for path, container in pod.containers():
        for index, row in enumerate(rows(container, "envFrom")):
            part = mapping(row, "configMapRef")
            if part.get("name") and not part.get("optional"):
                yield f"{path}.envFrom[{index}]", str(part["name"]), None
        for row in rows(container, "env"):
            part = mapping(row, "valueFrom.configMapKeyRef")
            if part.get("name") and not part.get("optional"):
                yield f"{path}.env[{row.get('name')}]", str(part["name"]), str(part.get("key"))


def claims_and_accounts(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        namespace = pod.owner.namespace
        templates = {at(row, "metadata.name") for row in _claim_templates(pod)}
        for name, volume in pod.volumes().items():
            claim = at(volume, "persistentVolumeClaim.claimName")
            if claim and claim not in templates and objects.find("PersistentVolumeClaim", claim, namespace) is None:
                yield _missing(pod, f"{pod.path}.volumes[{name}]", "PersistentVolumeClaim", str(claim))
        account = pod.spec.get("serviceAccountName", "default")
        if account != "default" and objects.find("ServiceAccount", account, namespace) is None:
            yield _missing(pod, f"{pod.path}.serviceAccountName", "ServiceAccount", str(account))


def device_claims(objects: ObjectSet) -> Iterator[Finding]:
    """Dynamic Resource Allocation: container -> claim of the pod -> claim or template."""
    for pod in objects.pods():
        named = {str(row.get("name")) for row in rows(pod.spec, "resourceClaims")}
        for path, container in pod.containers():
            for row in rows(container, "resources.claims"):
                if row.get("name") not in named:
                    where, fix = f"{path}.resources.claims", "add it to the pod's resourceClaims"
                    expected = f"one of the pod's claims ({', '.join(sorted(named)) or 'none'})"
                    yield Finding(
                        "missing-reference", pod.owner.title, where, f"claim {row.get('name')}", expected, fix
                    )
        for row in rows(pod.spec, "resourceClaims"):
            for key, kind in (
                ("resourceClaimTemplateName", "ResourceClaimTemplate"),
                ("resourceClaimName", "ResourceClaim"),
            ):
                if row.get(key) and objects.find(kind, row[key], pod.owner.namespace) is None:
                    yield _missing(pod, f"{pod.path}.resourceClaims[{row.get('name')}]", kind, str(row[key]))


def mounts(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        volumes = set(pod.volumes()) | {str(at(row, "metadata.name")) for row in _claim_templates(pod)}
        used: set[str] = set()
        for path, container in pod.containers():
            taken: set[str] = set()
            for row in rows(container, "volumeMounts"):
                name, where = str(row.get("name")), str(row.get("mountPath"))
                used.add(name)
                if name not in volumes:
                    got, expected = f"volume {name}", f"one of {', '.join(sorted(volumes)) or 'none'}"
                    yield Finding("mount", pod.owner.title, f"{path}.volumeMounts", got, expected, "add the volume")
                if where in taken:
                    got, fix = f"two mounts at {where}", "move one of them"
                    yield Finding("mount", pod.owner.title, f"{path}.volumeMounts", got, "one volume a path", fix)
                taken.add(where)
            used |= {str(row.get("name")) for row in rows(container, "volumeDevices")}
            used |= {str(at(row, "valueFrom.fileKeyRef.volumeName")) for row in rows(container, "env")}
        for name in sorted(set(pod.volumes()) - used):
            where = f"{pod.path}.volumes[{name}]"
            got, expected = (
                "a volume that nothing mounts",
                "a mount: the pod waits for the volume, and no program has it",
            )
            yield Finding("unused-volume", pod.owner.title, where, got, expected, "mount or remove it")


def _claim_templates(pod: Pod) -> list[Mapping[str, Any]]:
    return [
        row
        for path in ("spec.volumeClaimTemplates", "spec.leaderWorkerTemplate.volumeClaimTemplates")
        for row in rows(pod.owner.data, path)
    ]


def variables(objects: ObjectSet) -> Iterator[Finding]:
    """`$(NAME)` that is not set stays as it is, and the program reads a dollar sign."""
    for pod in objects.pods():
        for path, container in pod.containers():
            known = environment(objects, pod, container)
            if known is None or _in_a_shell(container):
                continue
            for key in ("command", "args"):
                for index, word in enumerate(words(container, key)):
                    for name in {found.group(1) for found in _VARIABLE.finditer(word) if found.group(1)} - set(known):
                        where, fix = f"{path}.{key}[{index}]", "set it in env or envFrom, or write $$ for a dollar sign"
                        yield Finding("variable", pod.owner.title, where, f"$({name})", "a variable that is set", fix)


def _in_a_shell(container: Mapping[str, Any]) -> bool:
    """`$(date)` is the shell's then: what is no variable is handed on as it stands."""
    line = [*words(container, "command"), *words(container, "args")]
    return any(_SHELL.search(word) for word in line[:1]) and any(_COMMAND.fullmatch(word) for word in line[1:])


def environment(objects: ObjectSet, pod: Pod, container: Mapping[str, Any]) -> dict[str, str | None] | None:
    """Variables by name, None for values that only the cluster knows. None when a Secret may hold any name."""
    known: dict[str, str | None] = dict.fromkeys(_GROUP_VARIABLES) if pod.owner.kind == "LeaderWorkerSet" else {}
    for row in rows(container, "envFrom"):
        found = objects.find("ConfigMap", at(row, "configMapRef.name"), pod.owner.namespace)
        if found is None:
            return None
        prefix = str(row.get("prefix") or "")
        known |= {f"{prefix}{key}": str(value) for key, value in mapping(found.data, "data").items()}
    for row in rows(container, "env"):
        known[str(row.get("name"))] = str(row["value"]) if "value" in row else None
    return known


def expand(word: str, known: Mapping[str, str | None]) -> str:
    """An argument as the kubelet passes it."""

    def value(found: re.Match[str]) -> str:
        if found.group(1) is None:
            return "$"
        return known.get(found.group(1)) or found.group(0)

    return _VARIABLE.sub(value, word)


def _missing(pod: Pod, path: str, kind: str, name: str) -> Finding:
    namespace = f" in namespace {pod.owner.namespace}" if pod.owner.namespace else ""
    expected = f"{kind}/{name}{namespace} among the manifests"
    got, why = f"{name}, which is not there", "without it in the cluster the pod does not start"
    return Finding("not-here", pod.owner.title, path, got, f"{expected}: {why}", f"add the {kind}")
