"""Pod Security at level restricted, tokens, images and rights.

Levels: kubernetes.io/docs/concepts/security/pod-security-standards
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from builders.manifests.lint.objects import Finding, ObjectSet, Pod, at, mapping, rows, words

_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip


def restricted_pods(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(key):
                yield _restricted(pod, f"{pod.path}.{key}", "true", "absent", f"remove {key}")
        for name, volume in pod.volumes().items():
            for kind in sorted(set(volume) - {"name"} - _VOLUMES):
                fix = "use a PersistentVolumeClaim or an emptyDir"
                yield _restricted(pod, f"{pod.path}.volumes[{name}]", kind, ", ".join(sorted(_VOLUMES)), fix)
        for index, row in enumerate(rows(pod.spec, "securityContext.sysctls")):
            if row.get("name") not in _SYSCTLS:
                where = f"{pod.path}.securityContext.sysctls[{index}]"
                yield _restricted(pod, where, str(row.get("name")), "a safe sysctl", "remove it")


def restricted_containers(objects: ObjectSet) -> Iterator[Finding]:
    """Settings that may stand on the pod or on the container: the container's own wins."""
    for pod in objects.pods():
        shared = mapping(pod.spec, "securityContext")
        for path, container in pod.containers():
            own = mapping(container, "securityContext")
            where, both = f"{path}.securityContext", {**shared, **own}
            if own.get("privileged"):
                yield _restricted(pod, f"{where}.privileged", "true", "absent", "remove it")
            if own.get("allowPrivilegeEscalation") is not False:
                got = str(own.get("allowPrivilegeEscalation"))
                yield _restricted(pod, f"{where}.allowPrivilegeEscalation", got, "false", "set it to false")
            if both.get("runAsNonRoot") is not True:
                yield _restricted(pod, f"{where}.runAsNonRoot", str(both.get("runAsNonRoot")), "true", "set it to true")
            if both.get("runAsUser") == 0:
                yield _restricted(pod, f"{where}.runAsUser", "0", "another user", "choose a number over 0")
            profile = str(mapping(both, "seccompProfile").get("type"))
            if profile not in ("RuntimeDefault", "Localhost"):
                yield _restricted(pod, f"{where}.seccompProfile.type", profile, "RuntimeDefault", "set it on the pod")
            yield from _capabilities(pod, where, own)
            if own.get("procMount") not in (None, "Default"):
                yield _restricted(pod, f"{where}.procMount", str(own["procMount"]), "Default", "remove it")
            for port in rows(container, "ports"):
                if port.get("hostPort"):
                    yield _restricted(pod, f"{path}.ports", f"hostPort {port['hostPort']}", "none", "use a Service")


def _capabilities(pod: Pod, where: str, own: Mapping[str, Any]) -> Iterator[Finding]:
    if "ALL" not in words(own, "capabilities.drop"):
        got = str(words(own, "capabilities.drop"))
        yield _restricted(pod, f"{where}.capabilities.drop", got, "[ALL]", "drop ALL")
    added = set(words(own, "capabilities.add")) - {"NET_BIND_SERVICE"}
    if added:
        expected = "NET_BIND_SERVICE at most"
        yield _restricted(pod, f"{where}.capabilities.add", ", ".join(sorted(added)), expected, "remove them")


def _restricted(pod: Pod, path: str, got: str, expected: str, fix: str) -> Finding:
    return Finding("pod-security", pod.owner.title, path, got, f"{expected} (level restricted)", fix)


def read_only_root(objects: ObjectSet) -> Iterator[Finding]:
    """Not part of the level: an intruder, and a program that writes where nobody looks, both need a writable root."""
    for pod in objects.pods():
        for path, container in pod.containers():
            if at(container, "securityContext.readOnlyRootFilesystem") is not True:
                where = f"{path}.securityContext.readOnlyRootFilesystem"
                fix = "set it, and mount an emptyDir where the program writes"
                yield Finding("read-only-root", pod.owner.title, where, "not true", "true", fix)


def mounted_tokens(objects: ObjectSet) -> Iterator[Finding]:
    """A token in a pod that is granted nothing is only of use to an intruder."""
    granted = {
        (subject.get("name"), subject.get("namespace") or binding.namespace)
        for binding in objects.of("RoleBinding", "ClusterRoleBinding")
        for subject in rows(binding.data, "subjects")
    }
    for pod in objects.pods():
        name, namespace = str(pod.spec.get("serviceAccountName") or "default"), pod.owner.namespace
        account = objects.find("ServiceAccount", name, namespace)
        default = account.data.get("automountServiceAccountToken") if account else None
        if pod.spec.get("automountServiceAccountToken", default) is not False and (name, namespace) not in granted:
            where = f"{pod.path}.automountServiceAccountToken"
            expected = f"false: no binding here grants {name} anything"
            yield Finding("token", pod.owner.title, where, "not false", expected, "set it to false")


def image_tags(objects: ObjectSet) -> Iterator[Finding]:
    for pod in objects.pods():
        for path, container in pod.containers():
            image = str(container.get("image") or "")
            name, _, digest = image.partition("@")
            tag = name.rpartition("/")[2].partition(":")[2]
            if not digest and tag in ("", "latest"):
                got, fix = image or "no image", "name a version, or a digest (@sha256:…)"
                yield Finding("image-tag", pod.owner.title, f"{path}.image", got, "a pinned tag or digest", fix)


def wildcard_rights(objects: ObjectSet) -> Iterator[Finding]:
    for role in objects.of("Role", "ClusterRole"):
        for index, rule in enumerate(rows(role.data, "rules")):
            for key in ("verbs", "resources", "apiGroups"):
                if "*" in words(rule, key):
                    where = f"rules[{index}].{key}"
                    yield Finding("rbac-wildcard", role.title, where, "*", "names", "list what is needed, and no more")
    for binding in objects.of("RoleBinding", "ClusterRoleBinding"):
        if at(binding.data, "roleRef.name") == "cluster-admin":
            fix = "write a Role with what is needed"
            yield Finding("rbac-wildcard", binding.title, "roleRef.name", "cluster-admin", "a role of its own", fix)
