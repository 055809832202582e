"""Names of containers and volumes, read from the files in k8s/ that give them.

A strategic merge finds a container by its name, and adds one where it finds none. So patches do not repeat the names:
they ask for the container by its role, and for a volume by where the programs expect it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from builders.manifests.render import K8S


@dataclass(frozen=True)
class PodParts:
    """One pod template of k8s/: its container and that one's arguments, its init container (empty: none), and volumes
    by mount path."""

    container: str
    arguments: tuple[str, ...]
    init_container: str
    volumes: Mapping[str, str]

    def volume(self, mount_path: str) -> str:
        """Raises KeyError where nothing is mounted: the manifests and this code then disagree."""
        return self.volumes[mount_path]


@cache
def serving_pod() -> PodParts:
    return _parts("base/deployment.yaml")


@cache
def building_pod() -> PodParts:
    return _parts("components/engine-build/job.yaml")


def _parts(file: str) -> PodParts:
    pod: dict[str, Any] = yaml.safe_load((K8S / file).read_text())["spec"]["template"]["spec"]
    (container,), inits = pod["containers"], pod.get("initContainers", [])
    mounts = [mount for box in (*inits, container) for mount in box["volumeMounts"]]
    return PodParts(
        container=container["name"],
        arguments=tuple(container.get("args", ())),
        init_container=inits[0]["name"] if inits else "",
        volumes={mount["mountPath"]: mount["name"] for mount in mounts},
    )


# Where the programs look: the arguments in k8s/base/deployment.yaml and components/engine-build/job.yaml say the same.
STORE, REPOSITORY, SHM = "/models", "/repository", "/dev/shm"
VERSION, CONTROL, KEYS = "/etc/trireme/version", "/etc/trireme/control", "/etc/trireme/keys"
