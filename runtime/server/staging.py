"""Versions that are loaded into a server while it runs, as far as the server must know of them."""

from __future__ import annotations

from typing import Protocol

from runtime.settings import ServerSettings


class StagedVersions(Protocol):
    """Whoever lays versions out: in a pod, `runtime.pod.versions`. Asked by several threads."""

    def staged(self) -> int | None:
        """The number of the version that is laid out and has not answered yet."""

    def staged_settings(self, version: int) -> ServerSettings | None:
        """What the staged version was published with; None for any other."""

    def answered(self, version: int) -> ServerSettings | None:
        """This version answers, and is proven. Its settings, where it is the staged one."""

    def discard(self, reason: str = "") -> object:
        """Back to the proven version: the next load brings it again. `reason`: why."""
