"""The proof of what one server answers: which version, published how, and where the figures go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.proof.proven import write_proven
from runtime.proof.proving import Prover, Watch
from runtime.server.launch import TritonServer
from runtime.server.model_port import GrpcPort
from runtime.server.staging import StagedVersions
from runtime.settings import ServerSettings


class ServerProof:
    """Of one server. `client` is a tritonclient that nobody else uses during `accept`; `stopped`: nobody waits."""

    def __init__(
        self,
        server: TritonServer,
        versions: StagedVersions | None,
        client: Any,
        report: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self._server, self._versions, self._client, self._report = server, versions, client, report
        watch = Watch(report=report, stopped=stopped)
        self._prover = Prover(server.repository, self._port, self._published, watch)

    def forget(self) -> None:
        """The models are loaded again, so what was proven of them is of the past."""
        self._prover.forget()

    def accept(self, version: int) -> None:
        """This version has answered. It is the server's from here on, once it is proven; that takes a while at first.

        While another version is loaded beside it, parts of both may answer together, which says nothing of either: the
        one that was proven before stays so until then. Raises NotProven, ProofOverdue, and what tritonclient raises.
        """
        staged = self._versions.staged() if self._versions is not None else None
        if staged not in (None, version) and self._server.proven is not None and self._server.proven.version == version:
            return
        settings = self._prover.prove(version)
        if settings is None:
            return
        assert self._prover.proven is not None
        if self._versions is None:
            self._server.settings = settings
        else:  # it may have been given up meanwhile
            self._server.settings = self._versions.answered(version) or self._server.settings
        self._server.proven = self._prover.proven.model_copy(update={"server": self._server.pid})
        self._report(f"version {version} is proven on this machine: {self._server.proven}")
        try:
            write_proven(self._server.repository, self._server.proven)
        except OSError as error:
            self._report(f"the figures of the proof do not reach the metrics: {error}")

    def _port(self, settings: ServerSettings) -> GrpcPort:
        cached = settings.response_cache_bytes > 0
        return GrpcPort(self._client, settings.ensemble, settings.version, self._server.probe_id, cached)

    def _published(self, version: int) -> ServerSettings | None:
        """The settings of a version that answers: of the start, staged, or of a build since the start."""
        staged = self._versions.staged_settings(version) if self._versions is not None else None
        if staged is not None or version == self._server.settings.version:
            return staged or self._server.settings
        current = ServerSettings.load(self._server.repository)
        return current if current.version == version else None
